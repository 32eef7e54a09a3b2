from __future__ import annotations

import itertools

import pytest
import torch
from jaxtyping import TypeCheckError

from qtool.errors import ShapeError
from qtool.numerics import greedy_descent as module
from qtool.numerics.coordinate_descent import Route, coordinate_descent
from qtool.numerics.frozen_grid import round_rows
from qtool.numerics.greedy_descent import greedy_descent
from tests.numerics.frozen_cases import CASES, SIZE, frozen, levels, problem, row_losses, start_of, without_some_inputs
from tests.oracles.coordinate_descent import greedy_descent_oracle


@pytest.mark.parametrize("start", ["nearest", "gptq"])
@pytest.mark.parametrize("case", CASES)
def test_equals_trying_every_value_of_every_column(case: str, start: str) -> None:
    weight, hessian = problem(1, 2)
    grid = frozen(case, weight)
    values = start_of(start, case, weight, hessian, grid)
    expected = greedy_descent_oracle(weight, hessian, values, levels=levels(case, grid), steps=SIZE)
    found = greedy_descent(weight, hessian, values, grid=grid, sweeps=1)
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-7)
    if start == "nearest":
        assert found.changes[0] > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_no_sweep_raises_the_loss_of_a_row_and_no_single_change_is_left_that_gains(
    case: str, dtype: torch.dtype
) -> None:
    weight, hessian = problem(2, 8)
    weight = weight.to(dtype)
    grid = frozen(case, weight)
    start = round_rows(grid, weight, 0)
    reached = [start, *(greedy_descent(weight, hessian, start, grid=grid, sweeps=k).values for k in (1, 2, 50))]
    for before, after in itertools.pairwise([row_losses(weight - values, hessian) for values in reached]):
        assert bool((after <= before).all())
    end = greedy_descent(weight, hessian, start, grid=grid, sweeps=50)
    assert end.changes[-1] == 0
    assert len(end.changes) < 50
    assert coordinate_descent(weight, hessian, end.values, grid=grid, route=Route(5)).changes == (0,)
    assert greedy_descent(weight, hessian, end.values, grid=grid, sweeps=5).changes == (0,)


def test_a_sweep_makes_at_most_as_many_changes_of_a_row_as_there_are_columns() -> None:
    weight, hessian = problem(2, 3)
    grid = frozen("int4-asym-g8", weight)
    far = round_rows(grid, -weight, 0)
    one, two, end = (greedy_descent(weight, hessian, far, grid=grid, sweeps=k) for k in (1, 2, 50))
    assert one.changes == (3 * SIZE,)
    assert two.changes == end.changes[:2]
    assert max(end.changes) == 3 * SIZE
    assert end.changes[-1] == 0
    losses = [float(row_losses(weight - found.values, hessian).sum()) for found in (one, two, end)]
    assert losses[0] > losses[1] > losses[2]


def test_rows_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(5, 8)
    grid = frozen("nvfp4 beside int4-asym", weight)
    start = round_rows(grid, weight, 0)
    whole = greedy_descent(weight, hessian, start, grid=grid, sweeps=3)
    monkeypatch.setattr(module, "_ELEMENTS_AT_ONCE", 3 * SIZE)
    assert torch.equal(greedy_descent(weight, hessian, start, grid=grid, sweeps=3).values, whole.values)
    monkeypatch.setattr(module, "_STEPS_BETWEEN_LOOKS", 1)
    parts = greedy_descent(weight, hessian, start, grid=grid, sweeps=3)
    assert torch.equal(parts.values, whole.values)
    assert parts.changes == whole.changes
    alone = frozen("nvfp4 beside int4-asym", weight[2:3])
    of_one = greedy_descent(weight[2:3], hessian, start[2:3], grid=alone, sweeps=3)
    assert torch.equal(of_one.values, whole.values[2:3])


def test_columns_without_input_and_entries_that_are_kept_stay_and_nothing_given_changes() -> None:
    weight, hessian = problem(7, 4)
    hessian = without_some_inputs(hessian)
    grid = frozen("int4", weight)
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    start = torch.where(kept, weight + 0.01, round_rows(grid, 0.5 * weight, 0))
    before = weight.clone(), hessian.clone(), start.clone()
    found = greedy_descent(weight, hessian, start, grid=grid, sweeps=4, kept=kept)
    assert torch.equal(found.values[:, [3, 7, 20]], start[:, [3, 7, 20]])
    assert torch.equal(found.values[kept], start[kept])
    assert found.changes[0] > 0
    assert bool(torch.isfinite(found.values).all())
    assert all(torch.equal(one, other) for one, other in zip(before, (weight, hessian, start), strict=True))


def test_parts_that_do_not_fit_are_refused() -> None:
    weight, hessian = problem(8)
    grid = frozen("int4", weight)
    with pytest.raises((ShapeError, TypeCheckError), match=r"do not fit each other|hessian"):
        greedy_descent(weight, hessian[1:, 1:], weight, grid=grid, sweeps=1)
    with pytest.raises(ShapeError, match=r"columns of the grid  64"):
        greedy_descent(weight, hessian, weight, grid=[*grid, *grid], sweeps=1)
