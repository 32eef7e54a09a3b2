"""Coordinate descent by trying every value of the grid, with the whole loss computed for each.

References:
    Behdin et al. 2023, QuantEase, arXiv:2309.01885: the problem of one coordinate.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


def quadratic_loss(error: Float[Tensor, " in"], hessian: Float[Tensor, "in in"]) -> float:
    """Return ``e H e`` of one row."""
    return float(error @ hessian @ error)


def coordinate_descent_oracle(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    start: Float[Tensor, "out in"],
    *,
    levels: Sequence[Float[Tensor, "out levels"]],
    order: Sequence[int],
    sweeps: int,
) -> list[Float[Tensor, "out in"]]:
    """Visit columns in order; give each entry the level with the least loss of its row, or leave it on a tie.

    Args:
        weight: Full-precision weight. Not modified.
        hessian: Symmetric. Not modified.
        start: Where to start. Not modified.
        levels: The values of the grid for each column.
        order: Columns to visit.
        sweeps: How often.

    Returns:
        The values after each sweep.
    """
    weight, hessian, values = weight.double(), hessian.double(), start.double().clone()
    after = []
    for _ in range(sweeps):
        for row in range(len(weight)):
            for col in order:
                least = quadratic_loss(weight[row] - values[row], hessian)
                for level in levels[col][row].tolist():
                    tried = values[row].clone()
                    tried[col] = level
                    loss = quadratic_loss(weight[row] - tried, hessian)
                    if loss < least * (1 - 1e-12):
                        values[row], least = tried, loss
        after.append(values.clone())
    return after
