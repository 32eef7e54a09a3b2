"""Online Hadamard rotations in a compressed-tensors checkpoint: what the library computes is what qtool measures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.ct_transforms import OnlineTransform
from qtool.engine.execute import BlockExecutable
from qtool.engine.exporter import UNREADABLE
from qtool.engine.planner import extend
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, UsageError
from qtool.model.plan import Plan, Proposal
from qtool.numerics.hadamard import random_signs
from qtool.numerics.operators import Diag, Hadamard, HeadMix, Operator
from tests.builtin.layouts.conftest import SIZES, Make, altered
from tests.builtin.packed import written

INNER, HIDDEN = SIZES["intermediate_size"], SIZES["hidden_size"]
SIGNS = random_signs(INNER, torch.Generator().manual_seed(6)).to(torch.int8)


def planned(subject: Subject, operators: dict[str, list[Operator]]) -> Subject:
    plan = extend(Plan(), Proposal(operators), subject.model.graph, method="test")
    return replace(subject, plan=plan)


def everywhere(kind: str, operator: Operator) -> dict[str, list[Operator]]:
    return {f"layers.{layer}.{kind}": [operator] for layer in range(SIZES["num_hidden_layers"])}


def tokens() -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(5))


def measured(subject: Subject) -> Tensor:
    executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float32, batch=2)
    return torch.cat([logits for _, logits in executable.forward_windows(tokens())])


def loaded(directory: Path, *, transforms: bool) -> nn.Module:
    """Load a checkpoint with transformers; then, perhaps, apply its transforms with the library, from its matrices."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if transforms:
        config = json.loads((directory / "config.json").read_text())["quantization_config"]["transform_config"]
        apply_transform_config(model, TransformConfig.model_validate(config))
        stored = load_file(directory / "model.safetensors")
        matrices = {name: tensor for name, tensor in stored.items() if name.endswith("_input.weight")}
        assert not model.load_state_dict(matrices, strict=False).unexpected_keys
    return model


def executed(directory: Path, *, transforms: bool = True) -> Tensor:
    with torch.no_grad():
        return torch.cat([loaded(directory, transforms=transforms)(window[None]).logits for window in tokens()])


