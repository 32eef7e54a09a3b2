"""Caches in a compressed-tensors checkpoint: what the library rounds is what qtool measures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.packed_source import open_packed
from qtool.engine.execute import BlockExecutable
from qtool.engine.exporter import UNREADABLE
from qtool.engine.planner import extend
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, SchemeError, UsageError
from qtool.model.plan import Plan, Proposal
from qtool.numerics.hadamard import random_signs
from qtool.numerics.operators import Hadamard, Operator
from qtool.scheme import parse_tensor_scheme
from qtool.scheme_parts import KeysAndValues
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.testing import tiny_model
from tests.builtin.layouts.conftest import SIZES, Make, altered, changed
from tests.builtin.packed import written

WEIGHTS, ATTENTION = "int8-sym-channel", "queries={0},keys={0},values={0}"


def tokens(windows: int = 3) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (windows, 12), generator=torch.Generator().manual_seed(5))


def measured(subject: Subject) -> Tensor:
    executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float32, batch=2)
    return torch.cat([logits for _, logits in executable.forward_windows(tokens())])


def loaded(directory: Path, *, transforms: bool = False) -> nn.Module:
    """Load a checkpoint with transformers; then, perhaps, apply its transforms with the library."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if transforms:
        apply_transform_config(model, TransformConfig.model_validate(said_of(directory)["transform_config"]))
        stored = load_file(directory / "model.safetensors")
        matrices = {name: tensor for name, tensor in stored.items() if ".hadamard_" in name}
        assert not model.load_state_dict(matrices, strict=False).unexpected_keys
    return model


@torch.no_grad()
def executed(model: nn.Module) -> Tensor:
    return torch.cat([model(window[None]).logits for window in tokens()])


def said_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config


def without_cache(subject: Subject) -> Subject:
    return replace(subject, scheme=replace(subject.scheme, kv=None))


@pytest.mark.parametrize("kv", ["fp8-head", "int8-asym-head-sfp32", "int4-sym-head-sfp32-half"])
def test_a_dynamic_scale_per_head_is_a_token_of_the_library(make: Make, tmp_path: Path, kv: str) -> None:
    """Of a cache's ``[batch, heads, tokens, dim]`` it keeps the first two axes, as of inputs."""
    subject = make(WEIGHTS, kv=kv)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    cache = said_of(tmp_path / "out")["kv_cache_scheme"]
    assert (cache["strategy"], cache["group_size"], cache["dynamic"]) == ("token", None, True)
    ours, theirs, plain = measured(subject), executed(loaded(tmp_path / "out")), measured(without_cache(subject))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6)
    for other in (kv.replace("head", "token-head"), kv.replace("head", "tensor")):
        scheme = parse_tensor_scheme(other, subject.plugins.format, vector="token-head")
        unlike = measured(replace(subject, scheme=replace(subject.scheme, kv=scheme)))
        assert (unlike - ours).abs().mean() > 0.05 * (plain - ours).abs().mean() > 0
    assert " with a dynamic scale per head" in exported.consumers["transformers"]
    assert "refused: a KV cache is FP8" in exported.consumers["vllm"]
    assert "the KV cache is NOT quantized" in exported.consumers["sglang"]
    assert open_packed(tmp_path / "out", subject.plugins, cache=tmp_path).scheme.kv == subject.scheme.kv


@pytest.mark.parametrize(
    "kv",
    [
        *("fp4-tensor-sfp32", "fp4-head-sfp32", "fp4-token-head-sfp32", "fp4-g16-sfp32", "fp6_e2m3-token-head-sfp32"),
        *("mxfp4", "mxfp6_e2m3", "mxfp8-rceil", "queries=mxfp4,keys=mxfp4,values=mxfp4"),
    ],
)
def test_floats_of_4_and_6_bits_in_a_cache(make: Make, tmp_path: Path, kv: str) -> None:
    subject = make(WEIGHTS, kv=kv)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    ours, theirs, plain = measured(subject), executed(loaded(tmp_path / "out")), measured(without_cache(subject))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6)
    assert (plain - ours).abs().mean() > 1e-4
    element = next(word for word in ("FP4", "FP6", "FP8") if word.lower() in kv)
    assert f"KV cache in {element} with a dynamic scale" in exported.consumers["transformers"]
    assert "refused: a KV cache is FP8" in exported.consumers["vllm"]
    found = open_packed(tmp_path / "out", subject.plugins, cache=tmp_path).scheme
    same = (
        subject.scheme.keys
        if "token-head" not in kv
        else replace(subject.scheme.keys, strategy="group", group_size=HEAD)
    )
    assert (found.keys, found.values, found.queries) == (same, same, same if "queries" in kv else None)


