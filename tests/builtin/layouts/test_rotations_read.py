"""The online rotations of a compressed-tensors checkpoint are read back: ours, and those that other tools write."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.gptq import GPTQ
from qtool.builtin.exporters.hf import HuggingFace
from qtool.builtin.exporters.packed_source import open_packed
from qtool.engine.subject import Subject
from qtool.errors import SchemeError, UsageError
from qtool.numerics.hadamard import random_signs
from qtool.numerics.operators import Hadamard
from tests.builtin.layouts.conftest import Make
from tests.builtin.layouts.test_attention import ATTENTION
from tests.builtin.layouts.test_transforms import CASES, INNER, everywhere, executed, measured, planned
from tests.builtin.packed import written

DOWN = "model.layers.{}.mlp.down_proj"
HEAD_DIM = 32


def opened(directory: Path, like: Subject, cache: Path) -> Subject:
    return open_packed(directory, like.plugins, cache=cache)


def said(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the groups of a checkpoint's rotations."""
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"]["transform_config"]["config_groups"])
    (directory / "config.json").write_text(json.dumps(config))


def stored(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activations", ["", "int8-sym-token-sfp32-half"])
def test_the_reopened_checkpoint_computes_the_same_logits(
    make: Make, tmp_path: Path, case: str, activations: str
) -> None:
    name, operators, _ = CASES[case]
    weights = "int8-sym-channel" if name == "llama" else "int8-sym-channel-sfp16"
    subject = planned(make(weights, activations, name=name), operators)
    written(CompressedTensors(), subject, tmp_path / "out")
    again = opened(tmp_path / "out", subject, tmp_path)
    assert {site: plan.online[0].state()[1] for site, plan in again.plan.sites.items()} == {
        site: plan.online[0].state()[1] for site, plan in subject.plan.sites.items() if plan.online
    }
    ours = measured(subject)
    assert torch.equal(measured(again), ours)
    assert not torch.allclose(measured(replace(again, plan=replace(again.plan, sites={}))), ours, atol=1e-3)


def test_what_it_becomes_is_what_the_artifact_becomes(make: Make, tmp_path: Path) -> None:
    name, operators, _ = CASES["signs, and the inverse in one block"]
    subject = planned(make("int4-sym-g32", name=name), operators)
    written(CompressedTensors(), subject, tmp_path / "out")
    again = opened(tmp_path / "out", subject, tmp_path)
    for source, folder in ((subject, "direct"), (again, "through")):
        written(HuggingFace(), source, tmp_path / folder)
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("direct", "through"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    written(CompressedTensors(), again, tmp_path / "again")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    with pytest.raises(UsageError, match="do not carry") as refused:
        GPTQ().check(again)
    assert ("up_down", "hadamard") in refused.value.facts


@pytest.mark.parametrize("signed", [False, True])
def test_a_rotation_of_queries_and_keys_is_read_too(make: Make, tmp_path: Path, signed: bool) -> None:
    signs = random_signs(HEAD_DIM, torch.Generator().manual_seed(2)).to(torch.int8) if signed else None
    kv = ATTENTION.format("fp8-tensor")
    subject = planned(make("int8-sym-channel", kv=kv), everywhere("qk_post", Hadamard(HEAD_DIM, signs=signs)))
    written(CompressedTensors(), subject, tmp_path / "out")
    again = opened(tmp_path / "out", subject, tmp_path)
    assert [site for site, plan in again.plan.sites.items() if plan.online] == ["layers.0.qk_post", "layers.1.qk_post"]
    assert torch.equal(measured(again), measured(subject))


@pytest.mark.parametrize("inverse", [False, True])
def test_a_matrix_of_another_tool_is_read_as_the_library_runs_it(make: Make, tmp_path: Path, inverse: bool) -> None:
    """A pattern for targets, a matrix that is no ``diag(signs) H`` of ours, and what was folded into the weights."""
    subject = planned(make("int8-sym-channel"), everywhere("up_down", Hadamard(INNER)))
    written(CompressedTensors(), subject, tmp_path / "out")
    matrix = random_hadamard_matrix(INNER, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(4))
    place = f"{DOWN.format(0)}.hadamard_0_input.weight"
    order = torch.randperm(INNER, generator=torch.Generator().manual_seed(4))
    stored(tmp_path / "out", lambda tensors: tensors.update({place: matrix[order].to(torch.bfloat16).contiguous()}))
    online = {"targets": ["re:.*down_proj$"], "location": "input", "inverse": inverse}
    folded = {"targets": ["re:.*down_proj$"], "location": "weight_input", "inverse": True}
    said(tmp_path / "out", lambda groups: groups["hadamard_0"].update({"apply": [online, folded]}))
    again = opened(tmp_path / "out", subject, tmp_path)
    assert again.plan.at("layers.1.up_down").online[0].kind == "orthogonal"
    assert again.plan.at("layers.0.up_down").online[0] is again.plan.at("layers.1.up_down").online[0]
    online["inverse"] = inverse
    said(tmp_path / "out", lambda groups: groups["hadamard_0"].update({"apply": [online]}))
    torch.testing.assert_close(measured(again), executed(tmp_path / "out"), rtol=0, atol=2e-6)
    assert not torch.allclose(measured(again), measured(subject), atol=1e-3)


def test_sylvesters_matrix_need_not_be_stored(make: Make, tmp_path: Path) -> None:
    subject = planned(make("int8-sym-channel"), everywhere("up_down", Hadamard(INNER, block_size=32)))
    written(CompressedTensors(), subject, tmp_path / "out")
    stored(tmp_path / "out", lambda tensors: [tensors.pop(name) for name in list(tensors) if "hadamard" in name])
    assert torch.equal(measured(opened(tmp_path / "out", subject, tmp_path)), measured(subject))


def targeting(pattern: str) -> dict[str, Any]:
    return {"apply": [{"targets": [pattern], "location": "input"}]}


def entry(**changes: Any) -> Callable[[dict[str, Any]], None]:  # noqa: ANN401 - fields of an entry
    return lambda groups: groups["hadamard_0"]["apply"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (entry(location="output"), r"the output of `model\.layers\.0\.mlp\.down_proj`"),
        (entry(targets=["Linear"]), "whose matrix is not stored"),
        (entry(targets=["re:.*lm_head"]), "the input of `lm_head`"),
        (entry(targets=["re:.*q_proj"]), "whose matrix is not stored"),
        (
            lambda groups: groups["hadamard_0"].update({"type": "hadamard", "head_dim": 32} | targeting("re:.*q_proj")),
            "what reads `layers.0.attn_in` is not rotated alike",
        ),
        (entry(inverse="maybe"), "that compressed-tensors does not read"),
        (lambda groups: groups["hadamard_0"].update({"type": "random-matrix"}), "matrices that are not read"),
        (lambda groups: groups["hadamard_0"].update({"randomize": True}), "matrices that are not read"),
        (lambda groups: groups["hadamard_0"].update({"head_dim": 36}), "do not fill what they rotate"),
        (lambda groups: groups["hadamard_0"].update({"head_dim": 12}), "whose matrix is not stored"),
        (lambda groups: groups.update({"again": groups["hadamard_0"]}), "is not rotated alike|is not stored"),
    ],
)
def test_what_is_no_hadamard_rotation_is_refused_by_name(
    make: Make, tmp_path: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    subject = planned(make("int4-sym-g32"), everywhere("up_down", Hadamard(INNER)))
    written(CompressedTensors(), subject, tmp_path / "out")
    said(tmp_path / "out", change)
    with pytest.raises(SchemeError, match=reason):
        opened(tmp_path / "out", subject, tmp_path)


def test_a_matrix_that_is_not_orthogonal_and_weights_in_16_bits_are_refused(make: Make, tmp_path: Path) -> None:
    subject = planned(make("int4-sym-g32,*.down_proj=none"), everywhere("up_down", Hadamard(INNER)))
    written(CompressedTensors(), subject, tmp_path / "plain")
    with pytest.raises(SchemeError, match=r"`model\.layers\.0\.mlp\.down_proj`, which is in 16 bits"):
        opened(tmp_path / "plain", subject, tmp_path)
    subject = planned(make("int4-sym-g32"), everywhere("up_down", Hadamard(INNER)))
    written(CompressedTensors(), subject, tmp_path / "out")

    def doubled(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN.format(0)}.hadamard_0_input.weight"][3] = 1

    stored(tmp_path / "out", doubled)
    with pytest.raises(SchemeError, match="not Hadamard's"):
        opened(tmp_path / "out", subject, tmp_path)