CASES: dict[str, tuple[str, dict[str, list[Operator]], dict[str, tuple[str, int | None]]]] = {
    "an order that is no power of two": (
        "llama",
        everywhere("up_down", Hadamard(INNER)),
        {"hadamard_0": ("random-hadamard", None)},
    ),
    "signs, and the inverse in one block": (
        "llama",
        {
            "layers.0.up_down": [Hadamard(INNER, signs=SIGNS)],
            "layers.1.up_down": [Hadamard(INNER, signs=SIGNS, transposed=True)],
        },
        {"hadamard_0": ("random-hadamard", None), "hadamard_1": ("random-hadamard", None)},
    ),
    "blocks": ("llama", everywhere("up_down", Hadamard(INNER, block_size=32)), {"hadamard_0": ("hadamard", 32)}),
    "blocks of 12": (
        "llama",
        everywhere("up_down", Hadamard(INNER, block_size=12)),
        {"hadamard_0": ("random-hadamard", 12)},
    ),
    "what several linears read": (
        "qwen2",
        everywhere("attn_in", Hadamard(HIDDEN)) | everywhere("up_down", Hadamard(INNER, block_size=16)),
        {"hadamard_0": ("hadamard", None), "hadamard_1": ("hadamard", 16)},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activations", ["", "int8-sym-token-sfp32-half"])
def test_the_library_computes_our_logits(make: Make, tmp_path: Path, case: str, activations: str) -> None:
    name, operators, groups = CASES[case]
    weights = "int8-sym-channel" if name == "llama" else "int8-sym-channel-sfp16"  # as the model is stored
    subject = planned(make(weights, activations, name=name), operators)
    assert [site for site, plan in subject.plan.sites.items() if plan.online] == list(operators)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    ours, theirs = measured(subject), executed(tmp_path / "out")
    alone = executed(tmp_path / "out", transforms=False)
    if activations:  # now and then a value lies so near the middle of two codes that the last bit decides
        assert (theirs - ours).abs().mean() < 1e-3 * (alone - ours).abs().mean()
    else:
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6)
    assert (alone - ours).abs().mean() > 0.01
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["transform_config"]
    assert {group: (one["type"], one["head_dim"]) for group, one in config["config_groups"].items()} == groups
    assert exported.consumers["transformers"].startswith(UNREADABLE)
    assert ("refused: it rotates" in exported.consumers["vllm"]) == (name == "qwen2")


def test_a_matrix_is_stored_once_as_ones_and_counts_as_an_operator(make: Make, tmp_path: Path) -> None:
    subject = make("int4-sym-g32")
    plain = written(CompressedTensors(), subject, tmp_path / "plain").details["bytes"]
    subject = planned(subject, everywhere("up_down", Hadamard(INNER)))
    counted = written(CompressedTensors(), subject, tmp_path / "out").details["bytes"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    (matrix,) = (name for name in stored if "hadamard" in name)
    assert matrix == "model.layers.0.mlp.down_proj.hadamard_0_input.weight"
    assert stored[matrix].abs().unique().tolist() == [1.0]
    assert torch.equal(stored[matrix].double() @ stored[matrix].double().mT, INNER * torch.eye(INNER).double())
    assert counted["parts"] == {**plain["parts"], "operators": stored[matrix].nbytes}
    assert counted["linears"] == plain["linears"] + stored[matrix].nbytes
    assert counted["model"] == plain["model"] + stored[matrix].nbytes


def test_a_matrix_that_was_written_wrong_is_found(make: Make, tmp_path: Path) -> None:
    subject = planned(make("int4-sym-g32"), everywhere("up_down", Hadamard(INNER)))
    written(CompressedTensors(), subject, tmp_path / "out")

    def negated(tensor: Tensor) -> Tensor:
        tensor[5, 7] *= -1
        return tensor

    altered(tmp_path / "out", "model.layers.0.mlp.down_proj.hadamard_0_input.weight", negated)
    with pytest.raises(ArtifactError, match="computes something else"):
        CompressedTensors().verify(subject, tmp_path / "out")


def test_a_group_that_misses_a_linear_is_found(make: Make, tmp_path: Path) -> None:
    subject = planned(make("int4-sym-g32"), everywhere("up_down", Hadamard(INNER)))
    written(CompressedTensors(), subject, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["transform_config"]["config_groups"]["hadamard_0"]["apply"][0]["targets"].pop()
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="not those of the plan"):
        CompressedTensors().verify(subject, tmp_path / "out")


@pytest.mark.parametrize(
    ("operators", "reason", "hint"),
    [
        (everywhere("qk_post", Diag(torch.rand(32) + 0.5)), "no other operator online", "--set head_mix=false"),
        (
            everywhere("qk_post", Hadamard(32, signs=random_signs(32, torch.Generator()), block_size=16)),
            "signs of their own",
            "without signs",
        ),
        (everywhere("o_in", HeadMix(4, 32)), "no other operator online", "--set head_mix=false"),
        ({"layers.1.up_down": [Hadamard(INNER), Diag(torch.rand(INNER) + 0.5)]}, "no other operator online", "--to hf"),
        (everywhere("up_down", Hadamard(INNER, signs=SIGNS, block_size=32)), "signs of their own", "without signs"),
    ],
)
def test_other_online_operators_are_refused_with_the_nearest(
    make: Make, operators: dict[str, list[Operator]], reason: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=reason) as refused:
        CompressedTensors().check(planned(make("int4-sym-g32"), operators))
    assert hint in refused.value.hint
    assert next(iter(operators)) in dict(refused.value.facts)["site"]


def test_an_order_that_the_library_lacks_is_refused() -> None:
    """It makes a matrix of its own before it reads the stored one."""
    from qtool.builtin.exporters import ct_transforms

    transform = OnlineTransform("hadamard_0", Hadamard(4 * 524), ("down_proj",))
    with pytest.raises(UsageError, match="no Hadamard matrix of this order") as refused:
        ct_transforms._check_matrix(transform)
    assert "--set block=16" in refused.value.hint
