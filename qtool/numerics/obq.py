"""Optimal brain quantization: each row rounds the weight next that costs least, and the others make up for it.

A row has an order of its own, so it has an inverse of its own too: time and memory grow with the rows as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qtool.errors import ShapeError
from qtool.numerics.frozen_grid import FrozenColumns, round_rows

_BYTES_AT_ONCE = 1 << 26
_BEYOND = 2.0**20


def obq_round(
    weight: Float[Tensor, "out in"],
    inverse: Float[Tensor, "in in"],
    *,
    grid: Sequence[FrozenColumns],
    order: Sequence[int] | None = None,
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"]]:
    """Choose values that approximately minimize ``tr(E H Eᵀ)`` with ``E = W - Q``.

    Of the weights of a row that are left, the one with the least ``(w_j - Q(w_j))² / G_jj`` is rounded,
    ``w -= (w_j - q_j) G_j / G_jj``, and eliminated, ``G -= G_j G_jᵀ / G_jj``; ``G`` starts as ``H⁻¹``. Before all
    others come weights that were driven more than half a step off the ends of the grid, the farthest first.

    Args:
        weight: Full-precision weight ``W``. Not modified.
        inverse: ``H⁻¹``, symmetric and positive definite. Not modified.
        grid: Rounds to values, from left to right.
        order: Columns in the order of rounding for every row, which makes it GPTQ; None for the greedy order.

    Returns:
        The values in float64, and of each row ``Σ (w_j - q_j)² / G_jj``, the loss ``diag(E H Eᵀ)``.

    Raises:
        ShapeError: The inverse does not fit the weight.

    References:
        Frantar and Alistarh 2022, Optimal Brain Compression, arXiv:2208.11580, section 5, with its rule for
        outliers.
    """
    n_out, n_in = weight.shape
    if inverse.shape != (n_in, n_in):
        facts = (("weight", tuple(weight.shape)), ("inverse", tuple(inverse.shape)))
        raise ShapeError("the inverse does not fit the weight", facts=facts)
    rows = max(1, _BYTES_AT_ONCE // (8 * n_in * n_in))
    parts = [
        _rounded(weight[start : start + rows].double(), inverse.double(), grid, order, start)
        for start in range(0, n_out, rows)
    ]
    return torch.cat([values for values, _ in parts]), torch.cat([loss for _, loss in parts])


def _rounded(
    current: Float[Tensor, "rows in"],
    inverse: Float[Tensor, "in in"],
    grid: Sequence[FrozenColumns],
    order: Sequence[int] | None,
    start: int,
) -> tuple[Float[Tensor, "rows in"], Float[Tensor, " rows"]]:
    """Round neighbouring rows, the first of which is row ``start`` of the weight."""
    current, rows = current.clone(), torch.arange(len(current), device=current.device)
    left = torch.ones_like(current, dtype=torch.bool)
    values, loss = torch.zeros_like(current), current.new_zeros(len(current))
    inverses = inverse.repeat(len(current), 1, 1)
    for step in range(current.shape[1]):
        rounded = round_rows(grid, current, start)
        residuals, pivots = current - rounded, inverses.diagonal(dim1=1, dim2=2)
        if order is None:
            outside = _outside(grid, current, residuals, start)
            cost = torch.where(outside, -residuals.abs(), residuals.square() / pivots)
            cols = cost.masked_fill_(~left, torch.inf).argmin(1)
        else:
            cols = torch.full_like(rows, order[step])
        values[rows, cols] = rounded[rows, cols]
        residual, pivot, spread = residuals[rows, cols], pivots[rows, cols], inverses[rows, cols]
        loss += residual.square() / pivot
        current -= (residual / pivot).unsqueeze(1) * spread
        inverses.baddbmm_((spread / pivot.unsqueeze(1)).unsqueeze(2), spread.unsqueeze(1), alpha=-1)
        left[rows, cols] = False
    return values, loss


def _outside(
    grid: Sequence[FrozenColumns],
    current: Float[Tensor, "rows in"],
    residuals: Float[Tensor, "rows in"],
    start: int,
) -> Bool[Tensor, "rows in"]:
    """Say which weights are beyond an end of the grid by more than half of its last step.

    The mirror image of such a weight, as far inside, is not nearest to the end.
    """
    reach = _BEYOND * (current.abs().amax() + residuals.abs().amax())
    ends = round_rows(grid, torch.where(residuals < 0, -reach, reach), start)
    over = (current - ends) * residuals.sign()
    return (over > 0) & (round_rows(grid, 2 * ends - current, start) != ends)