@pytest.mark.parametrize("kv", ["fp4-tensor-sfp32-static", "fp4-head-sfp32-static", "fp6_e2m3-tensor-sfp32-static"])
def test_floats_of_4_and_6_bits_with_calibrated_scales(make: Make, tmp_path: Path, kv: str) -> None:
    plain, heads = make(WEIGHTS), SIZES["num_key_value_heads"]
    scheme = replace(plain.scheme, kv=parse_tensor_scheme(kv, plain.plugins.format, vector="token-head"))
    steps = {f"layers.{i}.{of}": 2.0 ** -(3 + i) for i in range(2) for of in ("keys", "values")}
    shape = (heads, 1, 1) if "head" in kv else ()
    scales = {f"{name}.input_global_scale": torch.full(shape, step) for name, step in steps.items()}
    subject = changed(plain, tmp_path / "own", scheme, **scales)
    written(CompressedTensors(), subject, tmp_path / "out")
    ours, theirs = measured(subject), executed(loaded(tmp_path / "out"))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6)
    assert (measured(plain) - ours).abs().mean() > 1e-4
    assert open_packed(tmp_path / "out", subject.plugins, cache=tmp_path).scheme.kv == scheme.kv


@pytest.mark.parametrize("queries", [False, True])
def test_nvfp4_in_a_cache_has_a_stored_divisor(make: Make, tmp_path: Path, queries: bool) -> None:
    plain = make(WEIGHTS)
    one = parse_tensor_scheme("nvfp4", plain.plugins.format, vector="token-head")
    scheme = replace(plain.scheme, kv=KeysAndValues(one, one, one) if queries else one)
    places = ("keys", "values", *(("queries",) if queries else ()))
    names = [f"layers.{layer}.{place}.input_global_scale" for layer in range(2) for place in places]
    scales = {name: torch.tensor(0.0011 + 0.0001 * index) for index, name in enumerate(names)}
    subject = changed(plain, tmp_path / "own", scheme, **scales)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    said = said_of(tmp_path / "out")["kv_cache_scheme"]
    assert (said["strategy"], said["group_size"], said["dynamic"]) == ("tensor_group", 16, "local")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    divisors = [stored[f"model.layers.{layer}.self_attn.{of[0]}_global_scale"] for layer in range(2) for of in places]
    assert [float(one) for one in divisors] == pytest.approx([1 / float(scale) for scale in scales.values()])
    ours, theirs = measured(subject), executed(loaded(tmp_path / "out"))
    cached = measured(plain)
    assert (theirs - ours).abs().mean() < 0.02 * (cached - ours).abs().mean()
    assert (
        f"{'queries and ' if queries else ''}KV cache in FP4 with a dynamic scale within"
        in exported.consumers["transformers"]
    )
    assert "refused: a KV cache is FP8" in exported.consumers["vllm"]
    packed = open_packed(tmp_path / "out", subject.plugins, cache=tmp_path)
    assert packed.scheme.kv == scheme.kv
    assert packed.quantized is not None
    assert [float(packed.quantized.tensor(name)) for name in names] == pytest.approx(
        [float(one) for one in scales.values()]
    )
    altered(tmp_path / "out", "model.layers.1.self_attn.v_global_scale", lambda one: one * 2)
    with pytest.raises(ArtifactError, match="v_global_scale"):
        CompressedTensors().verify(subject, tmp_path / "out")


HEAD, INNER = 32, SIZES["intermediate_size"]
SIGNS = random_signs(HEAD, torch.Generator().manual_seed(2)).to(torch.int8)
TURNS: dict[str, tuple[str, Operator, tuple[str, int]]] = {
    "Sylvester's": ("int4-asym-token-head-sfp32", Hadamard(HEAD), ("hadamard", HEAD)),
    "signs": ("int4-asym-head-sfp32", Hadamard(HEAD, signs=SIGNS), ("random-hadamard", HEAD)),
    "signs, the inverse": ("fp8-tensor", Hadamard(HEAD, signs=SIGNS, transposed=True), ("random-hadamard", HEAD)),
    "blocks": ("int4-asym-token-head-sfp32", Hadamard(HEAD, block_size=16), ("hadamard", 16)),
    "blocks of 4, no cache": ("", Hadamard(HEAD, block_size=4), ("hadamard", 4)),
}


def planned(subject: Subject, operators: dict[str, list[Operator]]) -> Subject:
    return replace(subject, plan=extend(Plan(), Proposal(operators), subject.model.graph, method="test"))


