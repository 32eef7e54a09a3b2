"""Optimal brain quantization with the inverse of what is left computed afresh at every step.

References:
    Frantar and Alistarh 2022, Optimal Brain Compression, arXiv:2208.11580, section 5, with its rule for outliers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def nearest_level(value: float, levels: Sequence[float]) -> float:
    """Return the level nearest to a value."""
    return min(levels, key=lambda level: abs(level - value))


def far_outside(value: float, levels: Sequence[float]) -> float:
    """Return how far a value is beyond the ends of the grid, or 0 for up to half of the step at that end."""
    ordered = sorted(set(levels))
    if value > ordered[-1] + (ordered[-1] - ordered[-2]) / 2:
        return value - ordered[-1]
    if value < ordered[0] - (ordered[1] - ordered[0]) / 2:
        return ordered[0] - value
    return 0.0


def obq_oracle(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    levels: Sequence[Float[Tensor, "out levels"]],
    outliers_first: bool = True,
) -> tuple[Float[Tensor, "out in"], list[list[int]]]:
    """Round each row in its own order.

    Args:
        weight: Full-precision weight. Not modified.
        hessian: Symmetric and positive definite, damped already. Not modified.
        levels: The values of the grid for each column.
        outliers_first: Whether weights far outside of the grid come before all others.

    Returns:
        The values, and the order of each row.
    """
    weight, hessian = weight.double().clone(), hessian.double()
    orders = []
    for row, current in enumerate(weight):
        left, order = list(range(len(current))), []
        allowed = [levels[col][row].tolist() for col in left]
        while left:
            inverse = torch.linalg.inv(hessian[left][:, left])
            rounded = [nearest_level(float(current[col]), allowed[col]) for col in left]
            costs = []
            for place, col in enumerate(left):
                off = far_outside(float(current[col]), allowed[col]) if outliers_first else 0.0
                error = float(current[col]) - rounded[place]
                costs.append((-off, error**2 / float(inverse[place, place])))
            chosen = min(range(len(left)), key=costs.__getitem__)
            step = (float(current[left[chosen]]) - rounded[chosen]) / float(inverse[chosen, chosen])
            current[left] -= step * inverse[chosen]
            current[left[chosen]] = rounded[chosen]
            order.append(left.pop(chosen))
        orders.append(order)
    return weight, orders
