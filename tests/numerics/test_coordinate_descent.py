from __future__ import annotations

import itertools

import pytest
import torch
from jaxtyping import TypeCheckError

from qtool.builtin.formats.integer import Int4
from qtool.errors import ShapeError
from qtool.numerics.coordinate_descent import Route, coordinate_descent
from qtool.numerics.frozen_grid import FrozenColumns, column_rounders, round_rows
from qtool.scheme import GroupParameters
from tests.numerics.frozen_cases import CASES, SIZE, frozen, levels, problem, row_losses, start_of, without_some_inputs
from tests.oracles.coordinate_descent import coordinate_descent_oracle, relaxed_descent_oracle


@pytest.mark.parametrize("case", CASES)
def test_columns_and_rows_round_to_the_nearest_value_of_their_own_grid(case: str) -> None:
    weight, _ = problem(4)
    grid = frozen(case, weight)
    far = 3 * weight
    rows, rounders = round_rows(grid, far, 0), column_rounders(grid)
    for col, allowed in enumerate(levels(case, grid)):
        nearest = (far[:, col, None] - allowed).abs().amin(1)
        torch.testing.assert_close((far[:, col] - rows[:, col]).abs(), nearest, rtol=0, atol=1e-6)
        assert torch.equal(rounders[col](far[:, col]), rows[:, col])
    assert torch.equal(round_rows(grid, far[1:2], 1), rows[1:2])


@pytest.mark.parametrize("start", ["nearest", "gptq"])
@pytest.mark.parametrize("case", CASES)
def test_equals_trying_every_value(case: str, start: str) -> None:
    weight, hessian = problem(1, 2)
    grid = frozen(case, weight)
    values = start_of(start, case, weight, hessian, grid)
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0)).tolist()
    expected = coordinate_descent_oracle(weight, hessian, values, levels=levels(case, grid), order=order, sweeps=2)
    for sweeps, after in enumerate(expected, start=1):
        found = coordinate_descent(weight, hessian, values, grid=grid, route=Route(sweeps, order), block_size=9)
        torch.testing.assert_close(found.values, after, rtol=1e-6, atol=1e-7)
    if start == "nearest":
        assert found.changes[0] > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_no_sweep_raises_the_loss_of_a_row_and_the_last_changes_nothing(case: str, dtype: torch.dtype) -> None:
    weight, hessian = problem(2, 8)
    weight = weight.to(dtype)
    grid = frozen(case, weight)
    start = round_rows(grid, weight, 0)
    reached = [
        start,
        *(coordinate_descent(weight, hessian, start, grid=grid, route=Route(k)).values for k in (1, 2, 3, 50)),
    ]
    losses = [row_losses(weight - values, hessian) for values in reached]
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before).all())
    assert float(losses[1].sum()) < 0.9 * float(losses[0].sum())
    assert float(losses[2].sum()) < float(losses[1].sum())
    end = coordinate_descent(weight, hessian, start, grid=grid, route=Route(50))
    assert end.changes[-1] == 0
    assert len(end.changes) < 50
    again = coordinate_descent(weight, hessian, end.values, grid=grid, route=Route(5))
    assert again.changes == (0,)
    assert torch.equal(again.values, end.values)


def test_what_it_counts_are_the_entries_that_a_sweep_changes() -> None:
    weight, hessian = problem(3, 8)
    grid = frozen("nvfp4", weight)
    start = round_rows(grid, weight, 0)
    one, two = (coordinate_descent(weight, hessian, start, grid=grid, route=Route(k)) for k in (1, 2))
    assert two.changes == (*one.changes, int((two.values != one.values).sum()))
    assert one.changes == (int((one.values != start).sum()),)


