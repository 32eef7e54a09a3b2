"""The solver with a linear term, and weights that are re-targeted for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.builtin.formats.integer import Int3
from qtool.numerics.deviation import carried_deviation, deviation_target
from qtool.numerics.frozen_grid import column_rounders
from qtool.numerics.gptq import ColumnGrid, GPTQResult, ParameterSource, factorize_visits, gptq_round
from qtool.numerics.triangular import InverseFactor, LinearTerm
from qtool.scheme import GroupParameters, TensorScheme
from tests.numerics.frozen_cases import CASES, SIZE, decoded, frozen, problem, row_losses, to_be_fitted
from tests.oracles.gptq import Order, visiting_order
from tests.oracles.triangular import Rounded, foem_oracle, gptaq_oracle, qronos_oracle

FMT, SCHEME = Int3(), TensorScheme("int3", symmetric=False)
ORDERS = ["natural", "activation"]


def deviation_of(seed: int, hessian: Tensor) -> Tensor:
    """``C - H`` of a full-precision stream that is a linear map of the other, and noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*hessian.shape, generator=generator, dtype=torch.float64)
    return 0.05 * noise @ hessian + 0.02 * noise.T


def nearest(case: str, weight: Tensor) -> Rounded:
    rounders = column_rounders(frozen(case, weight))
    return lambda col, current: rounders[col](current[:, col])


def steered(
    case: str, weight: Tensor, hessian: Tensor, order: Order, term: LinearTerm | None, block_size: int = 12
) -> tuple[GPTQResult, InverseFactor]:
    grid = to_be_fitted(case)
    factor = factorize_visits(hessian, grid, dampening_frac=0.0, order=order)
    factor = replace(factor, term=term)
    found = gptq_round(weight, hessian, grid=grid, parameters="static", factor=factor, block_size=block_size)
    return found, factor


def term_of(kind: str, hessian: Tensor, deviation: Tensor, order: Order, size: float) -> LinearTerm:
    factor = factorize_visits(hessian, to_be_fitted("int4"), dampening_frac=0.0, order=order)
    if kind == "foem":
        return LinearTerm(size * factor.feedback(), drift=True)
    return LinearTerm(size * carried_deviation(factor.visited(deviation), factor.upper))


@pytest.mark.parametrize("size", [0.25, 1.0])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["gptaq", "foem"])
@pytest.mark.parametrize("case", CASES)
def test_a_linear_term_equals_the_oracle(case: str, kind: str, order: Order, size: float) -> None:
    weight, hessian = problem(1, 4)
    deviation = deviation_of(2, hessian)
    found, _ = steered(case, weight, hessian, order, term_of(kind, hessian, deviation, order, size))
    rounded, visits = nearest(case, weight), visiting_order(hessian, order)
    if kind == "foem":
        expected = foem_oracle(weight, hessian, rounded=rounded, order=visits, beta=size)
    else:
        expected = gptaq_oracle(weight, hessian, deviation, rounded=rounded, order=visits, alpha=size)
    values = decoded(case, found.codes, found.parameters)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-9)
    plain, _ = steered(case, weight, hessian, order, None)
    assert not torch.equal(found.codes, plain.codes)
    torch.testing.assert_close(found.loss, row_losses(weight - values, hessian), rtol=1e-8, atol=0)


def test_the_deviation_and_not_its_transpose_is_carried() -> None:
    _, hessian = problem(1)
    deviation = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    deviation[2, 7] = 1.0  # the stream deviates at input 2 together with what input 7 reads
    factor = factorize_visits(hessian, to_be_fitted("int4"), dampening_frac=0.0, order="natural")
    carried = carried_deviation(deviation, factor.upper)
    torch.testing.assert_close(carried[2, 3:], torch.linalg.inv(hessian[3:, 3:])[4], rtol=1e-8, atol=1e-12)
    assert not carried[:2].any()
    assert not carried[3:].any()
    assert torch.equal(carried, carried.triu(1))


