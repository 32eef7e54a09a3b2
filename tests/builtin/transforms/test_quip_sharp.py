"""QuIP#: signs and a Hadamard matrix on either side of every weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.builtin.transforms.quip_sharp import QuIPSharp, QuIPSharpConfig, random_hadamard
from qtool.model.plan import TransformContext
from qtool.numerics.hadamard import hadamard_matrix
from qtool.numerics.operators import Hadamard, Operator
from qtool.steps.transform import context_of
from qtool.testing import TinyModel, check_transform, plan_of, tiny_model


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("qwen2_moe", shared_expert_intermediate_size=18) as made:
        yield made


@pytest.fixture
def context(tiny: TinyModel) -> TransformContext:
    return context_of(tiny.subject, None)


def dense(operator: Operator) -> Tensor:
    """``diag(signs) kron(I, H_b) / sqrt(b)``."""
    assert isinstance(operator, Hadamard)
    assert operator.signs is not None
    block = operator.block_size or operator.n
    blocks = torch.block_diag(*[hadamard_matrix(block).double() / block**0.5] * (operator.n // block))
    return operator.signs.double()[:, None] * blocks


class TestInvariance:
    def test_families_tied_and_untied(self) -> None:
        check_transform(QuIPSharp(), families=("llama", "qwen2-moe"))

    @pytest.mark.slow
    def test_every_family(self) -> None:
        check_transform(QuIPSharp())

    def test_without_outputs(self) -> None:
        check_transform(QuIPSharp(), QuIPSharpConfig(outputs=False), families=("phi3",))


class TestPlan:
    def test_both_sides_of_every_linear_without_statistics(self, context: TransformContext) -> None:
        found = QuIPSharp().plan(context, QuIPSharpConfig()).operators
        graph = context.graph
        inputs = {f"layers.{i}.{name}" for i in range(2) for name in graph.input_sites_of(i)}
        outputs = {f"layers.{one.layer}.out.{one.spec.module}" for one in graph.linears}
        assert set(found) == inputs | outputs
        assert set(QuIPSharp().plan(context, QuIPSharpConfig(outputs=False)).operators) == inputs

    def test_what_is_rounded_is_the_papers_matrix(self, tiny: TinyModel) -> None:
        """``H.T diag(S_U) W diag(S_V) H``, with one ``S_V`` for gate and up, and a ``S_U`` for each."""
        subject, plan = plan_of(QuIPSharp(), QuIPSharpConfig(), tiny)
        original, folded = subject.folded(0), replace(subject, plan=plan).folded(0)
        right = dense(plan.at("layers.0.mlp_in").operators[0])
        lefts = [dense(plan.at(f"layers.0.out.mlp.{name}").operators[0]) for name in ("gate_proj", "up_proj")]
        for name, left in zip(("gate_proj", "up_proj"), lefts, strict=True):
            expected = left.T @ original[f"mlp.{name}.weight"].double() @ right
            torch.testing.assert_close(folded[f"mlp.{name}.weight"], expected, rtol=1e-12, atol=1e-12)
        assert not torch.equal(*lefts)

    def test_a_width_without_a_matrix_is_rotated_in_the_largest_blocks(self, context: TransformContext) -> None:
        found = QuIPSharp().plan(context, QuIPSharpConfig()).operators
        blocks = {site: one.block_size for site, (one,) in found.items() if isinstance(one, Hadamard)}
        assert blocks["layers.1.shared.up_down"] == 2  # of 18
        assert blocks["layers.0.attn_in"] == 24
        assert blocks["layers.0.up_down"] == 40

    def test_signs_are_stored_and_the_seed_decides(self, context: TransformContext) -> None:
        def signs(seed: int, site: str = "layers.0.o_in") -> Tensor:
            (operator,) = QuIPSharp().plan(replace(context, seed=seed), QuIPSharpConfig()).operators[site]
            return operator.state()[0]["signs"]

        assert signs(0).dtype == torch.int8
        assert set(signs(0).tolist()) == {-1, 1}
        assert torch.equal(signs(0), signs(0))
        assert not torch.equal(signs(0), signs(1))
        assert not torch.equal(signs(0), signs(0, "layers.1.o_in"))


def test_a_weight_with_outliers_is_rounded_with_less_error() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=g, dtype=torch.float64)
    for place in range(8):
        weight[11 * place, 13 * place] = 60
    rotated = random_hadamard(128, g).weight_in(weight)
    both = random_hadamard(96, g).weight_out(rotated)

    def error(w: Tensor) -> float:
        step = w.abs().max() / 15
        return float(((w / step).round() * step - w).norm() / w.norm())

    assert error(both) < 0.8 * error(rotated) < 0.5 * error(weight)