@pytest.mark.parametrize("case", CASES)
def test_the_block_size_and_other_rows_do_not_matter(case: str) -> None:
    weight, hessian = problem(5, 8)
    grid = frozen(case, weight)
    start = round_rows(grid, weight, 0)
    order = torch.argsort(hessian.diagonal(), descending=True).tolist()
    found = [
        coordinate_descent(weight, hessian, start, grid=grid, route=Route(3, order), block_size=size).values
        for size in (1, 5, SIZE, 128)
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])
    alone = frozen(case, weight[2:3])
    of_one = coordinate_descent(weight[2:3], hessian, start[2:3], grid=alone, route=Route(3, order))
    assert torch.equal(of_one.values, found[0][2:3])
    natural = coordinate_descent(weight, hessian, start, grid=grid, route=Route(3)).values
    from_left = coordinate_descent(weight, hessian, start, grid=grid, route=Route(3, range(SIZE))).values
    assert torch.equal(natural, from_left)
    assert not torch.equal(natural, found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_a_diagonal_hessian_leaves_nearest_rounding_as_it_is(case: str, dtype: torch.dtype) -> None:
    weight, hessian = problem(6, 64)
    weight = weight.to(dtype)
    grid = frozen(case, weight)
    start = round_rows(grid, weight, 0)
    found = coordinate_descent(weight, torch.diag(hessian.diagonal()), start, grid=grid, route=Route(2))
    assert found.changes == (0,)
    assert torch.equal(found.values, start)


def test_weights_between_two_values_stay_on_the_side_on_which_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    below = torch.randint(-8, 7, (64, SIZE), generator=generator)
    scale = 0.05 + torch.rand(64, 1, generator=generator)
    fmt, weight = Int4(), (below + 0.5) * scale
    start = (below + torch.randint(0, 2, (64, SIZE), generator=generator)) * scale
    grid = [FrozenColumns(SIZE, SIZE, GroupParameters(scale), fmt.round)]
    hessian = torch.diag(0.1 + torch.rand(SIZE, generator=generator))
    assert not torch.equal(round_rows(grid, weight, 0), start)
    for route in (Route(2), Route(1, relax_every=2)):
        assert coordinate_descent(weight, hessian, start, grid=grid, route=route).changes == (0,)
    moved = coordinate_descent(weight + 1e-3 * scale, hessian, start, grid=grid, route=Route(2))
    assert torch.equal(moved.values, (below + 1) * scale)


def test_columns_without_input_stay_and_nothing_given_changes() -> None:
    weight, hessian = problem(7, 4)
    hessian = without_some_inputs(hessian)
    grid = frozen("int4", weight)
    start = round_rows(grid, 0.5 * weight, 0)
    before = weight.clone(), hessian.clone(), start.clone()
    found = coordinate_descent(weight, hessian, start, grid=grid, route=Route(4))
    assert torch.equal(found.values[:, [3, 7, 20]], start[:, [3, 7, 20]])
    assert found.changes[0] > 0
    assert bool(torch.isfinite(found.values).all())
    assert all(torch.equal(one, other) for one, other in zip(before, (weight, hessian, start), strict=True))


def test_parts_that_do_not_fit_are_refused() -> None:
    weight, hessian = problem(8)
    grid = frozen("int4", weight)
    with pytest.raises((ShapeError, TypeCheckError), match=r"do not fit each other|hessian"):
        coordinate_descent(weight, hessian[1:, 1:], weight, grid=grid, route=Route(1))
    with pytest.raises(ShapeError, match=r"columns of the grid  64"):
        coordinate_descent(weight, hessian, weight, grid=[*grid, *grid], route=Route(1))


@pytest.mark.parametrize("start", ["nearest", "gptq"])
@pytest.mark.parametrize("case", CASES)
def test_sweeps_without_rounding_equal_trying_every_value(case: str, start: str) -> None:
    weight, hessian = problem(1, 2)
    grid = frozen(case, weight)
    values = start_of(start, case, weight, hessian, grid)
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0)).tolist()

    best, left = relaxed_descent_oracle(
        weight, hessian, values, levels=levels(case, grid), order=order, sweeps=5, relax_every=2
    )
    found = coordinate_descent(weight, hessian, values, grid=grid, route=Route(5, order, 2), block_size=9)
    torch.testing.assert_close(found.values, best, rtol=1e-6, atol=1e-7)
    assert len(found.changes) == 5
    assert found.changes[1] > 0.9 * weight.numel()
    assert any(bool((row_losses(weight - one, hessian) > row_losses(weight - best, hessian)).any()) for one in left)


def test_sweeps_without_rounding_find_what_single_changes_do_not_and_never_lose() -> None:
    for seed in range(4):
        weight, hessian = problem(seed, 64)
        grid = frozen("int2-g16-clipped", weight)
        start = coordinate_descent(weight, hessian, round_rows(grid, weight, 0), grid=grid, route=Route(50)).values
        found = coordinate_descent(weight, hessian, start, grid=grid, route=Route(12, relax_every=3))
        before, after = (row_losses(weight - values, hessian) for values in (start, found.values))
        assert bool((after <= before).all())
        assert float(after.sum()) < 0.97 * float(before.sum())
        assert torch.equal(round_rows(grid, found.values, 0), found.values)


def test_the_last_sweep_rounds_and_entries_that_are_kept_stay() -> None:
    weight, hessian = problem(9, 8)
    grid = frozen("int4", weight)
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    start = torch.where(kept, weight + 0.01, round_rows(grid, weight, 0))
    found = coordinate_descent(weight, hessian, start, grid=grid, route=Route(4, relax_every=4), kept=kept)
    plain = coordinate_descent(weight, hessian, start, grid=grid, route=Route(4), kept=kept)
    torch.testing.assert_close(found.values, plain.values)
    found = coordinate_descent(weight, hessian, start, grid=grid, route=Route(5, relax_every=2), kept=kept)
    assert torch.equal(found.values[kept], start[kept])
    assert not torch.equal(found.values, plain.values)
    torch.testing.assert_close(round_rows(grid, found.values, 0)[~kept], found.values[~kept])
