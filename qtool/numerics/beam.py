"""Beam search over GPTQ's triangular system: keep several roundings of a row alive instead of one.

With ``U`` the factor of the inverse Hessian, the loss of a row is ``Σ_j ((w_j − q_j) / U_jj)²``, and ``w_j`` depends
on the columns before ``j`` only. So a partial row has a loss already, and what is to come adds to it.

References:
    arXiv:2602.05902: K-best search.
    Chen et al. 2025, arXiv:2507.18553: with one candidate it is GPTQ, and Babai's nearest plane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qtool.errors import ShapeError
from qtool.numerics.frozen_grid import FrozenColumns
from qtool.numerics.groups import each_parameter
from qtool.numerics.levels import second_nearest
from qtool.numerics.triangular import InverseFactor
from qtool.scheme import GroupParameters

_BYTES_AT_ONCE = 1 << 27


@dataclass(frozen=True)
class BranchingColumns:
    """Columns whose levels are known.

    Attributes:
        frozen: Rounds them.
        levels: ``levels(parameters [out])`` returns the values of the grid in ascending order, ``[out, levels]``.
    """

    frozen: FrozenColumns
    levels: Callable[[GroupParameters], Tensor]


def beam_round(
    weight: Float[Tensor, "out in"],
    factor: InverseFactor,
    *,
    grid: Sequence[BranchingColumns],
    beams: int,
    block_size: int = 32,
) -> Float[Tensor, "out in"]:
    """Choose values that approximately minimize ``tr(E (H + λ I) Eᵀ)`` with ``E = W - Q``.

    Column after column, every partial row branches to the two values of the grid that are nearest to its ``w_j``, and
    of all branches of a row the ``beams`` with the least loss so far stay.

    Args:
        weight: ``W``. Not modified.
        factor: Of the Hessian; its order is that of the columns.
        grid: Of the columns in storage order, from left to right.
        beams: Partial rows to keep.
        block_size: Columns per lazy update. Changes speed, never the result (beyond float rounding).

    Returns:
        For each row the values that lost least.

    Raises:
        ShapeError: The parts do not fit each other.
    """
    n_out, n_in = weight.shape
    if len(factor.upper) != n_in or sum(part.frozen.columns for part in grid) != n_in:
        raise ShapeError(
            "weight, factor and grid do not fit each other",
            facts=(
                ("weight", tuple(weight.shape)),
                ("factor", tuple(factor.upper.shape)),
                ("columns of the grid", sum(part.frozen.columns for part in grid)),
            ),
        )
    rows = max(1, _BYTES_AT_ONCE // (n_in * beams * weight.element_size()))
    feedback = factor.feedback()
    found = [
        _search(weight[start : start + rows].T, factor, feedback, _rows(grid, start, start + rows), beams, block_size)
        for start in range(0, n_out, rows)
    ]
    return torch.cat(found, dim=1).T.contiguous()


def _search(
    columns: Float[Tensor, "in rows"],
    factor: InverseFactor,
    feedback: Float[Tensor, "in in"],
    grid: Sequence[BranchingColumns],
    beams: int,
    block_size: int,
) -> Float[Tensor, "in rows"]:
    """Search the rows of a chunk; columns and what is returned are in storage order."""
    n_in, rows = columns.shape
    where = [(part, group) for part in grid for group in _group_of(part.frozen)]
    if factor.order is not None:
        columns = columns.index_select(0, factor.order)
        where = [where[col] for col in factor.order.tolist()]
    later = columns.unsqueeze(-1).repeat(1, 1, beams)
    # All candidates but one are worth nothing until branches take their place.
    scores = columns.new_full((rows, beams), torch.inf)
    scores[:, 0] = 0.0
    trail: list[tuple[Tensor, Tensor]] = []
    for start in range(0, n_in, block_size):
        stop = min(start + block_size, n_in)
        now = later[start:stop]
        chosen, made = torch.zeros_like(now), torch.zeros_like(now)
        origins = torch.arange(beams, device=columns.device).repeat(rows, 1)
        for place in range(stop - start):
            col = start + place
            branches, residuals = _branches(now[place], *where[col])
            both = scores.repeat(1, 2) + (residuals / factor.upper[col, col]).square()
            # Stable, so that of branches that are equally good the nearest value is taken.
            ranked, picked = both.sort(dim=1, stable=True)
            scores, picked = ranked[:, :beams], picked[:, :beams]
            parents = picked % beams
            for held in (chosen[:place], made[:place], now[place + 1 :]):
                held.copy_(_followed(held, parents))
            origins = origins.gather(1, parents)
            chosen[place], made[place] = branches.gather(1, picked), residuals.gather(1, picked)
            now[place + 1 :].sub_(feedback[col, col + 1 : stop].view(-1, 1, 1) * made[place])
        trail.append((chosen, origins))
        rest = _followed(later[stop:], origins)
        made_up = feedback[start:stop, stop:].T @ made.view(stop - start, -1)
        later[stop:] = rest - made_up.view_as(rest)
    values = _traced(trail)
    return values if factor.order is None else values.index_select(0, torch.argsort(factor.order))


def _branches(
    values: Float[Tensor, "rows beams"], part: BranchingColumns, group: int
) -> tuple[Float[Tensor, "rows branches"], Float[Tensor, "rows branches"]]:
    """Return the nearest level of each value and then the second nearest of each, and what is left of the values."""
    parameters = each_parameter(part.frozen.parameters, lambda own: own[:, group])
    nearest = part.frozen.round(values, parameters)
    second = second_nearest(part.levels(parameters).to(values.dtype), values, nearest)
    return torch.cat([nearest, second], dim=1), torch.cat([values - nearest, values - second], dim=1)


def _followed(held: Float[Tensor, "n rows beams"], parents: Int[Tensor, "rows beams"]) -> Float[Tensor, "n rows beams"]:
    """Return what candidates inherit from those that they branched from."""
    return held.gather(2, parents.expand_as(held))


def _traced(trail: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, "in rows"]:
    """Follow the best candidate of each row, which is the first, back through the blocks."""
    picked = torch.zeros_like(trail[-1][1][:, :1])
    blocks = []
    for chosen, origins in reversed(trail):
        blocks.append(chosen.gather(2, picked.expand(len(chosen), -1, -1)).squeeze(-1))
        picked = origins.gather(1, picked)
    return torch.cat(blocks[::-1])


def _group_of(part: FrozenColumns) -> list[int]:
    return [col // part.group_size for col in range(part.columns)]


def _rows(grid: Sequence[BranchingColumns], start: int, stop: int) -> list[BranchingColumns]:
    """Return the grid of some rows."""
    parts = []
    for part in grid:
        parameters = each_parameter(part.frozen.parameters, lambda own: own[start:stop])
        parts.append(replace(part, frozen=replace(part.frozen, parameters=parameters)))
    return parts