@pytest.mark.parametrize("case", TURNS)
def test_queries_and_keys_are_rotated_behind_their_positions(make: Make, tmp_path: Path, case: str) -> None:
    kv, operator, said = TURNS[case]
    plain = make(WEIGHTS, kv=ATTENTION.format(kv) if kv else "")
    subject = planned(plain, {f"layers.{layer}.qk_post": [operator] for layer in range(2)})
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    (group,) = said_of(tmp_path / "out")["transform_config"]["config_groups"].values()
    assert (group["type"], group["head_dim"]) == said
    assert [one["location"] for one in group["apply"]] == ["q_attn", "k_cache"]
    assert all(one["targets"] == [f"model.layers.{layer}.self_attn" for layer in range(2)] for one in group["apply"])
    stored = [name for name in load_file(tmp_path / "out" / "model.safetensors") if "hadamard" in name]
    sylvester = said[0] == "hadamard"
    assert stored == ([] if sylvester else ["model.layers.0.self_attn.hadamard_0_q_attn.weight"])
    assert ("operators" in exported.details["bytes"]["parts"]) == (not sylvester)

    model = loaded(tmp_path / "out", transforms=True)
    assert not hasattr(model.model.layers[0].self_attn.q_proj, "hadamard_0_q_attn")
    ours, theirs, alone = measured(subject), executed(model), executed(loaded(tmp_path / "out"))
    close = (theirs - ours).abs().mean() < 1e-3 * (measured(plain) - measured(without_cache(plain))).abs().mean()
    assert close if kv else torch.allclose(theirs, ours, rtol=0, atol=2e-6)
    torch.testing.assert_close(alone, measured(plain), rtol=0, atol=2e-6)
    if kv:
        assert (alone - ours).abs().mean() > 0.1 * (ours - measured(without_cache(plain))).abs().mean()
        assert exported.consumers["transformers"].startswith(UNREADABLE)
    else:
        assert "which changes nothing" in exported.consumers["transformers"]
        assert ("no place for the matrix" in exported.consumers["vllm"]) == (not sylvester)


def test_rotations_of_inputs_and_of_keys_are_groups_of_their_own(make: Make, tmp_path: Path) -> None:
    subject = make(WEIGHTS, kv=ATTENTION.format("int4-asym-head-sfp32"))
    operators: dict[str, list[Operator]] = {}
    for layer in range(2):
        operators |= {
            f"layers.{layer}.qk_post": [Hadamard(HEAD)],
            f"layers.{layer}.up_down": [Hadamard(INNER, block_size=HEAD)],
        }
    subject = planned(subject, operators)
    written(CompressedTensors(), subject, tmp_path / "out")
    groups = said_of(tmp_path / "out")["transform_config"]["config_groups"]
    assert [[one["location"] for one in group["apply"]] for group in groups.values()] == [
        ["input"],
        ["q_attn", "k_cache"],
    ]
    ours, theirs = measured(subject), executed(loaded(tmp_path / "out", transforms=True))
    assert (theirs - ours).abs().mean() < 1e-3 * (measured(without_cache(subject)) - ours).abs().mean()


@pytest.mark.parametrize("change", ["location", "target", "matrix"])
def test_a_rotation_of_keys_that_was_written_wrong_is_found(make: Make, tmp_path: Path, change: str) -> None:
    operators: dict[str, list[Operator]] = {f"layers.{i}.qk_post": [Hadamard(HEAD, signs=SIGNS)] for i in range(2)}
    subject = planned(make(WEIGHTS, kv=ATTENTION.format("int4-asym-head-sfp32")), operators)
    written(CompressedTensors(), subject, tmp_path / "out")
    if change == "matrix":
        altered(tmp_path / "out", "model.layers.0.self_attn.hadamard_0_q_attn.weight", lambda one: one.flip(0))
    else:
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        apply = config["quantization_config"]["transform_config"]["config_groups"]["hadamard_0"]["apply"]
        apply.pop() if change == "location" else apply[1]["targets"].pop()
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ArtifactError, match="computes something else" if change == "matrix" else "not those of the plan"
    ):
        CompressedTensors().verify(subject, tmp_path / "out")


def test_rotated_queries_in_16_bits_beside_a_cache_are_refused(make: Make) -> None:
    """The library rounds them as keys, or, of static scales, fails: it looks for those of queries."""
    subject = planned(
        make(WEIGHTS, kv="fp8-tensor"), {f"layers.{layer}.qk_post": [Hadamard(HEAD)] for layer in range(2)}
    )
    with pytest.raises(UsageError, match="rounds queries as it rounds keys where it rotates both") as refused:
        CompressedTensors().check(subject)
    assert refused.value.hint.startswith(f"--kv {ATTENTION.format('fp8-sym-tensor-sfp32')}, or ")


@pytest.mark.parametrize("kv", ["fp8-tensor", ""])
def test_an_attention_without_hooks_is_refused(kv: str) -> None:
    """Of GPT-NeoX the library would rotate queries alone."""
    with tiny_model("gpt_neox") as model:
        asked = read_scheme("", {"weights": "int4-sym-g8-sbf16", "kv": kv}, model.workspace.plugins)
        artifact, _ = mitigate(MitigateRequest(str(model.path), "rtn", asked), model.workspace)
        subject = open_subject(str(artifact.path), model.workspace).subject
        if not kv:
            CompressedTensors().check(subject)
            subject = planned(subject, {"layers.0.qk_post": [Hadamard(subject.model.graph.dims.head_dim)]})
        with pytest.raises(SchemeError, match="quantizes no cache of an attention without") as refused:
            CompressedTensors().check(subject)
        assert ("attention", "GPTNeoXAttention") in refused.value.facts
