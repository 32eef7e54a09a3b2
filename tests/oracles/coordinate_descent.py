"""Coordinate descent by trying every value of the grid, with the whole loss computed for each.

References:
    Behdin et al. 2023, QuantEase, arXiv:2309.01885: the problem of one coordinate; sweeps without rounding.
    Nair and Suggala 2024, CDQuant, arXiv:2406.17542: the coordinate that gains most.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
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


def relaxed_descent_oracle(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    start: Float[Tensor, "out in"],
    *,
    levels: Sequence[Float[Tensor, "out levels"]],
    order: Sequence[int],
    sweeps: int,
    relax_every: int,
) -> tuple[Float[Tensor, "out in"], list[Float[Tensor, "out in"]]]:
    """Visit columns in order; a sweep without rounding puts the minimum of the whole loss into each entry, the sweep
    behind it the level with the least loss, even if what was there had less.

    Returns:
        The best of each row among the start and what sweeps with rounding left, and what each of these left.
    """
    weight, hessian, values = weight.double(), hessian.double(), start.double().clone()
    best, left, relaxed = values.clone(), [], False
    for sweep in range(1, sweeps + 1):
        was_relaxed, relaxed = relaxed, sweep % relax_every == 0 and sweep < sweeps
        for row in range(len(weight)):
            for col in order:
                tried = values[row].clone()

                def loss(value: float, row: int = row, col: int = col, tried: Tensor = tried) -> float:
                    tried[col] = value
                    return quadratic_loss(weight[row] - tried, hessian)

                now = float(values[row, col])
                if relaxed:  # the parabola through three of its points
                    low, middle, high = loss(now - 1), loss(now), loss(now + 1)
                    values[row, col] = now + (low - high) / (2 * (low - 2 * middle + high))
                    continue
                least = min(levels[col][row].tolist(), key=loss)
                if was_relaxed or loss(least) < loss(now) * (1 - 1e-12):
                    values[row, col] = least
        if not relaxed:
            left.append(values.clone())
            for row in range(len(weight)):
                losses = (quadratic_loss(weight[row] - one[row], hessian) for one in (values, best))
                if next(losses) < next(losses):
                    best[row] = values[row]
    return best, left


def greedy_descent_oracle(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    start: Float[Tensor, "out in"],
    *,
    levels: Sequence[Float[Tensor, "out levels"]],
    steps: int,
) -> Float[Tensor, "out in"]:
    """In each row, ``steps`` times, try every level of every entry, and make the change that leaves the least loss."""
    weight, hessian, values = weight.double(), hessian.double(), start.double().clone()
    for row in range(len(weight)):
        for _ in range(steps):
            least, found = quadratic_loss(weight[row] - values[row], hessian) * (1 - 1e-12), None
            for col, of_column in enumerate(levels):
                tried = values[row].expand(of_column.shape[1], -1).clone()
                tried[:, col] = of_column[row]
                losses = torch.einsum("li,ij,lj->l", weight[row] - tried, hessian, weight[row] - tried)
                if float(losses.min()) < least:
                    least, found = float(losses.min()), tried[int(losses.argmin())]
            if found is None:
                break
            values[row] = found
    return values
