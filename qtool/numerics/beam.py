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
from functools import partial
from operator import itemgetter
from typing import TypeAlias

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from qtool.errors import ShapeError
from qtool.numerics.frozen_grid import FrozenColumns
from qtool.numerics.groups import each_parameter
from qtool.numerics.levels import second_nearest
from qtool.numerics.replay import pays, replayed_columns
from qtool.numerics.triangular import InverseFactor
from qtool.numerics.updates import RoundColumns
from qtool.scheme import GroupParameters

Decode: TypeAlias = Callable[[Tensor, GroupParameters], Tensor]

_BYTES_AT_ONCE = 1 << 27


@dataclass(frozen=True)
class BranchingColumns:
    """Columns whose levels are known.

    Attributes:
        frozen: Rounds them.
        codes: Those of the grid, one a level.
        decode: ``decode(codes [out, levels], parameters [out])`` returns their values.
    """

    frozen: FrozenColumns
    codes: UInt8[Tensor, " levels"]
    decode: Decode


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
        block = slice(start, min(start + block_size, n_in))
        given = later[block], scores, feedback[block, block], factor.upper.diagonal()[block]
        scores, chosen, origins, made = _searched(given, where[block])
        trail.append((chosen, origins))
        rest = _followed(later[block.stop :], origins)
        made_up = feedback[block, block.stop :].T @ made.flatten(1)
        later[block.stop :] = rest - made_up.view_as(rest)
    values = _traced(trail)
    return values if factor.order is None else values.index_select(0, torch.argsort(factor.order))


def _searched(
    given: tuple[Tensor, Tensor, Tensor, Tensor], where: Sequence[tuple[BranchingColumns, int]]
) -> tuple[Tensor, ...]:
    """Return what ``_search_block`` does of columns in groups of parts of the grid."""
    parts = [part for part, _ in where]
    parameters = [each_parameter(part.frozen.parameters, itemgetter((slice(None), group))) for part, group in where]
    first = parts[0]
    if pays(given[0]) and all(part is first for part in parts):
        found = replayed_columns(_search_one_part, first.frozen.round, first.decode)(parameters, first.codes, *given)
        return tuple(one.clone() for one in found)
    branch = [partial(_branches, part.frozen.round, part.decode, part.codes) for part in parts]
    return _search_block(branch, parameters, *given)


def _search_one_part(
    rounded: RoundColumns,
    decode: Decode,
    parameters: Sequence[GroupParameters],
    codes: UInt8[Tensor, " levels"],
    *given: Tensor,
) -> tuple[Tensor, ...]:
    """Return what ``_search_block`` does of columns in one part of the grid."""
    return _search_block([partial(_branches, rounded, decode, codes)] * len(parameters), parameters, *given)


def _search_block(
    branch: Sequence[Callable[[Tensor, GroupParameters], tuple[Tensor, Tensor]]],
    parameters: Sequence[GroupParameters],
    now: Float[Tensor, "columns rows beams"],
    scores: Float[Tensor, "rows beams"],
    feedback: Float[Tensor, "columns columns"],
    pivots: Float[Tensor, " columns"],
) -> tuple[
    Float[Tensor, "rows beams"],
    Float[Tensor, "columns rows beams"],
    Int[Tensor, "rows beams"],
    Float[Tensor, "columns rows beams"],
]:
    """Search a block of columns, which are changed in place.

    Returns:
        Of the candidates that stay: their loss so far, the values chosen, which of the candidates before the block they
        come from, and what is left of the columns.
    """
    beams = now.shape[-1]
    chosen, made = torch.zeros_like(now), torch.zeros_like(now)
    origins = torch.arange(beams, device=now.device).repeat(now.shape[1], 1)
    for place, (branches_of, own) in enumerate(zip(branch, parameters, strict=True)):
        branches, residuals = branches_of(now[place], own)
        both = scores.repeat(1, 2) + (residuals / pivots[place]).square()
        # Stable, so that of branches that are equally good the nearest value is taken.
        ranked, picked = both.sort(dim=1, stable=True)
        scores, picked = ranked[:, :beams], picked[:, :beams]
        parents = picked % beams
        for held in (chosen[:place], made[:place], now[place + 1 :]):
            held.copy_(_followed(held, parents))
        origins = origins.gather(1, parents)
        chosen[place], made[place] = branches.gather(1, picked), residuals.gather(1, picked)
        now[place + 1 :].sub_(feedback[place, place + 1 :].view(-1, 1, 1) * made[place])
    return scores, chosen, origins, made


def _branches(
    rounded: RoundColumns,
    decode: Decode,
    codes: UInt8[Tensor, " levels"],
    values: Float[Tensor, "rows beams"],
    parameters: GroupParameters,
) -> tuple[Float[Tensor, "rows branches"], Float[Tensor, "rows branches"]]:
    """Return the nearest level of each value and then the second nearest of each, and what is left of the values."""
    # Scales may be negative.
    levels = decode(codes.expand(*parameters.scale.shape, -1), parameters).sort(-1).values
    nearest = rounded(values, parameters)
    second = second_nearest(levels.to(values.dtype), values, nearest)
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
