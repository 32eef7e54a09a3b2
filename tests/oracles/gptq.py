"""GPTQ as column-by-column optimal brain quantization, with the explicit inverse Hessian.

Each column is rounded, its error is spread over the columns that are left, and it is eliminated from the
inverse by a rank-1 downdate. No Cholesky factor and no lazy updates occur, so that this shares nothing with
the algorithm that it checks.

References:
    Frantar and Alistarh 2022, Optimal Brain Compression, arXiv:2208.11580, equations 2 to 4 and lemma 1.
    Frantar et al. 2023, GPTQ, arXiv:2210.17323: the fixed order of columns, damping, groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Params: TypeAlias = Literal["fresh", "static", "stale"]
Order: TypeAlias = Literal["natural", "activation", "groups"]
GroupParams: TypeAlias = tuple[Tensor, Tensor | None]
Fit: TypeAlias = Callable[[Tensor], GroupParams]
Encode: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Decode: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Solution: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def dampen(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], dampening_frac: float
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "in in"]]:
    """Return float64 copies with dead columns disabled and the diagonal damped.

    A column is dead when its diagonal entry is exactly 0: the entry becomes 1 and its weights become 0. Then
    ``dampening_frac * mean(diag)``, taken after that fix, is added to the whole diagonal.

    Args:
        weight: Full-precision weight. Not modified.
        hessian: Symmetric and positive semidefinite. Not modified.
        dampening_frac: Fraction of the mean diagonal entry.

    Returns:
        The weight and the Hessian that the solvers really work on; their losses are stated in these.
    """
    weight, hessian = weight.double().clone(), hessian.double().clone()
    n_in = hessian.shape[0]
    for col in range(n_in):
        if hessian[col, col] == 0:
            hessian[col, col] = 1.0
            weight[:, col] = 0.0
    damping = dampening_frac * sum(float(hessian[col, col]) for col in range(n_in)) / n_in
    for col in range(n_in):
        hessian[col, col] += damping
    return weight, hessian


def visiting_order(hessian: Float[Tensor, "in in"], order: Order, group_size: int = 1) -> list[int]:
    """List storage columns in the order of rounding.

    Args:
        hessian: Whose diagonal decides. Not modified.
        order: ``natural``: by index. ``activation``: by descending diagonal entry, ties by index. ``groups``: groups by
            descending mean of the entries, columns of a group as in ``activation``.
        group_size: Storage columns in a group.

    Returns:
        The columns.
    """
    energy = [float(hessian[col, col]) for col in range(hessian.shape[0])]
    columns = list(range(len(energy)))
    if order == "natural":
        return columns
    ranked = sorted(columns, key=lambda col: -energy[col])
    if order == "activation":
        return ranked
    groups = [columns[start : start + group_size] for start in range(0, len(columns), group_size)]
    groups.sort(key=lambda group: -sum(energy[col] for col in group) / len(group))
    return [col for group in groups for col in ranked if col in group]


def fit_groups(weight: Float[Tensor, "out in"], fit: Fit, group_size: int) -> dict[int, GroupParams]:
    """Fit the parameters of every group of contiguous storage columns."""
    starts = range(0, weight.shape[1], group_size)
    return {start // group_size: fit(weight[:, start : start + group_size].clone()) for start in starts}


def stack_groups(groups: dict[int, GroupParams]) -> tuple[Tensor, Tensor | None]:
    """Stack group parameters to ``[out, groups]``; the zeros are None when the grid has none."""
    scales = torch.stack([groups[g][0] for g in range(len(groups))], dim=1)
    zeros = [zero for g in range(len(groups)) if (zero := groups[g][1]) is not None]
    return scales, torch.stack(zeros, dim=1) if zeros else None


def gptq_oracle(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    fit: Fit,
    encode: Encode,
    decode: Decode,
    group_size: int,
    params: Params = "fresh",
    block_size: int = 128,
    dampening_frac: float = 0.01,
    order: Order = "natural",
) -> tuple[
    Int[Tensor, "out in"],
    Float[Tensor, "out in"],
    Float[Tensor, " out"],
    Float[Tensor, "out groups"],
    Shaped[Tensor, "out groups"] | None,
]:
    """Round columns one after the other, each time re-optimizing those that are left.

    With ``G`` the inverse of the damped Hessian restricted to the columns that are left: ``q_j = Q(w_j)``,
    ``w -= (w_j - q_j) / G_jj * G_j``, ``G -= G_:j G_j: / G_jj``.

    Args:
        weight: Full-precision weight. Not modified.
        hessian: ``X @ X.T / tokens``. Not modified.
        fit: ``fit(columns [out, g]) -> (scale [out], zero [out] or None)``.
        encode: ``encode(column [out], scale, zero) -> codes [out]``.
        decode: ``decode(codes [out], scale, zero) -> values [out]``.
        group_size: Storage columns that share parameters; the last group may be shorter.
        params: What a group's parameters are fitted on. ``fresh``: its columns as updated so far, when the
            first of them is reached. ``static``: the weight before any update (dead columns already 0).
            ``stale``: as fresh, but without the updates that come from the current block of ``block_size``.
        block_size: Columns per lazy block. Matters to ``stale`` alone.
        dampening_frac: See ``dampen``.
        order: See ``visiting_order``. The groups stay contiguous in storage; with ``activation`` their parameters are
            static, whatever ``params`` says.

    Returns:
        Codes and dequantized weight in storage order, the loss of each row, scales and zeros (None where the
        grid has none). The loss is ``sum_j (w_j - q_j)^2 / G_jj``, which equals the row's diagonal entry of
        ``(W - Q) H (W - Q).T`` in the damped problem.

    Raises:
        ArithmeticError: The damped Hessian is not positive definite.
    """
    current, damped = dampen(weight, hessian, dampening_frac)
    inverse = torch.linalg.inv(damped)
    static = order == "activation" or params == "static"
    groups = fit_groups(current, fit, group_size) if static else {}
    codes: dict[int, Tensor] = {}
    values = torch.zeros_like(current)
    loss = torch.zeros_like(current[:, 0])
    remaining = visiting_order(damped, order, group_size)
    lazy = current.clone()
    while remaining:
        col = remaining.pop(0)
        group = col // group_size
        if len(codes) % block_size == 0 and not static:
            lazy = current.clone()
        if group not in groups:
            source = lazy if params == "stale" else current
            start = group * group_size
            groups[group] = fit(source[:, start : start + group_size].clone())
        scale, zero = groups[group]
        codes[col] = encode(current[:, col].clone(), scale, zero)
        values[:, col] = decode(codes[col], scale, zero).double()
        pivot = float(inverse[col, col])
        if not pivot > 0:
            message = f"column {col}: the inverse Hessian has the pivot {pivot}"
            raise ArithmeticError(message)
        residual = current[:, col] - values[:, col]
        loss += (residual / pivot**0.5) ** 2
        for other in remaining:
            current[:, other] -= residual / pivot * inverse[col, other]
        inverse = inverse - torch.outer(inverse[:, col], inverse[col, :]) / pivot
    stored = torch.stack([codes[col] for col in range(current.shape[1])], dim=1)
    return stored, values, loss, *stack_groups(groups)
