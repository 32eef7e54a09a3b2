from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from qtool.errors import ShapeError
from qtool.numerics import obq as module
from qtool.numerics.frozen_grid import round_rows
from qtool.numerics.gptq import gptq_round
from qtool.numerics.obq import obq_round
from tests.numerics.frozen_cases import CASES, decoded, frozen, levels, problem, row_losses, to_be_fitted
from tests.oracles.gptq import Order, visiting_order
from tests.oracles.obq import obq_oracle


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("case", CASES)
def test_in_a_fixed_order_it_is_gptq(case: str, order: Order) -> None:
    weight, hessian = problem(1, 4)
    solved = gptq_round(weight, hessian, grid=to_be_fitted(case), parameters="static", order=order, dampening_frac=0.0)
    visits = visiting_order(hessian, order)
    values, loss = obq_round(weight, torch.linalg.inv(hessian), grid=frozen(case, weight), order=visits)
    torch.testing.assert_close(values, decoded(case, solved.codes, solved.parameters), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(loss, solved.loss, rtol=1e-8, atol=0)
    torch.testing.assert_close(loss, row_losses(weight - values, hessian), rtol=1e-8, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_the_greedy_order_equals_the_oracle(case: str) -> None:
    weight, hessian = problem(2)
    grid = frozen(case, weight)
    values, loss = obq_round(weight, torch.linalg.inv(hessian), grid=grid)
    expected, orders = obq_oracle(weight, hessian, levels=levels(case, grid))
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(loss, row_losses(weight - values, hessian), rtol=1e-8, atol=0)
    assert orders[0] != orders[1]


def test_what_leaves_the_grid_is_rounded_first() -> None:
    case, (weight, hessian) = "int2-g16-clipped", problem(3)
    grid = frozen(case, weight)
    values, _ = obq_round(weight, torch.linalg.inv(hessian), grid=grid)
    first, _ = obq_oracle(weight, hessian, levels=levels(case, grid))
    never, _ = obq_oracle(weight, hessian, levels=levels(case, grid), outliers_first=False)
    torch.testing.assert_close(values, first, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(values, never)


@pytest.mark.parametrize("case", CASES)
def test_the_greedy_order_gains_on_nearest_rounding(case: str) -> None:
    greedy = nearest = 0.0
    for seed in range(8):
        weight, hessian = problem(seed, 8)
        grid = frozen(case, weight)
        greedy += float(obq_round(weight, torch.linalg.inv(hessian), grid=grid)[1].sum())
        nearest += float(row_losses(weight - round_rows(grid, weight, 0), hessian).sum())
    assert greedy < 0.9 * nearest


def test_how_many_rows_are_done_at_once_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(4, 7)
    inverse, grid = torch.linalg.inv(hessian), frozen("nvfp4 beside int4-asym", weight)
    before = weight.clone(), inverse.clone()
    together = obq_round(weight, inverse, grid=grid)
    monkeypatch.setattr(module, "_BYTES_AT_ONCE", 3 * 8 * 32 * 32)
    apart = obq_round(weight, inverse, grid=grid)
    assert torch.equal(together[0], apart[0])
    torch.testing.assert_close(together[1], apart[1], rtol=1e-12, atol=0)
    assert torch.equal(weight, before[0])
    assert torch.equal(inverse, before[1])


def test_an_inverse_that_does_not_fit_is_refused() -> None:
    weight, hessian = problem(5)
    with pytest.raises((ShapeError, TypeCheckError), match=r"does not fit the weight|inverse"):
        obq_round(weight, hessian[1:, 1:], grid=frozen("int4", weight))
