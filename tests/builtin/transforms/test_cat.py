"""CAT: the identity of the paper, a numpy oracle, and what it shares with WUSH."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from qtool.builtin.transforms.cat import CAT, cat_matrices
from qtool.builtin.transforms.wush import WUSH, AffineBlockConfig, finished, wush_matrices
from qtool.model.plan import TransformContext
from qtool.numerics.groups import from_groups, to_groups
from qtool.numerics.operators import Block, Hadamard, Operator
from qtool.numerics.second_moments import dampened, diagonal_blocks, weight_moment_blocks
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.transform import context_of
from qtool.testing import TinyModel, check_transform, tiny_model

FAMILIES = ("gemma2",)
Matrix = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("qwen2") as made:
        yield made


@pytest.fixture
def context(tiny: TinyModel) -> TransformContext:
    return context_of(tiny.subject, tiny.statistics)


def root(matrix: Matrix) -> Matrix:
    """The positive definite square root, by the iteration of Denman and Beavers."""
    y, z = matrix, np.eye(len(matrix))
    for _ in range(60):
        y, z = (y + np.linalg.inv(z)) / 2, (z + np.linalg.inv(y)) / 2
    return y


def oracle(weight: Matrix, hessian: Matrix, size: int, dampening: float) -> list[Matrix]:
    """``M = (Σ_w # Σ_x⁻¹)^½`` of each block; the mean as ``A (A⁻¹ B)^½``."""
    found = []
    for start in range(0, len(hessian), size):
        rows = weight[:, start : start + size]
        sigma_w = rows.T @ rows / len(rows)
        sigma_x = hessian[start : start + size, start : start + size]
        sigma_w = sigma_w + dampening * np.trace(sigma_w) / size * np.eye(size)
        sigma_x = sigma_x + dampening * np.trace(sigma_x) / size * np.eye(size)
        found.append(root(sigma_w @ root(np.linalg.inv(sigma_w) @ np.linalg.inv(sigma_x))))
    return found


class TestInvariance:
    def test_families(self) -> None:
        check_transform(CAT(), AffineBlockConfig(block=8), families=FAMILIES)

    @pytest.mark.slow
    def test_every_family(self) -> None:
        check_transform(CAT())


class TestFormula:
    @pytest.mark.parametrize("site_id", ["layers.0.attn_in", "layers.1.o_in", "layers.1.up_down"])
    def test_the_paper_block_by_block(self, context: TransformContext, site_id: str) -> None:
        options = AffineBlockConfig(block=8, dampening=0.02, hadamard="off")
        (operator,) = CAT().plan(context, options).operators[site_id]
        assert isinstance(operator, Block)
        weights = [context.weights(linear.name) for linear in context.graph.consumers(context.graph.site(site_id))]
        hessian = context.statistics[site_id].entries["hessian"].double().numpy()
        expected = oracle(torch.cat(weights).double().numpy(), hessian, 8, 0.02)
        np.testing.assert_allclose(operator.matrices.double().numpy(), np.stack(expected), rtol=1e-4, atol=1e-5)

    def test_both_moments_become_alike(self) -> None:
        sigma_w, sigma_x = moments(seed=1), moments(seed=2)
        m = cat_matrices(sigma_w, sigma_x)
        inverse = torch.linalg.inv(m)
        torch.testing.assert_close(m @ sigma_x @ m, inverse @ sigma_w @ inverse)
        torch.testing.assert_close(m, m.mT)
        assert bool((torch.linalg.eigvalsh(m) > 0).all())

    def test_it_is_wush_before_its_rotation(self) -> None:
        sigma_w, sigma_x = moments(seed=3), moments(seed=4)
        m, t = cat_matrices(sigma_w, sigma_x), wush_matrices(sigma_w, sigma_x)
        turned = torch.linalg.inv(m) @ t
        torch.testing.assert_close(turned @ turned.mT, torch.eye(8).double().expand_as(turned))

    def test_the_hadamard_comes_last(self, context: TransformContext) -> None:
        (with_it,), (without,) = (
            CAT().plan(context, AffineBlockConfig(block=8, hadamard=choice)).operators["layers.0.mlp_in"]
            for choice in ("on", "off")
        )
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(with_it.act(x), Hadamard(24, block_size=8).act(without.act(x)))

    def test_the_options_and_sites_of_wush(self, context: TransformContext) -> None:
        options = AffineBlockConfig(block=4, sites="attn_in,up_down", max_condition=1.5)
        proposal = CAT().plan(context, options)
        assert proposal.operators.keys() == WUSH().plan(context, options).operators.keys()
        for (operator,) in proposal.operators.values():
            assert isinstance(operator, Block)
            assert float(torch.linalg.cond(operator.matrices.double()).max()) < 1.5001


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "int4-g16"])
def test_less_error_than_no_transform_and_than_a_hadamard(scheme: str) -> None:
    """Correlated inputs with loud channels; weights and inputs rounded to nearest."""
    generator = torch.Generator().manual_seed(5)
    mixing = torch.block_diag(*(torch.randn(32, 32, generator=generator) for _ in range(2)))
    x = torch.randn(512, 64, generator=generator) @ mixing * torch.exp(torch.randn(64, generator=generator))
    weight = torch.randn(48, 24, generator=generator) @ torch.randn(24, 64, generator=generator)
    lookup = Plugins.discover().format
    parsed = parse_tensor_scheme(scheme, lookup)
    fmt, size = lookup(parsed.format), parsed.group_size
    assert size is not None
    both = dampened(weight_moment_blocks([weight], size), 0.01), dampened(diagonal_blocks(x.mT @ x / 512, size), 0.01)
    cat = Block(finished(cat_matrices(*both), AffineBlockConfig(), ModelScheme(weights=parsed)), 64)

    def rounded(values: Tensor) -> Tensor:
        groups = to_groups(values, parsed.strategy, size)
        parameters = fmt.fit(groups, parsed, global_scale=fmt.global_scale(values.abs().amax(), parsed))
        return from_groups(fmt.round(groups, parameters), values.shape)

    def error(operator: Operator | None) -> float:
        w, inputs = (weight, x) if operator is None else (operator.weight_in(weight), operator.act(x))
        return float((rounded(inputs) @ rounded(w).T - x @ weight.T).norm())

    assert error(cat) < 0.75 * min(error(None), error(Hadamard(64, block_size=size)))


def moments(count: int = 3, *, seed: int) -> Tensor:
    """Second moments of correlated rows."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(count, 8, 8, generator=generator, dtype=torch.float64)
    return mixing @ mixing.mT + 0.01 * torch.eye(8, dtype=torch.float64)
