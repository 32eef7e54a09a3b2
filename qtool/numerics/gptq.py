"""GPTQ: round column by column, and let the columns still to come make up for each error.

Columns of the weight are rows here: the solver works on the transpose, so that a column is contiguous. Updates come in
three sizes, which changes their order in time and nothing else: rank 1 within a panel of up to 32 columns, one product
for the rest of the lazy block, one for the columns after the block.

References:
    Frantar et al. 2023, GPTQ, arXiv:2210.17323, algorithm 1.
    Chee et al. 2023, QuIP, arXiv:2307.13304, theorem 6: the same codes as LDLQ.
    Gafni et al. 2025, arXiv:2505.14638: the order of whole groups.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby, pairwise
from operator import itemgetter
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from qtool.errors import ShapeError, UsageError
from qtool.numerics.groups import combine_parameters, each_parameter, from_groups, to_groups
from qtool.numerics.triangular import InverseFactor, factorize_inverse
from qtool.numerics.updates import RoundColumns, Updates
from qtool.scheme import GroupParameters

ParameterSource: TypeAlias = Literal["fresh", "static", "stale"]
ColumnOrder: TypeAlias = Literal["natural", "activation", "groups"]

_PANEL = 32


@dataclass(frozen=True)
class ColumnGrid:
    """The grid that neighbouring columns are rounded to.

    Attributes:
        group_size: Neighbouring columns that share parameters.
        fit: ``fit(values [out, groups, group_size], start)`` returns parameters ``[out, groups]`` for the columns from
            ``start`` on; it treats each group by itself.
        round: ``round(values [out, columns], parameters)`` returns the nearest values of the grid in the same dtype.
        encode: ``encode(values [..., columns], parameters)`` returns their codes.
        columns: How many columns; None for all that the other grids of a weight leave.
    """

    group_size: int
    fit: Callable[[Tensor, int], GroupParameters]
    round: RoundColumns
    encode: Callable[[Tensor, GroupParameters], Tensor]
    columns: int | None = None


@dataclass(frozen=True)
class _Group:
    """Columns ``start`` to ``stop`` of a weight, which share parameters of the grid at ``place``."""

    start: int
    stop: int
    place: int
    grid: ColumnGrid


@dataclass(frozen=True)
class GPTQResult:
    """What the solver chose.

    Attributes:
        codes: Codes of the weight.
        parameters: Their scales and zero points ``[out, groups]``, for each of the grids.
        loss: Per row, ``diag(E (H + λ I) Eᵀ)`` with ``E`` from the weight whose dead columns are 0.
        dampening_frac: λ as a fraction of the mean diagonal entry, as used.
        wide: Whether the factorization took float64.
        dead: Columns whose input is always 0.
        factor: What the Hessian was factorized to, for other weights with the same inputs.
    """

    codes: UInt8[Tensor, "out in"]
    parameters: tuple[GroupParameters, ...]
    loss: Float[Tensor, " out"]
    dampening_frac: float
    wide: bool
    dead: Bool[Tensor, " in"]
    factor: InverseFactor


def factorize_visits(
    hessian: Float[Tensor, "in in"], grid: Sequence[ColumnGrid], *, dampening_frac: float, order: ColumnOrder
) -> InverseFactor:
    """Choose the order of the columns, and factorize the damped inverse in it.

    Args:
        hessian: ``X @ X.T / tokens`` over calibration tokens. A diagonal entry of 0 counts as 1. Not modified.
        grid: Says where groups are.
        dampening_frac: λ, added to the diagonal, as a fraction of its mean; raised where it must be.
        order: ``natural``: from left to right. ``activation``: by descending Hessian diagonal. ``groups``: group after
            group, by the descending mean of their diagonals, and so inside each group by the diagonal.

    Returns:
        The factor, with its order.

    Raises:
        ShapeError: Groups do not divide the columns.
        NumericalError: The Hessian cannot be factorized even after escalation.

    References:
        Gafni et al. 2025, arXiv:2505.14638: ``groups``.
    """
    groups = _groups(grid, len(hessian))
    if not groups:
        sizes = ", ".join(str(part.group_size) for part in grid)
        raise ShapeError("groups do not divide the columns", facts=(("columns", len(hessian)), ("group size", sizes)))
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal.masked_fill_(diagonal == 0, 1.0)
    if order == "natural":
        return factorize_inverse(hessian, dampening_frac)
    visits = _descending(diagonal)
    if order == "groups":
        means = torch.stack([diagonal[group.start : group.stop].mean() for group in groups])
        ranked = [groups[index] for index in _descending(means).tolist()]
        visits = torch.cat([group.start + _descending(diagonal[group.start : group.stop]) for group in ranked])
    hessian = hessian.index_select(0, visits).index_select(1, visits)
    return replace(factorize_inverse(hessian, dampening_frac), order=visits)


def _descending(values: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    return torch.argsort(values, descending=True, stable=True)


def gptq_round(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    grid: Sequence[ColumnGrid],
    dampening_frac: float = 0.01,
    block_size: int = 128,
    parameters: ParameterSource = "fresh",
    order: ColumnOrder = "natural",
    factor: InverseFactor | None = None,
) -> GPTQResult:
    """Choose codes that approximately minimize ``tr(E H Eᵀ)``, the layer's output error.

    ``r = w_j - Q(w_j)``, then ``w_k -= r U_jk / U_jj`` for every later column ``k``. A column whose Hessian diagonal is
    0 never has an input: its weights become 0 and its diagonal 1, before damping.

    Args:
        weight: Full-precision weight ``W``. Not modified.
        hessian: ``X @ X.T / tokens`` over calibration tokens. Not modified.
        grid: Fits groups of columns and rounds to them: one for all columns, or several side by side.
        dampening_frac: As for ``factorize_visits``.
        block_size: Columns per lazy update. Changes speed, never the result (beyond float rounding), except for
            ``stale`` parameters.
        parameters: What a group is fitted on. ``fresh``: its columns with all updates so far. ``static``: the weight
            before any update. ``stale``: as fresh, without the updates that come from within the lazy block, which is
            what GPTQ's first code does.
        order: As for ``factorize_visits``. Groups stay neighbours in storage, and unless each is visited as a whole,
            parameters have to be ``static``.
        factor: What ``factorize_visits`` made of this Hessian, dampening and order; None to do so now. Its linear term,
            if any, is added to the updates.

    Returns:
        Codes in storage order, with what decodes them.

    Raises:
        ShapeError: Groups do not divide the columns, or the Hessian does not fit the weight.
        UsageError: Groups are not visited as a whole, and parameters are not static.
        NumericalError: The Hessian cannot be factorized even after escalation.

    References:
        Frantar et al. 2023, GPTQ, arXiv:2210.17323, algorithm 1.
    """
    n_in = weight.shape[1]
    groups = _groups(grid, n_in)
    if hessian.shape != (n_in, n_in) or not groups:
        raise ShapeError(
            "weight, Hessian and groups do not fit each other",
            facts=(
                ("weight", tuple(weight.shape)),
                ("hessian", tuple(hessian.shape)),
                ("group size", ", ".join(str(part.group_size) for part in grid)),
            ),
        )
    if factor is None:
        factor = factorize_visits(hessian.to(weight.dtype), grid, dampening_frac=dampening_frac, order=order)
    group_of = [index for index, group in enumerate(groups) for _ in range(group.start, group.stop)]
    if factor.order is not None:
        group_of = [group_of[col] for col in factor.order.tolist()]
    if parameters != "static" and sum(1 for _ in groupby(group_of)) > len(groups):
        raise UsageError(
            f"{parameters} parameters need groups that are visited as a whole",
            hint="parameters static, or order groups",
        )
    dead = hessian.diagonal() == 0
    alive = weight.detach().masked_fill(dead, 0.0)
    fitted: dict[int, GroupParameters] = {}
    if parameters == "static":
        for place, part in enumerate(grid):
            own = [index for index, group in enumerate(groups) if group.place == place]
            start, stop = groups[own[0]].start, groups[own[-1]].stop
            fitted |= zip(own, _fitted(part, alive[:, start:stop].contiguous(), start), strict=True)
    columns = alive.T.contiguous()
    if factor.order is not None:
        columns = columns.index_select(0, factor.order)
    loss = _solve(columns, factor, groups, fitted, group_of, block_size, stale=parameters == "stale")
    if factor.order is not None:
        columns = columns.index_select(0, torch.argsort(factor.order))
    codes, joined = _encoded(columns.T, grid, groups, fitted)
    return GPTQResult(codes, joined, loss, factor.dampening_frac, factor.wide, dead, factor)


def _fitted(part: ColumnGrid, values: Float[Tensor, "out columns"], start: int) -> list[GroupParameters]:
    """Fit the groups that columns from ``start`` on are made of all at once; return the parameters of each."""
    joined = part.fit(to_groups(values, "group", part.group_size), start)
    turned = each_parameter(joined, lambda own: own.T.contiguous())
    return [each_parameter(turned, itemgetter(index)) for index in range(len(turned.scale))]


def _groups(grid: Sequence[ColumnGrid], n_in: int) -> list[_Group]:
    """Return the groups of all columns from left to right; none if they do not divide the columns."""
    rest = n_in - sum(part.columns or 0 for part in grid)
    groups: list[_Group] = []
    for place, part in enumerate(grid):
        first, size = groups[-1].stop if groups else 0, part.group_size
        last = first + (rest if part.columns is None else part.columns)
        if last <= first or (last - first) % size:
            return []
        groups += [_Group(start, start + size, place, part) for start in range(first, last, size)]
    return groups if groups and groups[-1].stop == n_in else []


def _encoded(
    values: Float[Tensor, "out in"],
    grid: Sequence[ColumnGrid],
    groups: Sequence[_Group],
    fitted: Mapping[int, GroupParameters],
) -> tuple[UInt8[Tensor, "out in"], tuple[GroupParameters, ...]]:
    """Return the codes of all columns, and the parameters of each grid."""
    codes, joined = [], []
    for place, part in enumerate(grid):
        own = [index for index, group in enumerate(groups) if group.place == place]
        columns = values[:, groups[own[0]].start : groups[own[-1]].stop].contiguous()
        joined.append(_join([fitted[index] for index in own]))
        encoded = part.encode(to_groups(columns, "group", part.group_size), joined[-1])
        codes.append(from_groups(encoded, columns.shape))
    return codes[0] if len(codes) == 1 else torch.cat(codes, dim=1), tuple(joined)


def _solve(
    columns: Float[Tensor, "in out"],
    factor: InverseFactor,
    groups: Sequence[_Group],
    fitted: dict[int, GroupParameters],
    group_of: Sequence[int],
    block_size: int,
    *,
    stale: bool,
) -> Float[Tensor, " out"]:
    """Update ``columns`` in place to the values that each had when it was rounded.

    Args:
        columns: The transposed weight, in visiting order.
        factor: Of the Hessian, in visiting order.
        groups: Groups of columns in storage order.
        fitted: Parameters of all groups by index; or none, and the solver adds each as it reaches it.
        group_of: Index of the group of each column, in visiting order.
        block_size: Columns per lazy update.
        stale: Whether groups are fitted without the updates from within the block.

    Returns:
        Loss of each row.
    """
    n_in, n_out = columns.shape
    reached = list(range(len(groups)) if fitted else dict.fromkeys(group_of))
    starts = [0, *accumulate(groups[index].stop - groups[index].start for index in reached)][:-1]
    to_fit = {} if fitted else dict(zip(starts, reached, strict=True))
    updates = Updates.of(factor, columns)
    pivots = factor.upper.diagonal()
    rounds = [group.grid.round for group in groups]
    loss = columns.new_zeros(n_out)
    residuals = columns.new_empty(min(block_size, n_in), n_out)
    for start in range(0, n_in, block_size):
        stop = min(start + block_size, n_in)
        before = columns[start:stop].clone() if stale else columns[start:stop]
        for first, last in _panels(start, stop, starts):
            if first in to_fit:
                index = to_fit[first]
                end = first + groups[index].stop - groups[index].start
                beyond = columns[stop:end]
                if len(beyond) and first > start and not stale:
                    beyond = beyond.clone()
                    updates.add(beyond, slice(start, first), slice(stop, end), residuals[: first - start])
                now = torch.cat([before[first - start : end - start], beyond])
                if factor.order is not None:
                    now = now.index_select(0, torch.argsort(factor.order[first:end]))
                fitted[index] = _fitted(groups[index].grid, now.T.contiguous(), groups[index].start)[0]
            made = residuals[first - start : last - start]
            own = group_of[first:last]
            updates.round(slice(first, last), made, [rounds[index] for index in own], [fitted[index] for index in own])
            updates.add(columns[last:stop], slice(first, last), slice(last, stop), made)
        made = residuals[: stop - start]
        updates.add(columns[stop:], slice(start, stop), slice(stop, n_in), made)
        loss += (made / pivots[start:stop].unsqueeze(-1)).square_().sum(0)
        updates.note(slice(start, stop), made)
    return loss if updates.errors is None else factor.loss(updates.errors)


def _panels(start: int, stop: int, starts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut a block into short runs of columns, none of which goes past a column that a group starts at."""
    inside = starts[bisect_left(starts, start) : bisect_left(starts, stop)]
    return pairwise(sorted({*range(start, stop, _PANEL), *inside, stop}))


def _join(fitted: Sequence[GroupParameters]) -> GroupParameters:
    """Put the groups' parameters side by side, ``[out, groups]``."""
    return combine_parameters(fitted, partial(torch.stack, dim=-1))