@pytest.mark.parametrize("order", ["natural", "groups"])
@pytest.mark.parametrize("source", ["fresh", "static"])
@pytest.mark.parametrize("kind", ["gptaq", "foem"])
def test_groups_that_cross_blocks_are_fitted_with_all_that_is_pending(
    kind: str, source: ParameterSource, order: Order
) -> None:
    weight, hessian = problem(3, 4, 48)
    deviation = deviation_of(4, hessian)
    grid = [ColumnGrid(12, lambda values, start: FMT.fit(values, SCHEME), FMT.round, FMT.encode)]
    factor = factorize_visits(hessian, grid, dampening_frac=0.0, order=order)
    matrix = factor.feedback() if kind == "foem" else carried_deviation(factor.visited(deviation), factor.upper)
    factor = replace(factor, term=LinearTerm(0.5 * matrix, drift=kind == "foem"))
    results = [
        gptq_round(weight, hessian, grid=grid, parameters=source, factor=factor, block_size=size)
        for size in (1, 10, 17, 32, 128)
    ]
    fitted: dict[int, GroupParameters] = {}

    def rounded(col: int, current: Tensor) -> Tensor:
        group = col // 12
        if group not in fitted:
            now = weight if source == "static" else current
            fitted[group] = FMT.fit(now[:, group * 12 : group * 12 + 12], SCHEME)
        return FMT.round(current[:, col : col + 1], fitted[group]).squeeze(1)

    visits = visiting_order(hessian, order, 12)
    if kind == "foem":
        expected = foem_oracle(weight, hessian, rounded=rounded, order=visits, beta=0.5)
    else:
        expected = gptaq_oracle(weight, hessian, deviation, rounded=rounded, order=visits, alpha=0.5)
    for result in results:
        (own,) = result.parameters
        values = FMT.decode(result.codes.reshape(4, 4, 12), own).reshape(4, 48)
        torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(result.codes, results[0].codes)
        torch.testing.assert_close(result.loss, row_losses(weight - expected, hessian), rtol=1e-4, atol=0)


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("case", ["int4-asym-g8", "nvfp4"])
def test_a_term_of_nothing_changes_nothing(case: str, drift: bool) -> None:
    weight, hessian = problem(5, 4)
    nothing = LinearTerm(torch.zeros_like(hessian), drift=drift)
    found, _ = steered(case, weight, hessian, "activation", nothing)
    plain, _ = steered(case, weight, hessian, "activation", None)
    assert torch.equal(found.codes, plain.codes)
    torch.testing.assert_close(found.loss, plain.loss, rtol=1e-8, atol=0)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES)
def test_the_target_makes_gptq_qronos(case: str, order: Order, damping: float) -> None:
    weight, hessian = problem(6, 4)
    deviation = deviation_of(7, hessian)
    grid, visits = to_be_fitted(case), visiting_order(hessian, order)
    factor = factorize_visits(hessian + damping * torch.eye(SIZE), grid, dampening_frac=0.0, order=order)
    target = torch.zeros_like(weight)
    target[:, visits] = deviation_target(
        weight[:, visits], hessian.diagonal()[visits], factor.visited(deviation), factor.upper
    )
    found = gptq_round(target, hessian, grid=grid, parameters="static", factor=factor, block_size=12)
    expected = qronos_oracle(
        weight, hessian, hessian + deviation, damping=damping, rounded=nearest(case, target), order=visits
    )
    values = decoded(case, found.codes, found.parameters)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-9)
    first = visits[0]
    exact = weight[:, first] + weight @ deviation[:, first] / hessian[first, first]
    torch.testing.assert_close(target[:, first], exact, rtol=1e-8, atol=0)


def test_without_deviation_the_target_is_the_weight() -> None:
    weight, hessian = problem(8)
    factor = factorize_visits(hessian, to_be_fitted("int4"), dampening_frac=0.01, order="natural")
    target = deviation_target(weight, hessian.diagonal(), torch.zeros_like(hessian), factor.upper)
    assert torch.equal(target, weight)
