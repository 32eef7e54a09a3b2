"""Greedy coordinate descent: in each row the one code changes that lowers the row's loss most, again and again.

References:
    Nair and Suggala 2024, CDQuant, arXiv:2406.17542.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qtool.numerics.coordinate_descent import DescentResult, check_parts, is_nearer
from qtool.numerics.frozen_grid import FrozenColumns, round_rows

_ELEMENTS_AT_ONCE = 1 << 20
_STEPS_BETWEEN_LOOKS = 32
"""Whether a row still gains is asked this seldom, since a device is waited for; steps without gain change nothing."""


def greedy_descent(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    start: Float[Tensor, "out in"],
    *,
    grid: Sequence[FrozenColumns],
    sweeps: int,
    kept: Bool[Tensor, "out in"] | None = None,
) -> DescentResult:
    """Lower ``tr(E H Eᵀ)`` with ``E = W - Q``, one entry of each row of ``Q`` at a time.

    With ``u_j = q_j + (E H)_j / H_jj`` and ``r_j`` the value of the grid nearest to it, putting ``r_j`` in place of
    ``q_j`` lowers the loss of the row by ``H_jj ((q_j - u_j)² - (r_j - u_j)²)``. The entry that gains most changes. A
    row ends where none gains: there no single code can be better. Columns whose Hessian diagonal is not positive stay.

    Args:
        weight: What is approximated, ``W``. Not modified.
        hessian: Symmetric and positive semidefinite ``H``. Not modified.
        start: Values of the grid to start from. Not modified.
        grid: Rounds each column, from left to right.
        sweeps: As many changes a row as there are columns, this often, at most.
        kept: Entries that stay as they are, which need not be of the grid; None for none.

    Returns:
        The values, and how many changes each sweep made.

    Raises:
        ShapeError: The parts do not fit each other.
    """
    check_parts(weight, hessian, start, grid)
    hessian, values = hessian.to(weight.dtype), start.to(weight.dtype).clone()
    diagonal = hessian.diagonal()
    free = (diagonal > 0).expand_as(values) if kept is None else (diagonal > 0) & ~kept
    pivots = torch.where(diagonal > 0, diagonal, 1.0)
    size = max(1, _ELEMENTS_AT_ONCE // len(hessian))
    made: list[int] = []
    while len(made) < sweeps and (not made or made[-1]):
        counts = []
        for first in range(0, len(values), size):
            rows = slice(first, first + size)
            slopes = (weight[rows] - values[rows]) @ hessian
            counts.append(_sweep(values[rows], slopes, hessian, pivots, free[rows], grid, first))
        made.append(sum(int(count) for count in counts))
    return DescentResult(values, tuple(made))


def _sweep(
    values: Float[Tensor, "rows in"],
    slopes: Float[Tensor, "rows in"],
    hessian: Float[Tensor, "in in"],
    pivots: Float[Tensor, " in"],
    free: Bool[Tensor, "rows in"],
    grid: Sequence[FrozenColumns],
    first: int,
) -> Int[Tensor, ""]:
    """Make as many changes a row as there are columns, in place, and return how many gained; slopes are used up."""
    made = torch.zeros((), dtype=torch.int64, device=values.device)
    for step in range(len(hessian)):
        best = values + slopes / pivots
        nearest = round_rows(grid, best, first)
        gains = ((values - best).square_() - (nearest - best).square_()).mul_(pivots)
        gains = torch.where(free & is_nearer(nearest, values, best), gains, 0.0)
        gain, place = gains.max(dim=-1, keepdim=True)
        gained = gain > 0
        old, new = values.gather(-1, place), nearest.gather(-1, place)
        change = torch.where(gained, new - old, 0.0)
        values.scatter_(-1, place, torch.where(gained, new, old))
        slopes -= change * hessian[place.squeeze(-1)]
        made += gained.sum()
        if step % _STEPS_BETWEEN_LOOKS == 0 and not bool(gained.any()):
            break
    return made
