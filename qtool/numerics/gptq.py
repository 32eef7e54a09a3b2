"""GPTQ: round column by column, and let the columns still to come make up for each error.

Columns of the weight are rows here: the solver works on the transpose, so that a column is contiguous. Updates come in
three sizes, which changes their order in time and nothing else: rank 1 within a panel of up to 32 columns, one product
for the rest of the lazy block, one for the columns after the block.

References:
    Frantar et al. 2023, GPTQ, arXiv:2210.17323, algorithm 1.
    Chee et al. 2023, QuIP, arXiv:2307.13304, theorem 6: the same codes as LDLQ.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from qtool.errors import NumericalError, ShapeError, UsageError
from qtool.numerics.groups import from_groups, to_groups
from qtool.scheme import GroupParameters

ParameterSource: TypeAlias = Literal["fresh", "static", "stale"]

_PANEL = 32
_HIGHEST_DAMPENING = 0.1
_LEAST_RAISED_DAMPENING = 1e-4


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
    round: Callable[[Tensor, GroupParameters], Tensor]
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
class InverseFactor:
    """``U``, upper triangular with ``Uᵀ U = (H + λ I)⁻¹``, and what it took to get it.

    Attributes:
        upper: The factor.
        dampening_frac: λ as a fraction of the mean diagonal entry: what was asked, or more.
        wide: Whether it took float64, where that was not the dtype of the Hessian.
    """

    upper: Float[Tensor, "in in"]
    dampening_frac: float
    wide: bool


@dataclass(frozen=True)
class GPTQResult:
    """What the solver chose.

    Attributes:
        codes: Codes of the weight.
        parameters: Their scales and zero points ``[out, groups]``, for each of the grids.
        loss: Per row, ``Σ e² = diag(E (H + λ I) Eᵀ)`` with ``E`` from the weight whose dead columns are 0.
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


def inverse_cholesky(hessian: Float[Tensor, "n n"]) -> Float[Tensor, "n n"] | None:
    """Return the upper Cholesky factor ``U`` of the inverse, ``Uᵀ U = H⁻¹``.

    By way of the inverse: ``J chol(J H J)⁻¹ J``, with ``J`` the reversal of the axis, is the same matrix for one
    factorization less, but two to four times less accurate in float32 where a few directions dominate ``H``.

    Args:
        hessian: Symmetric matrix; only its lower triangle is read. Not modified.

    Returns:
        The factor, with positive diagonal; None if ``H``, or its inverse as computed, is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    # What is not finite in a column makes its pivot so too.
    return None if int(failed) or not bool(torch.isfinite(upper.diagonal()).all()) else upper


def factorize_inverse(hessian: Float[Tensor, "in in"], dampening_frac: float) -> InverseFactor:
    """Factorize the damped inverse, with more damping and then in float64 where that fails.

    Tries λ at ``dampening_frac``, then ten times as much at a time up to 0.1, first in the dtype of the Hessian, then
    all of them again in float64.

    Args:
        hessian: Symmetric, no zeros on the diagonal. Not modified.
        dampening_frac: λ as a fraction of the mean diagonal entry.

    Returns:
        The factor, in the dtype of the Hessian.

    Raises:
        NumericalError: No attempt found a positive definite matrix.
    """
    fracs = [dampening_frac]
    while fracs[-1] < _HIGHEST_DAMPENING:
        fracs.append(min(max(10 * fracs[-1], _LEAST_RAISED_DAMPENING), _HIGHEST_DAMPENING))
    for dtype in dict.fromkeys((hessian.dtype, torch.float64)):
        mean = hessian.diagonal().to(dtype).mean()
        for frac in fracs:
            damped = hessian.to(dtype, copy=True)
            damped.diagonal().add_(frac * mean)
            upper = inverse_cholesky(damped)
            if upper is not None:
                return InverseFactor(upper.to(hessian.dtype), frac, wide=dtype != hessian.dtype)
    raise NumericalError(
        "the damped Hessian is not positive definite",
        facts=(("dampening", f"{fracs[0]:g} to {fracs[-1]:g} of the mean diagonal"), ("size", len(hessian))),
        hint="calibrate on more samples",
    )


def gptq_round(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    grid: Sequence[ColumnGrid],
    dampening_frac: float = 0.01,
    block_size: int = 128,
    parameters: ParameterSource = "fresh",
    act_order: bool = False,
    factor: InverseFactor | None = None,
) -> GPTQResult:
    """Choose codes that approximately minimize ``tr(E H Eᵀ)``, the layer's output error.

    ``r = w_j - Q(w_j)``, then ``w_k -= r U_jk / U_jj`` for every later column ``k``. A column whose Hessian diagonal is
    0 never has an input: its weights become 0 and its diagonal 1, before damping.

    Args:
        weight: Full-precision weight ``W``. Not modified.
        hessian: ``X @ X.T / tokens`` over calibration tokens. Not modified.
        grid: Fits groups of columns and rounds to them: one for all columns, or several side by side.
        dampening_frac: λ, added to the Hessian diagonal, as a fraction of its mean; raised where it must be.
        block_size: Columns per lazy update. Changes speed, never the result (beyond float rounding), except for
            ``stale`` parameters.
        parameters: What a group is fitted on. ``fresh``: its columns with all updates so far. ``static``: the weight
            before any update. ``stale``: as fresh, without the updates that come from within the lazy block, which is
            what GPTQ's first code does.
        act_order: Visit columns by descending Hessian diagonal instead of left to right. Groups stay neighbours in
            storage; needs ``static`` parameters.
        factor: What an earlier call returned for this Hessian, damping and order; None to factorize it.

    Returns:
        Codes in storage order, with what decodes them.

    Raises:
        ShapeError: Groups do not divide the columns, or the Hessian does not fit the weight.
        UsageError: ``act_order`` without static parameters.
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
    if act_order and parameters != "static":
        raise UsageError(f"`act_order` needs static parameters, not {parameters}", hint="parameters static")
    dead = hessian.diagonal() == 0
    hessian = hessian.to(weight.dtype, copy=True)
    hessian.diagonal().masked_fill_(dead, 1.0)
    alive = weight.detach().masked_fill(dead, 0.0)
    fitted: list[GroupParameters] = []
    if parameters == "static":
        for place, part in enumerate(grid):
            own = [group for group in groups if group.place == place]
            fitted += _fitted(part, alive[:, own[0].start : own[-1].stop].contiguous(), own[0].start)
    columns = alive.T.contiguous()
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else None
    if order is not None:
        columns = columns.index_select(0, order)
    if factor is None:
        visited = hessian if order is None else hessian.index_select(0, order).index_select(1, order)
        factor = factorize_inverse(visited, dampening_frac)
    group_of = [index for index, group in enumerate(groups) for _ in range(group.start, group.stop)]
    visited_groups = group_of if order is None else [group_of[col] for col in order.tolist()]
    loss = _solve(columns, factor.upper, groups, fitted, visited_groups, block_size, stale=parameters == "stale")
    if order is not None:
        columns = columns.index_select(0, torch.argsort(order))
    codes, joined = _encoded(columns.T, grid, groups, fitted)
    return GPTQResult(codes, joined, loss, factor.dampening_frac, factor.wide, dead, factor)


