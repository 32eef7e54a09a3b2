"""Calibrated zero points of a cache, and calibrated queries: found, written, and read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.packed_source import open_packed
from qtool.consumers.checkpoint import read_checkpoint
from qtool.consumers.table import answer
from qtool.engine.storage import stored_bytes
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, SchemeError
from qtool.steps.calibrate import WINDOWS
from qtool.steps.foresee import foresee
from qtool.steps.mitigate import mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.transform import TransformRequest, transform
from qtool.testing import TinyModel, tiny_model
from qtool.testing.tiny_models import decoded_logits, double_precision, exact_logits
from tests.builtin.packed import written
from tests.builtin.test_static_cache import ATTENTION, HEADS, INT4, LAYERS, Theirs, logits_of, request, rounded

ASYMMETRIC = ("int8-asym-tensor-sfp32-static", "int4-asym-head-sfp32-static")
QUERIES = ("fp8-tensor-static", "fp8-head-static")
QUERY_HEADS = 4


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model() as model:
        yield model


class Seen(Theirs):
    """The model in transformers, whose attention shows its queries too."""

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:  # noqa: ANN401
        self.shown[int(module.layer_idx)] = (key, value, query)
        return super().attend(module, query, key, value, mask, **given)

    def first(self, tiny: TinyModel) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and queries of the first block over the calibrated text."""
        self.shown: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.run(tiny.statistics.tensor(WINDOWS).long(), Theirs.leave)
        return self.shown[0]


def held(subject: Subject, place: str, leaf: str) -> Tensor:
    assert subject.quantized is not None
    return subject.quantized.tensor(f"layers.0.{place}.{leaf}")


@pytest.mark.parametrize("kv", ASYMMETRIC)
def test_both_ends_of_what_is_cached_are_at_the_ends_of_the_codes(tiny: TinyModel, kv: str) -> None:
    subject = rounded(tiny, kv=kv)
    codes = 255 if "int8" in kv else 15
    for place, states in zip(("keys", "values"), Seen(tiny, subject).first(tiny), strict=False):
        axes = (0, 2, 3) if "head" in kv else (0, 1, 2, 3)
        low, high = (end(states, axes) for end in (torch.amin, torch.amax))
        assert bool((low < 0).all())
        assert bool((high > 0).all())
        scale, zero = held(subject, place, "input_global_scale"), held(subject, place, "input_zero_point")
        assert scale.shape == zero.shape == ((HEADS, 1, 1) if "head" in kv else ())
        assert zero.dtype == torch.uint8
        torch.testing.assert_close(scale.flatten(), ((high - low) / codes).flatten(), rtol=1e-5, atol=0)
        assert torch.equal(zero.flatten().float(), (-low / ((high - low) / codes)).round().flatten())


