"""Cyclic coordinate descent: change one column of codes at a time to the best there is while all others stay.

Columns of the weight are rows here, as in GPTQ. The slopes of a block of columns are one product with the errors as
they are, so that nothing accumulates from block to block; within the block each change updates those still to come.

References:
    Behdin et al. 2023, QuantEase, arXiv:2309.01885, algorithm 1.
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
            Of a sweep without rounding nearly all do.
    """

    values: Float[Tensor, "out in"]
    changes: tuple[int, ...]


@dataclass(frozen=True)
class Route:
    """Which columns are visited when.

    Attributes:
        sweeps: How often to go through all columns, at most; a sweep that changes nothing is the last, unless some are
            without rounding.
        order: Columns in the order of the visits; None goes from left to right.
        relax_every: Leave the rounding out in each sweep with a number that this divides, but in the last; 0 for none.
    """

    sweeps: int
    order: Sequence[int] | None = None
    relax_every: int = 0

    def relaxes(self, sweep: int) -> bool:
        """Say whether a sweep, counted from 1, is without rounding."""
        return self.relax_every > 0 and 0 < sweep < self.sweeps and sweep % self.relax_every == 0


def coordinate_descent(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    start: Float[Tensor, "out in"],
    *,
    grid: Sequence[FrozenColumns],
    route: Route,
    block_size: int = 128,
    kept: Bool[Tensor, "out in"] | None = None,
) -> DescentResult:
    """Lower ``tr(E H Eᵀ)`` with ``E = W - Q``, one column of ``Q`` at a time.

    With all other columns kept, the loss of a row is a parabola in ``q_j`` with its minimum at
    ``u_j = q_j + (E H)_j / H_jj``, so the value of the grid nearest to ``u_j`` is the best there is. No change raises
    the loss. Columns whose Hessian diagonal is not positive stay as they are.

    Sweeps without rounding leave each value at ``u_j``, off the grid, and the sweep behind rounds all of them, whatever
    that does to the loss. So each row keeps the best of its values that were on the grid, the start among them.

    Args:
        weight: What is approximated, ``W``. Not modified.
        hessian: Symmetric and positive semidefinite ``H``. Not modified.
        start: Values of the grid to start from. Not modified.
        grid: Rounds each column, from left to right.
        route: Which columns are visited when.
        block_size: Columns per product. Changes speed, never the result (beyond float rounding).
        kept: Entries that stay as they are, which need not be of the grid; None for none.

    Returns:
        The values, and what happened.

    Raises:
        ShapeError: The parts do not fit each other.

    References:
        Behdin et al. 2023, QuantEase, arXiv:2309.01885.
    """
    check_parts(weight, hessian, start, grid)
    hessian, rounders = hessian.to(weight.dtype), column_rounders(grid)
    live = (hessian.diagonal() > 0).tolist()
    visits = [col for col in (range(len(live)) if route.order is None else route.order) if live[col]]
    blocks = [visits[first : first + block_size] for first in range(0, len(visits), block_size)]
    of_blocks = [[rounders[col] for col in block] for block in blocks]
    values = start.to(weight.dtype).T.contiguous()
    errors = weight.detach().T - values
    free = torch.ones_like(values, dtype=torch.bool) if kept is None else ~kept.T
    best, losses = values, errors.new_zeros(())
    if route.relax_every:
        best, losses = values.clone(), _losses(errors, hessian)
    changes: list[int] = []
    while len(changes) < route.sweeps and (not changes or changes[-1] or route.relax_every):
        sweep = len(changes) + 1
        relaxed, anyway = route.relaxes(sweep), route.relaxes(sweep - 1)
        changed = [
            _descend(values, errors, hessian, free, block, None if relaxed else own, anyway=anyway)
            for block, own in zip(blocks, of_blocks, strict=True)
        ]
        changes.append(sum(int(count) for count in changed))
        if route.relax_every and not relaxed:
            reached = _losses(errors, hessian)
            best, losses = torch.where(reached < losses, values, best), torch.minimum(reached, losses)
    return DescentResult(best.T.contiguous(), tuple(changes))


def check_parts(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "inner inner"],
    start: Float[Tensor, "rows columns"],
    grid: Sequence[FrozenColumns],
) -> None:
    """Refuse parts that do not fit each other.

    Raises:
        ShapeError: Says their shapes.
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


def is_nearer(
    nearest: Float[Tensor, "*shape"], now: Float[Tensor, "*shape"], best: Float[Tensor, "*shape"]
) -> Bool[Tensor, "*shape"]:
    """Say which values are nearer to the optimum than those of now, by more than the noise of float."""
    return (nearest - best).abs_() < (now - best).abs_().mul_(1 - _NOISE * torch.finfo(best.dtype).eps)


def _losses(errors: Float[Tensor, "in out"], hessian: Float[Tensor, "in in"]) -> Float[Tensor, " out"]:
    """Return the loss of each row, which is a column here."""
    return (hessian @ errors).mul_(errors).sum(0)


def _descend(
    values: Float[Tensor, "in out"],
    errors: Float[Tensor, "in out"],
    hessian: Float[Tensor, "in in"],
    free: Bool[Tensor, "in out"],
    block: Sequence[int],
    rounders: Sequence[RoundColumn] | None,
    *,
    anyway: bool,
) -> Int[Tensor, ""]:
    """Visit a block of columns once; update values and errors in place, and return how many values changed.

    Without ``rounders`` values go to the optimum; with them to the nearest to that if it gains, or ``anyway``.
    """
    visited = torch.tensor(block, device=hessian.device)
    across = hessian.index_select(0, visited)
    within = across.index_select(1, visited)
    slopes, columns = across @ errors, values.index_select(0, visited)
    old, pivots = columns.clone(), within.diagonal()
    for place, column in enumerate(columns.unbind()):
        best = column + slopes[place] / pivots[place]
        nearest = best if rounders is None else rounders[place](best)
        moves = free[block[place]]
        if rounders is not None and not anyway:
            moves = moves & is_nearer(nearest, column, best)
        change = torch.where(moves, nearest - column, 0.0)
        column.copy_(torch.where(moves, nearest, column))
        slopes[place + 1 :].addr_(within[place + 1 :, place], change, alpha=-1)
    values.index_copy_(0, visited, columns)
    errors.index_add_(0, visited, old - columns)
    return (columns != old).sum()
