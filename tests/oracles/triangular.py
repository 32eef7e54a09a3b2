"""Relatives of GPTQ, each from the formulas of its paper, with explicit inverses and one column at a time.

All take a Hessian that is damped already, the columns in the order of the visits, and ``rounded(col, current)``, which
returns what column ``col`` of the weight as it is now is rounded to.

References:
    Li et al. 2025, GPTAQ, arXiv:2504.02692, its update with the decomposition into neurons.
    Zheng et al. 2025, FOEM, arXiv:2507.11017.
    Zhang et al. 2025, Qronos, arXiv:2505.11695, its first iteration and its equivalent form for the others.
    K-best search: arXiv:2602.05902.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Rounded: TypeAlias = Callable[[int, Tensor], Tensor]


def gptaq_oracle(
    weight: Float[Tensor, "out in"],
    damped: Float[Tensor, "in in"],
    deviation: Float[Tensor, "in in"],
    *,
    rounded: Rounded,
    order: Sequence[int],
    alpha: float,
) -> Float[Tensor, "out in"]:
    """Spread each error as GPTQ does, and ``alpha w_j (ΔX X_qᵀ)_jt (H_tt)⁻¹`` over the columns ``t`` that are left."""
    current, values = weight.clone(), torch.zeros_like(weight)
    left = list(order)
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        col = left.pop(0)
        own = current[:, col].clone()
        values[:, col] = rounded(col, current)
        current[:, left] -= torch.outer((own - values[:, col]) / inverse[0, 0], inverse[0, 1:])
        if left:
            pull = deviation[col, left] @ torch.linalg.inv(damped[left][:, left])
            current[:, left] += alpha * torch.outer(own, pull)
    return values


def foem_oracle(
    weight: Float[Tensor, "out in"],
    damped: Float[Tensor, "in in"],
    *,
    rounded: Rounded,
    order: Sequence[int],
    beta: float,
) -> Float[Tensor, "out in"]:
    """Spread ``(w_j − q_j) − beta (w_j − w⁰_j)``."""
    current, values = weight.clone(), torch.zeros_like(weight)
    left = list(order)
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        col = left.pop(0)
        values[:, col] = rounded(col, current)
        error = (current[:, col] - values[:, col]) - beta * (current[:, col] - weight[:, col])
        current[:, left] -= torch.outer(error / inverse[0, 0], inverse[0, 1:])
    return values


def qronos_oracle(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    cross: Float[Tensor, "in in"],
    *,
    damping: float,
    rounded: Rounded,
    order: Sequence[int],
) -> Float[Tensor, "out in"]:
    """Round the first column exactly, re-target the others by one solve, and spread their errors as GPTQ does.

    ``hessian`` and ``cross``, the mean of ``x_f x_qᵀ``, come without damping, which is added to both for the solve.
    """
    current, values = weight.clone(), torch.zeros_like(weight)
    first, left = order[0], list(order[1:])
    others = weight[:, left] @ hessian[left, first]
    current[:, first] = (weight @ cross[:, first] - others) / hessian[first, first]
    values[:, first] = rounded(first, current)
    identity = damping * torch.eye(len(hessian), dtype=hessian.dtype)
    wanted = weight @ (cross + identity)[:, left] - torch.outer(values[:, first], hessian[first, left])
    current[:, left] = torch.linalg.solve((hessian + identity)[left][:, left], wanted.T).T
    while left:
        inverse = torch.linalg.inv((hessian + identity)[left][:, left])
        col = left.pop(0)
        values[:, col] = rounded(col, current)
        current[:, left] -= torch.outer((current[:, col] - values[:, col]) / inverse[0, 0], inverse[0, 1:])
    return values


def beam_oracle(
    weight: Float[Tensor, " in"],
    damped: Float[Tensor, "in in"],
    *,
    levels: Sequence[Float[Tensor, " levels"]],
    order: Sequence[int],
    beams: int,
) -> tuple[Float[Tensor, " in"], float]:
    """Search one row; the score of a partial row is the least loss that any real values of the others leave.

    Args:
        weight: Full-precision row. Not modified.
        damped: Hessian. Not modified.
        levels: The values that each column may have.
        order: Columns in the order of the visits.
        beams: How many partial rows are kept.

    Returns:
        The best row, and its loss.
    """
    kept: list[list[float]] = [[]]
    for step, col in enumerate(order):
        done, left = list(order[:step]), list(order[step:])
        later = left[1:]
        with_col = [*done, col]
        reduced = damped[with_col][:, with_col]
        if later:
            across = damped[with_col][:, later]
            reduced = reduced - across @ torch.linalg.inv(damped[later][:, later]) @ across.T
        branches: list[tuple[float, list[float]]] = []
        for values in kept:
            error = weight[done] - torch.tensor(values, dtype=weight.dtype)
            best = torch.linalg.solve(damped[left][:, left], -damped[left][:, done] @ error)
            aim = float(weight[col] - best[0])
            for level in sorted(set(levels[col].tolist()), key=lambda level: abs(level - aim))[:2]:
                tried = torch.cat([error, (weight[col] - level).reshape(1)])
                branches.append((float(tried @ reduced @ tried), [*values, level]))
        branches.sort(key=lambda branch: branch[0])
        score, kept = branches[0][0], [values for _, values in branches[:beams]]
    found = torch.zeros_like(weight)
    found[list(order)] = torch.tensor(kept[0], dtype=weight.dtype)
    return found, score