def _fitted(part: ColumnGrid, values: Float[Tensor, "out columns"], start: int) -> list[GroupParameters]:
    """Fit the groups that columns from ``start`` on are made of all at once; return the parameters of each."""
    joined = part.fit(to_groups(values, "group", part.group_size), start)
    zero_points = None if joined.zero_point is None else joined.zero_point.T.contiguous()
    return [
        GroupParameters(scale, None if zero_points is None else zero_points[index], joined.global_scale)
        for index, scale in enumerate(joined.scale.T.contiguous())
    ]


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
    fitted: Sequence[GroupParameters],
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
    upper: Float[Tensor, "in in"],
    groups: Sequence[_Group],
    fitted: list[GroupParameters],
    group_of: Sequence[int],
    block_size: int,
    *,
    stale: bool,
) -> Float[Tensor, " out"]:
    """Update ``columns`` in place to the values that each had when it was rounded.

    Args:
        columns: The transposed weight, in visiting order.
        upper: ``U``, in visiting order.
        groups: Groups of columns in storage order.
        fitted: Parameters of all groups; or none, and the solver appends each as it reaches it.
        group_of: Index of the group of each column, in visiting order.
        block_size: Columns per lazy update.
        stale: Whether groups are fitted without the updates from within the block.

    Returns:
        Loss of each row.
    """
    n_in, n_out = columns.shape
    starts = [group.start for group in groups]
    to_fit = {} if fitted else dict(zip(starts, groups, strict=True))
    pivots = upper.diagonal()
    feedback = (upper / pivots.unsqueeze(-1)).triu_(1).contiguous()
    rounds = [group.grid.round for group in groups]
    loss = columns.new_zeros(n_out)
    residuals = columns.new_empty(min(block_size, n_in), n_out)
    for start in range(0, n_in, block_size):
        stop = min(start + block_size, n_in)
        before = columns[start:stop].clone() if stale else columns[start:stop]
        for first, last in _panels(start, stop, starts):
            if first in to_fit:
                end = to_fit[first].stop
                beyond = columns[stop:end]
                if len(beyond) and first > start and not stale:
                    pending = feedback[start:first, stop:end]
                    beyond = beyond.addmm(pending.T, residuals[: first - start], alpha=-1)
                reached = before[first - start : end - start]
                fitted += _fitted(to_fit[first].grid, torch.cat([reached, beyond]).T.contiguous(), first)
            panel, made = columns[first:last], residuals[first - start : last - start]
            # `spread` is 0 up to the column's own entry, so that columns already rounded stay as they are.
            for column, residual, spread, group in zip(
                panel.unsqueeze(-1).unbind(),
                made.unbind(),
                feedback[first:last, first:last].unbind(),
                group_of[first:last],
                strict=True,
            ):
                torch.sub(column, rounds[group](column, fitted[group]), out=residual.unsqueeze(-1))
                panel.addr_(spread, residual, alpha=-1)
            columns[last:stop].addmm_(feedback[first:last, last:stop].T, made, alpha=-1)
        made = residuals[: stop - start]
        columns[stop:].addmm_(feedback[start:stop, stop:].T, made, alpha=-1)
        loss += (made / pivots[start:stop].unsqueeze(-1)).square_().sum(0)
    return loss


def _panels(start: int, stop: int, starts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut a block into short runs of columns, none of which goes past a column that a group starts at."""
    inside = starts[bisect_left(starts, start) : bisect_left(starts, stop)]
    return pairwise(sorted({*range(start, stop, _PANEL), *inside, stop}))


def _join(fitted: Sequence[GroupParameters]) -> GroupParameters:
    """Put the groups' parameters side by side, ``[out, groups]``."""
    zero_points = [group.zero_point for group in fitted if group.zero_point is not None]
    return GroupParameters(
        torch.stack([group.scale for group in fitted], dim=-1),
        torch.stack(zero_points, dim=-1) if zero_points else None,
        fitted[0].global_scale,
    )