def test_scales_of_8_bits_have_the_multiplier_of_the_largest_value(tiny: TinyModel) -> None:
    """The largest scale and the largest code make the largest value of the calibrated text."""
    subject = rounded(tiny, kv="fp4-g8-se4m3")
    for place, states in zip(("keys", "values"), Seen(tiny, subject).first(tiny), strict=False):
        found = held(subject, place, "input_global_scale")
        assert found.shape == ()
        assert float(found) == pytest.approx(float(states.abs().amax()) / (448 * 6), rel=1e-5)
    with double_precision():
        torch.testing.assert_close(decoded_logits(subject), exact_logits(subject), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kv", QUERIES)
def test_queries_have_scales_of_their_own_heads(tiny: TinyModel, kv: str) -> None:
    subject = rounded(tiny, kv=ATTENTION.format(kv))
    _, _, query = Seen(tiny, subject).first(tiny)
    scale = held(subject, "queries", "input_global_scale")
    assert scale.shape == ((QUERY_HEADS, 1, 1) if "head" in kv else ())
    largest = query.abs().amax((0, 2, 3)) if "head" in kv else query.abs().amax()
    torch.testing.assert_close(scale.flatten(), (largest / 448).flatten(), rtol=1e-5, atol=0)
    alone = rounded(tiny, kv=kv)
    assert all(
        torch.equal(held(subject, place, "input_global_scale"), held(alone, place, "input_global_scale"))
        for place in ("keys", "values")
    )


@pytest.mark.parametrize(
    "kv", [*ASYMMETRIC, *map(ATTENTION.format, QUERIES), "queries=int8-token-head,keys=none,values=none"]
)
def test_token_by_token_is_as_all_at_once(tiny: TinyModel, kv: str) -> None:
    subject = rounded(tiny, kv=kv)
    with double_precision():
        torch.testing.assert_close(decoded_logits(subject), exact_logits(subject), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kv", [*ASYMMETRIC, *map(ATTENTION.format, QUERIES)])
def test_they_are_counted_and_foreseen(tiny: TinyModel, kv: str) -> None:
    asked = request(tiny, kv=kv, seed=1)
    seen = foresee(mitigate, asked, tiny.workspace).to_json()
    made, _ = mitigate(asked, tiny.workspace)
    heads = (2 * HEADS, QUERY_HEADS) if "head" in kv else (2, 1)
    scales = LAYERS * (sum(heads) if "queries" in kv else heads[0])
    assert stored_bytes(made.header.slots)["inputs"] == scales * (5 if "asym" in kv else 4)
    assert seen["disk_bytes_at_least"] == sum(slot.nbytes for slot in made.header.slots.values())


@pytest.mark.parametrize("kv", [*ASYMMETRIC, *map(ATTENTION.format, QUERIES)])
def test_checkpoints_hold_and_say_it(tiny: TinyModel, tmp_path: Path, kv: str) -> None:
    subject, out = rounded(tiny, INT4, kv), tmp_path / "out"
    written(CompressedTensors(), subject, out)
    stored, prefix = load_file(out / "model.safetensors"), "model.layers.0.self_attn"
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    said, groups = config["kv_cache_scheme"], list(config["config_groups"].values())
    assert (said["symmetric"], said["dynamic"]) == ("asym" not in kv, False)
    (case,) = read_checkpoint(out, lambda _: 4)
    if "queries" in kv:
        assert groups[1:] == [
            {
                "targets": ["LlamaAttention"],
                "weights": None,
                "input_activations": said,
                "output_activations": None,
                "format": None,
            }
        ]
        assert torch.equal(
            stored[f"{prefix}.q_scale"].flatten(), held(subject, "queries", "input_global_scale").flatten()
        )
        assert (case.queries, case.cache) == (True, "static")
        fits = replace(case, group_size=64)
        assert "looks for weights in every group" in answer([fits], "sglang", "sm90").says
        asked = answer([fits], "vllm", "sm90")
        assert ("head" in kv) == (asked.verdict == "executes-other")
        assert stored[f"{prefix}.q_scale"].shape == ((QUERY_HEADS, 1, 1) if "head" in kv else (1,))
    else:
        assert len(groups) == 1
        zero, half = stored[f"{prefix}.k_zero_point"], 128 if "int8" in kv else 8
        assert zero.dtype == torch.int8
        assert zero.shape == stored[f"{prefix}.k_scale"].shape == ((HEADS, 1, 1) if "head" in kv else (1,))
        assert torch.equal(zero.flatten().int() + half, held(subject, "keys", "input_zero_point").flatten().int())
    packed = open_packed(out, subject.plugins, cache=tmp_path)
    assert packed.scheme.kv == subject.scheme.kv
    written(CompressedTensors(), packed, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)

    name = f"model.layers.1.self_attn.{'q_scale' if 'queries' in kv else 'v_zero_point'}"
    save_file(stored | {name: stored[name] + 1}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=name):
        CompressedTensors().verify(subject, out)
    save_file({key: one for key, one in stored.items() if key != name}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=name):
        CompressedTensors().verify(subject, out)
    lacking = "a stored scale for keys" if "queries" in kv else "calibrated zero points, and the checkpoint lacks one"
    with pytest.raises((SchemeError, ArtifactError), match=lacking):
        open_packed(out, subject.plugins, cache=tmp_path)


def test_quantized_queries_are_not_dropped(tiny: TinyModel, tmp_path: Path) -> None:
    """Queries that are quantized unlike keys, or whose scale no group speaks of, are refused."""
    subject = rounded(tiny, INT4, "fp8-tensor-static")
    written(CompressedTensors(), subject, tmp_path / "out")
    file, place = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "config.json"
    stored, config = load_file(file), json.loads(place.read_text())
    for leaf, reason in (
        ("k_global_scale", "does not say that it"),
        ("q_scale", "does not say that it"),
    ):
        save_file(stored | {f"model.layers.0.self_attn.{leaf}": torch.ones(1)}, file, {"format": "pt"})
        with pytest.raises(ArtifactError, match=reason):
            open_packed(tmp_path / "out", subject.plugins, cache=tmp_path)
    save_file(stored, file, {"format": "pt"})
    groups, cache = config["quantization_config"]["config_groups"], config["quantization_config"]["kv_cache_scheme"]
    other = {"num_bits": 8, "type": "float", "dynamic": True, "symmetric": True, "strategy": "tensor"}
    for targets, inputs in ((["LlamaAttention"], other), (["re:.*self_attn$"], cache), (["LlamaAttention"], None)):
        groups["group_1"] = {"targets": targets, "weights": None, "input_activations": inputs}
        place.write_text(json.dumps(config))
        with pytest.raises(SchemeError, match="a group without weights"):
            open_packed(tmp_path / "out", subject.plugins, cache=tmp_path)
        (case,) = read_checkpoint(tmp_path / "out", lambda _: 4)
        assert (case.queries, case.unread) == (False, "config_groups")


@pytest.mark.parametrize("kv", ["fp8-tensor-static", "int8-head-sfp32-static"])
def test_calibrated_scales_of_rotated_queries_and_keys(tiny: TinyModel, tmp_path: Path, kv: str) -> None:
    """Behind R3, which the library puts in front of what it rounds."""
    scheme = read_scheme("", {"weights": "int8-sym-g8-sbf16", "kv": ATTENTION.format(kv)}, tiny.workspace.plugins)
    settings = {"r1": "false", "r2": "false", "r4": "false", "head_mix": "false"}
    asked = TransformRequest(str(tiny.statistics.path), "quarot", scheme=scheme, settings=settings)
    plan, _ = transform(asked, tiny.workspace)
    subject = rounded(tiny, "int8-sym-g8-sbf16", ATTENTION.format(kv), source=plan.path)
    assert [site for site, own in subject.plan.sites.items() if own.operators] == [
        "layers.0.qk_post",
        "layers.1.qk_post",
    ]
    written(CompressedTensors(), subject, tmp_path / "out")
    windows = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(3))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]

    def theirs(*, turned: bool) -> Tensor:
        module = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        for name, own in module.named_parameters():
            if name.endswith("weight") and name in subject.model.places and "_proj" not in name:
                own.data = subject.model.tensor(name).float()
        if turned:
            apply_transform_config(module, TransformConfig.model_validate(config["transform_config"]))
        with torch.no_grad():
            logits: Tensor = module(windows).logits
        return logits

    ours = logits_of(subject, windows)
    far = (theirs(turned=False) - ours).abs().mean()
    assert (theirs(turned=True) - ours).abs().mean() < 0.05 * far
