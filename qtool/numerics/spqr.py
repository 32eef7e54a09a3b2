"""SpQR: GPTQ's loop on small groups with real zero points, in which single weights stay in 16 bits.

Columns of the weight are rows here, as in GPTQ. Groups are fitted when the loop reaches them and are its lazy blocks.
Left out: the order by activations of the released code, which stores the columns permuted.

References:
    Dettmers et al. 2023, SpQR, arXiv:2306.03078, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from qtool.errors import ShapeError
from qtool.numerics.groups import combine_parameters
from qtool.numerics.integers import encode_integers, round_integers
from qtool.scheme import GroupParameters


@dataclass(frozen=True)
class RangeColumns:
    """Neighbouring columns of asymmetric integers, whose groups keep their range, 0 in it or not.

    Attributes:
        columns: How many.
        group_size: Neighbours that share parameters.
        num_bits: Bits of a code.
        fit: ``fit(values [out, groups, group_size])`` returns parameters ``[out, groups]``, as they are to be stored.
    """

    columns: int
    group_size: int
    num_bits: int
    fit: Callable[[Tensor], GroupParameters]


@dataclass(frozen=True)
class SpQRResult:
    """What the loop chose.

    Attributes:
        codes: Codes of the weight; below an outlier the one nearest to 0.
        parameters: Their scales and zero points ``[out, groups]``, for each of the grids.
        values: What stands for the weight: decoded codes, and outliers as float16 holds them.
        outliers: Where those are.
        loss: Per row, ``Σ e² = diag(E (H + λ I) Eᵀ)``.
    """

    codes: UInt8[Tensor, "out in"]
    parameters: tuple[GroupParameters, ...]
    values: Float[Tensor, "out in"]
    outliers: Bool[Tensor, "out in"]
    loss: Float[Tensor, " out"]


def spqr_round(
    weight: Float[Tensor, "out in"],
    upper: Float[Tensor, "in in"],
    *,
    grid: Sequence[RangeColumns],
    tau: float = math.inf,
) -> SpQRResult:
    """Choose codes and outliers that approximately minimize ``tr(E H Eᵀ)``.

    ``r = w_j - Q(w_j)``, then ``w_k -= r U_jk / U_jj`` for every later column ``k``. Where ``(r / U_jj)²`` would be
    over ``τ · mean_j(var(W_j) / U_jj²)``, and float16 is nearer, ``Q(w_j)`` is ``w_j`` in float16, and ``r`` next to 0.
    A group is fitted without the weights that the rest of it gains more than that by losing.

    Args:
        weight: Full-precision weight ``W``. Not modified.
        upper: ``U``, upper triangular with ``Uᵀ U = (H + λ I)⁻¹``. Not modified.
        grid: What the columns are rounded to, from left to right.
        tau: ``τ``, 0 or more; infinite for no outliers.

    Returns:
        Codes and outliers, with what decodes them.

    Raises:
        ShapeError: Groups do not divide the columns, or the factor does not fit the weight.

    References:
        Dettmers et al. 2023, SpQR, arXiv:2306.03078, algorithm 1.
    """
    n_in = weight.shape[1]
    ragged = any(part.columns % part.group_size for part in grid)
    if upper.shape != (n_in, n_in) or sum(part.columns for part in grid) != n_in or ragged:
        raise ShapeError(
            "weight, factor and groups do not fit each other",
            facts=(
                ("weight", tuple(weight.shape)),
                ("factor", tuple(upper.shape)),
                ("columns of the grid", ", ".join(f"{part.columns} by {part.group_size}" for part in grid)),
            ),
        )
    loop = _Loop(weight, upper, outlier_threshold(weight, upper, tau))
    codes, parameters, start = [], [], 0
    for part in grid:
        fitted = []
        for first in range(start, start + part.columns, part.group_size):
            fitted.append(loop.fitted(part, first))
            codes.append(loop.round(part, first, fitted[-1]))
        parameters.append(combine_parameters(fitted, partial(torch.cat, dim=1)))
        start += part.columns
    loss = (loop.residuals / upper.diagonal().unsqueeze(-1)).square().sum(0)
    values, outliers = loop.values.T.contiguous(), loop.outliers.T.contiguous()
    return SpQRResult(torch.cat(codes, dim=1), tuple(parameters), values, outliers, loss)


def outlier_threshold(weight: Float[Tensor, "out in"], upper: Float[Tensor, "in in"], tau: float) -> float:
    """Return ``τ · mean_j(var(W_j) / U_jj²)``, in the unit of losses; infinite where a single row has no variance."""
    if math.isinf(tau) or len(weight) < 2:
        return math.inf
    return tau * float((weight.var(dim=0) / upper.diagonal().square()).mean())


def leave_one_out_gain(
    group: Float[Tensor, "out size"], pivots: Float[Tensor, " size"], num_bits: int
) -> Float[Tensor, "out size"]:
    """Return how much less the loss of a group is when a weight is not in it.

    Both losses are of nearest rounding on a range that is fitted to what is in the group, before it is stored. Only
    the least and the largest weight change the range; all others take nothing along but their own loss.

    Args:
        group: Weights of one group. Not modified.
        pivots: ``U_jj`` of its columns.
        num_bits: Bits of a code.
    """

    def losses(low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = _range(low.float(), high.float(), num_bits)
        rounded = round_integers(group, scale.masked_fill(scale == 0, 1.0), zero_point, num_bits)
        return ((group - rounded) / pivots).square()

    least, largest = group.argmin(-1, keepdim=True), group.argmax(-1, keepdim=True)
    every = losses(group.amin(-1), group.amax(-1))
    gain = every.clone()
    for end in (least, largest) if group.shape[1] > 1 else ():
        without = group.scatter(-1, end, math.inf).amin(-1), group.scatter(-1, end, -math.inf).amax(-1)
        rest = losses(*without).scatter(-1, end, 0.0).sum(-1, keepdim=True)
        gain.scatter_(-1, end, every.sum(-1, keepdim=True) - rest)
    return gain


class _Loop:
    """The weight as the loop changes it, transposed, and what was chosen so far."""

    def __init__(self, weight: Float[Tensor, "out in"], upper: Float[Tensor, "in in"], threshold: float) -> None:
        self.columns = weight.detach().T.contiguous().clone()
        self.values, self.residuals = torch.empty_like(self.columns), torch.empty_like(self.columns)
        self.outliers = torch.zeros_like(self.columns, dtype=torch.bool)
        self.pivots, self.threshold = upper.diagonal(), threshold
        self.feedback = (upper / self.pivots.unsqueeze(-1)).triu_(1).contiguous()

    def fitted(self, part: RangeColumns, first: int) -> GroupParameters:
        """Fit the group from ``first`` on, with the mean of the others in place of each likely outlier."""
        group = self.columns[first : first + part.group_size].T
        if not math.isinf(self.threshold):
            pivots = self.pivots[first : first + part.group_size]
            inside = leave_one_out_gain(group, pivots, part.num_bits) <= self.threshold
            mean = (group * inside).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp(min=1)
            others = torch.where(inside, group, mean)
            # Where no two are left that differ, there is no range to fit.
            group = torch.where(others.amax(-1, keepdim=True) > others.amin(-1, keepdim=True), others, group)
        return part.fit(group.unsqueeze(1))

    def round(self, part: RangeColumns, first: int, fitted: GroupParameters) -> UInt8[Tensor, "out size"]:
        """Choose codes and outliers of a group; the columns behind it make up for the errors."""
        stop = first + part.group_size
        on_grid = (fitted.scale, fitted.zero_point, part.num_bits)
        for col in range(first, stop):
            column = self.columns[col]
            nearest = round_integers(column[:, None, None], *on_grid)[:, 0, 0]
            half = column.half().to(column.dtype)
            error = (column - nearest).abs()
            costly = (error / self.pivots[col]).square() > self.threshold
            self.outliers[col] = costly & ((column - half).abs() < error)
            self.values[col] = torch.where(self.outliers[col], half, nearest)
            self.residuals[col] = column - self.values[col]
            self.columns[col + 1 : stop].addr_(self.feedback[col, col + 1 : stop], self.residuals[col], alpha=-1)
        self.columns[stop:].addmm_(self.feedback[first:stop, stop:].T, self.residuals[first:stop], alpha=-1)
        group = self.columns[first:stop].masked_fill(self.outliers[first:stop], 0.0).T.contiguous()
        codes: Tensor = encode_integers(group.unsqueeze(1), *on_grid)
        return codes.squeeze(1)


def _range(
    low: Float[Tensor, "*rows"], high: Float[Tensor, "*rows"], num_bits: int
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Return ``scale = (high - low) / (2^b - 1)`` and ``-low / scale``; a group of one value gets a code for that."""
    scale = torch.where(high > low, high - low, low.abs()) / (2**num_bits - 1)
    return scale, -low / scale.masked_fill(scale == 0, 1.0)
