"""Cyclic coordinate descent: change one column of codes at a time to the best there is while all others stay.

Columns of the weight are rows here, as in GPTQ. The slopes of a block of columns are one product with the errors as
they are, so that nothing accumulates from block to block; within the block each change updates those still to come.

References:
    Behdin et al. 2023, QuantEase, arXiv:2309.01885, algorithm 1.
    Nair and Suggala 2024, CDQuant, arXiv:2406.17542.
    Chee et al. 2023, QuIP, arXiv:2307.13304: greedy updates, which are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qtool.errors import ShapeError
from qtool.numerics.frozen_grid import FrozenColumns, RoundColumn, column_rounders

# A change has to be nearer to the optimum than what is there by this many units in the last place of 1: float rounding
# of the slopes neither raises the loss nor moves a weight between two codes that are equally good.
_NOISE = 1024


@dataclass(frozen=True)
class DescentResult:
    """Where coordinate descent arrived.

    Attributes:
        values: Values of the grid.
        changes: How many entries changed in each sweep that was done; the last is 0 where nothing was left to gain.
    """

    values: Float[Tensor, "out in"]
    changes: tuple[int, ...]


def coordinate_descent(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    start: Float[Tensor, "out in"],
    *,
    grid: Sequence[FrozenColumns],
    sweeps: int,
    order: Sequence[int] | None = None,
    block_size: int = 128,
    kept: Bool[Tensor, "out in"] | None = None,
) -> DescentResult:
    """Lower ``tr(E H Eᵀ)`` with ``E = W - Q``, one column of ``Q`` at a time.

    With all other columns kept, the loss of a row is a parabola in ``q_j`` with its minimum at
    ``u_j = q_j + (E H)_j / H_jj``, so the value of the grid nearest to ``u_j`` is the best there is. No change raises
    the loss. Columns whose Hessian diagonal is not positive stay as they are.

    Args:
        weight: What is approximated, ``W``. Not modified.
        hessian: Symmetric and positive semidefinite ``H``. Not modified.
        start: Values of the grid to start from. Not modified.
        grid: Rounds each column, from left to right.
        sweeps: How often to go through all columns, at most; a sweep that changes nothing is the last.
        order: Columns in the order of the visits; None goes from left to right.
        block_size: Columns per product. Changes speed, never the result (beyond float rounding).
        kept: Entries that stay as they are, which need not be of the grid; None for none.

    Returns:
        The values, and what happened.

    Raises:
        ShapeError: The parts do not fit each other.

    References:
        Behdin et al. 2023, QuantEase, arXiv:2309.01885.
    """
    n_in = weight.shape[1]
    if hessian.shape != (n_in, n_in) or start.shape != weight.shape or sum(part.columns for part in grid) != n_in:
        raise ShapeError(
            "weight, Hessian, start and grid do not fit each other",
            facts=(
                ("weight", tuple(weight.shape)),
                ("hessian", tuple(hessian.shape)),
                ("start", tuple(start.shape)),
                ("columns of the grid", sum(part.columns for part in grid)),
            ),
        )
    hessian, rounders = hessian.to(weight.dtype), column_rounders(grid)
    live = (hessian.diagonal() > 0).tolist()
    visits = [col for col in (range(n_in) if order is None else order) if live[col]]
    values = start.to(weight.dtype).T.contiguous()
    errors = weight.detach().T - values
    free = torch.ones_like(values, dtype=torch.bool) if kept is None else ~kept.T
    changes: list[int] = []
    while len(changes) < sweeps and (not changes or changes[-1]):
        blocks = [visits[first : first + block_size] for first in range(0, len(visits), block_size)]
        changed = [_descend(values, errors, hessian, free, block, [rounders[col] for col in block]) for block in blocks]
        changes.append(sum(int(count) for count in changed))
    return DescentResult(values.T.contiguous(), tuple(changes))


def _descend(
    values: Float[Tensor, "in out"],
    errors: Float[Tensor, "in out"],
    hessian: Float[Tensor, "in in"],
    free: Bool[Tensor, "in out"],
    block: Sequence[int],
    rounders: Sequence[RoundColumn],
) -> Int[Tensor, ""]:
    """Visit a block of columns once; update values and errors in place, and return how many values changed."""
    visited = torch.tensor(block, device=hessian.device)
    across = hessian.index_select(0, visited)
    within = across.index_select(1, visited)
    slopes, columns = across @ errors, values.index_select(0, visited)
    old, pivots = columns.clone(), within.diagonal()
    nearer = 1 - _NOISE * torch.finfo(values.dtype).eps
    for place, (column, rounder) in enumerate(zip(columns.unbind(), rounders, strict=True)):
        best = column + slopes[place] / pivots[place]
        nearest = rounder(best)
        better = (nearest - best).abs_() < (column - best).abs_().mul_(nearer)
        better &= free[block[place]]
        change = torch.where(better, nearest - column, 0.0)
        column.copy_(torch.where(better, nearest, column))
        slopes[place + 1 :].addr_(within[place + 1 :, place], change, alpha=-1)
    values.index_copy_(0, visited, columns)
    errors.index_add_(0, visited, old - columns)
    return (columns != old).sum()
