from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.errors import ShapeError
from qtool.numerics import beam as module
from qtool.numerics.beam import BranchingColumns, beam_round
from qtool.numerics.frozen_grid import FrozenColumns
from qtool.numerics.gptq import factorize_visits, gptq_round
from qtool.numerics.levels import level_codes
from qtool.numerics.triangular import InverseFactor
from qtool.scheme import Format
from tests.numerics.frozen_cases import CASES, decoded, frozen, levels, problem, row_losses, to_be_fitted
from tests.oracles.gptq import Order, visiting_order
from tests.oracles.triangular import beam_oracle


def branching_of(part: FrozenColumns, fmt: Format) -> BranchingColumns:
    return BranchingColumns(part, level_codes(fmt), fmt.decode)


def branching(case: str, weight: Tensor) -> list[BranchingColumns]:
    pairs = zip(frozen(case, weight), CASES[case], strict=True)
    return [branching_of(part, fmt) for part, (fmt, *_) in pairs]


def factor_of(case: str, hessian: Tensor, order: Order) -> InverseFactor:
    return factorize_visits(hessian, to_be_fitted(case), dampening_frac=0.0, order=order)


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("case", CASES)
def test_one_candidate_is_gptq(case: str, order: Order) -> None:
    weight, hessian = problem(1, 6)
    factor = factor_of(case, hessian, order)
    solved = gptq_round(weight, hessian, grid=to_be_fitted(case), parameters="static", factor=factor)
    values = beam_round(weight, factor, grid=branching(case, weight), beams=1, block_size=12)
    torch.testing.assert_close(values, decoded(case, solved.codes, solved.parameters), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("beams", [2, 5])
@pytest.mark.parametrize("order", ["natural", "activation", "groups"])
@pytest.mark.parametrize("case", ["int4", "int2-g16-clipped", "nvfp4", "int3-g8 beside int8", "nvfp4 beside int4-asym"])
def test_equals_the_oracle(case: str, order: Order, beams: int) -> None:
    weight, hessian = problem(2, 3)
    factor, grid = factor_of(case, hessian, order), branching(case, weight)
    visits = factor.order.tolist() if factor.order is not None else list(range(32))
    if order != "groups":
        assert visits == visiting_order(hessian, order)
    values = beam_round(weight, factor, grid=grid, beams=beams, block_size=12)
    tables = levels(case, [part.frozen for part in grid])
    for row in range(3):
        expected, score = beam_oracle(
            weight[row], hessian, levels=[table[row] for table in tables], order=visits, beams=beams
        )
        torch.testing.assert_close(values[row], expected, rtol=1e-6, atol=1e-9)
        assert float(row_losses(weight - values, hessian)[row]) == pytest.approx(score, rel=1e-6)


def test_neither_the_block_size_nor_the_chunk_of_rows_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(3, 9)
    factor, grid = factor_of("int4-asym-g8", hessian, "activation"), branching("int4-asym-g8", weight)
    found = [beam_round(weight, factor, grid=grid, beams=4, block_size=size) for size in (1, 7, 32, 64)]
    monkeypatch.setattr(module, "_BYTES_AT_ONCE", 2 * 32 * 4 * 8)  # two rows at a time
    found.append(beam_round(weight, factor, grid=grid, beams=4))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_enough_candidates_find_the_best_of_all_pairs_of_neighbours() -> None:
    weight, hessian = problem(4, 5)
    weight, hessian = weight[:, :6], hessian[:6, :6]
    part = frozen("int4", weight.repeat(1, 6)[:, :32])[0]
    grid = [branching_of(replace(part, columns=6, group_size=6), CASES["int4"][0][0])]
    factor = InverseFactor(torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True), 0.0, wide=False)
    losses = [row_losses(weight - beam_round(weight, factor, grid=grid, beams=k), hessian) for k in (1, 2, 64)]
    assert float(losses[2].sum()) < float(losses[0].sum())
    assert bool((losses[2] <= losses[0] * (1 + 1e-9)).all())
    assert bool((losses[2] <= losses[1] * (1 + 1e-9)).all())


@pytest.mark.parametrize("case", ["int4", "nvfp4", "int2-g16-clipped"])
def test_wider_searches_lose_less_in_all(case: str) -> None:
    totals = torch.zeros(3)
    for seed in range(6):
        weight, hessian = problem(seed, 16)
        factor, grid = factor_of(case, hessian, "activation"), branching(case, weight)
        for at, beams in enumerate((1, 4, 16)):
            values = beam_round(weight, factor, grid=grid, beams=beams)
            totals[at] += float(row_losses(weight - values, hessian).sum())
    assert totals[1] < 0.95 * totals[0]
    assert totals[2] < totals[1]


def test_what_does_not_fit_is_refused() -> None:
    weight, hessian = problem(5)
    factor, grid = factor_of("int4", hessian, "natural"), branching("int4", weight)
    with pytest.raises(ShapeError, match=r"weight, factor and grid do not fit each other\n  weight +\(3, 31\)"):
        beam_round(weight[:, 1:], factor, grid=grid, beams=2)
