"""What is folded without the weights that codes stand for is what is folded with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtool.engine.planner import extend
from qtool.model.plan import Plan, Proposal
from qtool.model.source import Model
from qtool.numerics.hadamard import random_signs
from qtool.numerics.operators import Diag, Hadamard, Operator, Shift
from qtool.plugins import Plugins
from tests.builtin.layouts.conftest import SIZES, Make
from tests.builtin.packed import written

HIDDEN, INNER, HEAD = SIZES["hidden_size"], SIZES["intermediate_size"], 16
SIGNS = random_signs(HIDDEN, torch.Generator().manual_seed(2))
RANGE = torch.arange(HEAD, dtype=torch.float64)
PLANS: dict[str, dict[str, list[Operator]]] = {
    "nothing": {},
    "rotations": {"residual": [Hadamard(HIDDEN, signs=SIGNS)], "layers.0.vo": [Hadamard(HEAD)]},
    "a scale": {"layers.0.up_down": [Diag(torch.linspace(0.5, 2, INNER))]},
    "a shift": {"residual": [Hadamard(HIDDEN, signs=SIGNS)], "layers.0.vo": [Shift(RANGE)]},
}


@pytest.mark.parametrize("plan", PLANS)
def test_biases_and_norms_are_the_same_and_no_weight_is_read(
    make: Make, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    subject = make("int4-sym-g16-sfp16", name="qwen2")
    subject = replace(subject, plan=extend(Plan(), Proposal(PLANS[plan]), subject.model.graph, method="test"))
    whole, read = subject.folded(0), []
    tensors = Model.tensors

    def watched(model: Model, prefix: str, **arguments: object) -> dict[str, torch.Tensor]:
        found = tensors(model, prefix, **arguments)
        read.extend(found)
        return found

    monkeypatch.setattr(Model, "tensors", watched)
    beside = subject.beside(0)
    weights = {f"{linear.spec.module}.weight" for linear in subject.model.graph.linears_of(0)}
    assert beside.keys() == whole.keys() - weights
    for name, tensor in beside.items():
        assert (tensor.dtype, tensor.shape) == (whole[name].dtype, whole[name].shape)
        assert torch.equal(tensor, whole[name]), name
    assert bool(weights & set(read)) == (plan == "a shift")
    if plan != "nothing" and plan != "a scale":
        moved = "self_attn.v_proj.bias"
        assert not torch.equal(whole[moved], subject.model.tensor(f"model.layers.0.{moved}").double())


@pytest.mark.parametrize(
    ("to", "weights"),
    [
        ("compressed-tensors", "int4-sym-g32-sfp16"),
        ("gptq", "int4-sym-g32"),
        ("awq", "int4-asym-g32"),
        ("modelopt", "nvfp4"),
        ("hf", "int4-sym-g32"),
    ],
)
def test_what_is_not_quantized_has_the_bytes_of_the_model(
    make: Make, plugins: Plugins, tmp_path: Path, to: str, weights: str
) -> None:
    """Embeddings, norms, biases and heads of their own, in the dtype that the scales want as well."""
    subject = make(weights, name="llama" if weights == "nvfp4" else "qwen2")
    written(plugins.load("exporters", to), subject, tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    stored = load_file(shard)
    linears = {f"{linear.name}.weight" for linear in subject.linears}
    beside = subject.model.places.keys() - linears
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= beside
    for name in beside:
        own = subject.model.tensor(name)
        assert (stored[name].dtype, stored[name].shape) == (own.dtype, own.shape), name
        assert stored[name].view(torch.uint8).equal(own.view(torch.uint8)), name
