"""Scales of rows and columns that give every row and every column of a matrix the same spread."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LEAST_STEP, LARGEST_STEP = 0.7, 2.0


def sinkhorn_scales(
    weight: Float[Tensor, "out repeat in"], *, iterations: int = 16
) -> tuple[Float[Tensor, " out"], Float[Tensor, " in"]]:
    """Balance a weight: ``W_ij / (u_i v_j)`` has rows and columns of about equal standard deviation.

    The logarithms of ``u`` and ``v`` grow by that of ``deviation / target`` of their rows and columns, at each step by
    a factor from 0.7 to 2; the target is the smallest deviation of the weight as it is given. Of all iterates, the
    first with the least imbalance (the largest deviation of a row or column over the smallest) is returned.

    A row or column without spread keeps the scale 1, and counts for nothing. Computed in the dtype of ``weight``, or
    in float32 where that is wider.

    Args:
        weight: ``W``; columns that share a scale lie along ``repeat``, as those of the query heads of one value head
            do. Not modified.
        iterations: Steps.

    Returns:
        ``u`` and ``v``. The geometric mean of ``v`` over live columns is 1.

    References:
        Müller et al. 2025, SINQ, arXiv:2509.22944, algorithm 1.
    """
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    squares = w.square()
    rows, columns = w.new_zeros(w.shape[0]), w.new_zeros(w.shape[2])
    row_spread, column_spread = w.std((1, 2), correction=0), w.std((0, 1), correction=0)
    live_rows, live_columns = row_spread > 0, column_spread > 0
    if not bool(live_rows.any()):
        return torch.ones_like(rows), torch.ones_like(columns)
    target = torch.cat([row_spread[live_rows], column_spread[live_columns]]).min()
    least, best = _imbalance(row_spread[live_rows], column_spread[live_columns]), (rows, columns)
    for _ in range(iterations):
        rows = rows + _log_step(row_spread, target, live_rows)
        columns = columns + _log_step(column_spread, target, live_columns)
        row_spread, column_spread = _spreads(w, squares, rows, columns)
        imbalance = _imbalance(row_spread[live_rows], column_spread[live_columns])
        if imbalance < least:
            least, best = imbalance, (rows, columns)
    rows, columns = best
    middle = columns[live_columns].mean()
    row_scale = torch.where(live_rows, (rows + middle).exp(), 1.0)
    return row_scale, torch.where(live_columns, (columns - middle).exp(), 1.0)


def _log_step(spread: Float[Tensor, " n"], target: Float[Tensor, ""], live: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
    step = (spread / target).clamp(LEAST_STEP, LARGEST_STEP).log()
    return torch.where(live, step, 0.0)


def _imbalance(rows: Float[Tensor, " a"], columns: Float[Tensor, " b"]) -> float:
    every = torch.cat([rows, columns])
    return float(every.max() / every.min())


def _spreads(
    w: Float[Tensor, "out repeat in"], squares: Float[Tensor, "out repeat in"], rows: Tensor, columns: Tensor
) -> tuple[Float[Tensor, " out"], Float[Tensor, " in"]]:
    """Return the standard deviations of ``W_ij / (u_i v_j)`` from its first two moments, without forming it."""
    u, v = (-rows).exp(), (-columns).exp()
    repeat = w.shape[1]
    of_row = (u * (w @ v).mean(1) / len(v), u.square() * (squares @ v.square()).mean(1) / len(v))
    over = len(u) * repeat
    of_column = (
        v * (u @ w.flatten(1)).reshape(repeat, -1).sum(0) / over,
        v.square() * (u.square() @ squares.flatten(1)).reshape(repeat, -1).sum(0) / over,
    )
    return _deviation(*of_row), _deviation(*of_column)


def _deviation(mean: Float[Tensor, " n"], mean_square: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    least = torch.finfo(mean.dtype).eps * mean_square
    return (mean_square - mean.square()).clamp_min(least).sqrt()
