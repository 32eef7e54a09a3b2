"""GPTQ: round column by column, and let the columns still to come make up for each error.

Columns of the weight are rows here: the solver works on the transpose, so that a column is contiguous. Updates come in
three sizes, which changes their order in time and nothing else: rank 1 within a panel of up to 32 columns, one product
for the rest of the lazy block, one for the columns after the block.

References:
    Frantar et al. 2023, GPTQ, arXiv:2210.17323, algorithm 1.
    Chee et al. 2023, QuIP, arXiv:2307.13304, theorem 6: the same codes as LDLQ.
"""

from __future__ import annotations

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
    """The grid that columns are rounded to.

    Attributes:
        group_size: Neighbouring columns that share parameters.
        fit: ``fit(values [out, group_size], start)`` returns parameters with one entry a row for the columns from
            ``start`` on.
        round: ``round(values [out, columns], parameters)`` returns the nearest values of the grid in the same dtype.
        encode: ``encode(values [..., columns], parameters)`` returns their codes.
    """

    group_size: int
    fit: Callable[[Tensor, int], GroupParameters]
    round: Callable[[Tensor, GroupParameters], Tensor]
    encode: Callable[[Tensor, GroupParameters], Tensor]


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
        parameters: Their scales and zero points ``[out, groups]``.
        loss: Per row, ``Σ e² = diag(E (H + λ I) Eᵀ)`` with ``E`` from the weight whose dead columns are 0.
        dampening_frac: λ as a fraction of the mean diagonal entry, as used.
        wide: Whether the factorization took float64.
        dead: Columns whose input is always 0.
        factor: What the Hessian was factorized to, for other weights with the same inputs.
    """

    codes: UInt8[Tensor, "out in"]
    parameters: GroupParameters
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
    grid: ColumnGrid,
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
        grid: Fits groups of columns and rounds to them.
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
    if hessian.shape != (n_in, n_in) or n_in % grid.group_size:
        raise ShapeError(
            "weight, Hessian and groups do not fit each other",
            facts=(
                ("weight", tuple(weight.shape)),
                ("hessian", tuple(hessian.shape)),
                ("group size", grid.group_size),
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
        for start in range(0, n_in, grid.group_size):
            fitted.append(grid.fit(alive[:, start : start + grid.group_size].contiguous(), start))
    columns = alive.T.contiguous()
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else None
    if order is not None:
        columns = columns.index_select(0, order)
    if factor is None:
        visited = hessian if order is None else hessian.index_select(0, order).index_select(1, order)
        factor = factorize_inverse(visited, dampening_frac)
    groups = [col // grid.group_size for col in (range(n_in) if order is None else order.tolist())]
    loss = _solve(columns, factor.upper, grid, fitted, groups, block_size, stale=parameters == "stale")
    if order is not None:
        columns = columns.index_select(0, torch.argsort(order))
    joined = _join(fitted)
    values = to_groups(columns.T.contiguous(), "group", grid.group_size)
    codes = from_groups(grid.encode(values, joined), weight.shape)
    return GPTQResult(codes, joined, loss, factor.dampening_frac, factor.wide, dead, factor)


def _solve(
    columns: Float[Tensor, "in out"],
    upper: Float[Tensor, "in in"],
    grid: ColumnGrid,
    fitted: list[GroupParameters],
    groups: Sequence[int],
    block_size: int,
    *,
    stale: bool,
) -> Float[Tensor, " out"]:
    """Update ``columns`` in place to the values that each had when it was rounded.

    Args:
        columns: The transposed weight, in visiting order.
        upper: ``U``, in visiting order.
        grid: Fits groups of columns and rounds to them.
        fitted: Parameters of all groups in storage order; or none, and the solver appends each as it reaches it.
        groups: Group of each column.
        block_size: Columns per lazy update.
        stale: Whether groups are fitted without the updates from within the block.

    Returns:
        Loss of each row.
    """
    n_in, n_out = columns.shape
    to_fit = not fitted
    pivots = upper.diagonal()
    feedback = (upper / pivots.unsqueeze(-1)).triu_(1).contiguous()
    loss = columns.new_zeros(n_out)
    residuals = columns.new_empty(min(block_size, n_in), n_out)
    for start in range(0, n_in, block_size):
        stop = min(start + block_size, n_in)
        before = columns[start:stop].clone() if stale else columns[start:stop]
        for first, last in _panels(start, stop, grid.group_size):
            if to_fit and first % grid.group_size == 0:
                beyond = columns[stop : first + grid.group_size]
                if len(beyond) and first > start and not stale:
                    pending = feedback[start:first, stop : first + grid.group_size]
                    beyond = beyond.addmm(pending.T, residuals[: first - start], alpha=-1)
                reached = before[first - start : first - start + grid.group_size]
                fitted.append(grid.fit(torch.cat([reached, beyond]).T.contiguous(), first))
            panel, made = columns[first:last], residuals[first - start : last - start]
            # `spread` is 0 up to the column's own entry, so that columns already rounded stay as they are.
            for column, residual, spread, group in zip(
                panel.unsqueeze(-1).unbind(),
                made.unbind(),
                feedback[first:last, first:last].unbind(),
                groups[first:last],
                strict=True,
            ):
                torch.sub(column, grid.round(column, fitted[group]), out=residual.unsqueeze(-1))
                panel.addr_(spread, residual, alpha=-1)
            columns[last:stop].addmm_(feedback[first:last, last:stop].T, made, alpha=-1)
        made = residuals[: stop - start]
        columns[stop:].addmm_(feedback[start:stop, stop:].T, made, alpha=-1)
        loss += (made / pivots[start:stop].unsqueeze(-1)).square_().sum(0)
    return loss


def _panels(start: int, stop: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Cut a block into short runs of columns, none of which goes past the start of a group."""
    first_group = -(-start // group_size) * group_size
    cuts = {*range(start, stop, _PANEL), *range(first_group, stop, group_size), stop}
    return pairwise(sorted(cuts))


def _join(fitted: Sequence[GroupParameters]) -> GroupParameters:
    """Put the groups' parameters side by side, ``[out, groups]``."""
    zero_points = [group.zero_point for group in fitted if group.zero_point is not None]
    return GroupParameters(
        torch.stack([group.scale for group in fitted], dim=-1),
        torch.stack(zero_points, dim=-1) if zero_points else None,
        fitted[0].global_scale,
    )
