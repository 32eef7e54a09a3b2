from __future__ import annotations

import pytest
import torch

from qtool.numerics.frozen_grid import column_rounders
from qtool.numerics.gptq import gptq_round
from qtool.numerics.ldl import linear_feedback
from qtool.numerics.triangular import factorize_inverse
from tests.numerics.frozen_cases import CASES, SIZE, decoded, frozen, problem, row_losses, to_be_fitted
from tests.oracles.ldlq import unit_upper_ldl


def test_is_the_ldl_decomposition_of_the_hessian() -> None:
    _, hessian = problem(1)
    found = linear_feedback(factorize_inverse(hessian, 0.0).upper)
    feedback, pivots = unit_upper_ldl(hessian)
    torch.testing.assert_close(found.feedback, feedback, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.pivots, pivots, rtol=1e-9, atol=0)
    lower = feedback + torch.eye(SIZE)
    torch.testing.assert_close(lower @ torch.diag(found.pivots) @ lower.T, hessian)


@pytest.mark.parametrize("case", CASES)
def test_rounding_with_it_gives_the_codes_of_gptq(case: str) -> None:
    weight, hessian = problem(2, 4)
    grid = frozen(case, weight)
    solved = gptq_round(weight, hessian, grid=to_be_fitted(case), parameters="static")
    ldl, rounders = linear_feedback(solved.factor.upper), column_rounders(grid)
    values, made = torch.zeros_like(weight), torch.zeros_like(weight)
    for col in range(SIZE):
        target = weight[:, col] + (weight - values)[:, :col] @ ldl.feedback[:col, col]
        values[:, col] = rounders[col](target)
        made[:, col] = target - values[:, col]
    torch.testing.assert_close(values, decoded(case, solved.codes, solved.parameters), rtol=1e-6, atol=1e-9)
    loss = made.square() @ ldl.pivots
    torch.testing.assert_close(loss, solved.loss, rtol=1e-9, atol=0)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(SIZE)
    torch.testing.assert_close(loss, row_losses(weight - values, damped), rtol=1e-9, atol=0)


def test_the_fraction_is_one_without_correlations_and_falls_with_them() -> None:
    _, hessian = problem(3)
    diagonal = torch.diag(hessian.diagonal())
    assert linear_feedback(factorize_inverse(diagonal, 0.0).upper).trace_fraction() == pytest.approx(1.0)
    _, pivots = unit_upper_ldl(hessian)
    expected = float(pivots.sum() / hessian.trace())
    assert linear_feedback(factorize_inverse(hessian, 0.0).upper).trace_fraction() == pytest.approx(expected)
    assert expected < 0.6
