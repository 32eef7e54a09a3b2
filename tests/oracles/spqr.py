"""SpQR weight by weight, with the inverse of what is left of the Hessian for every column.

Each group is fitted anew for each of its weights that is left out, and no factor occurs, so that this shares nothing
with the algorithm that it checks.

References:
    Dettmers et al. 2023, SpQR, arXiv:2306.03078, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class SpQROptions:
    """Bits and groups; `second_bits` is 0 for scales of one level, kept exactly."""

    num_bits: int
    group_size: int
    tau: float
    second_bits: int = 0
    second_group: int = 16


@dataclass(frozen=True)
class SpQRSolution:
    """Quantized weight, outlier places, and codes, -1 at outliers; all `[out, in]`."""

    weight: Tensor
    outliers: Tensor
    codes: Tensor


def fit(values: list[float], num_bits: int) -> tuple[float, float]:
    """Return scale and real zero point of values that are not all equal."""
    scale = (max(values) - min(values)) / (2**num_bits - 1)
    return scale, -min(values) / scale


def code(value: float, scale: float, zero: float, num_bits: int) -> int:
    """Return the code of a value."""
    return min(max(round(value / scale + zero), 0), 2**num_bits - 1)


def group_loss(values: list[float], pivots: list[float], num_bits: int) -> float:
    """Return `Σ (w - Q(w))² / U_jj²` of a group on its own range."""
    scale, zero = fit(values, num_bits)
    rounded = [scale * (code(value, scale, zero, num_bits) - zero) for value in values]
    return sum((value - near) ** 2 / pivot for value, near, pivot in zip(values, rounded, pivots, strict=True))


def second_level(values: list[float], bits: int, block: int) -> list[float]:
    """Quantize neighbours to a few bits on a range in float16."""
    quantized = []
    for start in range(0, len(values), block):
        own = values[start : start + block]
        low = float(torch.tensor(min(own)).half())
        step = float(torch.tensor(max(max(own) - low, 0.0) / (2**bits - 1)).half())
        codes = [min(max(round((value - low) / step), 0), 2**bits - 1) if step else 0 for value in own]
        quantized += [low + step * own_code for own_code in codes]
    return quantized


def likely_outliers(values: list[float], pivots: list[float], num_bits: int, threshold: float) -> list[bool]:
    """Say of each weight of a group whether the others lose so much less without it."""
    every = group_loss(values, pivots, num_bits)
    return [
        every - group_loss(values[:i] + values[i + 1 :], pivots[:i] + pivots[i + 1 :], num_bits) > threshold
        for i in range(len(values))
    ]


def fit_without(values: list[float], outliers: list[bool], num_bits: int) -> tuple[float, float]:
    """Fit a group with the mean of the others in place of outliers, or as it is where no two are left."""
    inside = [value for value, out in zip(values, outliers, strict=True) if not out]
    if len(inside) < 2:
        return fit(values, num_bits)
    mean = sum(inside) / len(inside)
    return fit([mean if out else value for value, out in zip(values, outliers, strict=True)], num_bits)


def spqr_oracle(weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], options: SpQROptions) -> SpQRSolution:
    """Quantize a weight.

    Args:
        weight: Full-precision weight. Not modified.
        hessian: Positive definite, damped already. Not modified.
        options: Bits, groups, threshold.
    """
    w, hessian, bits = weight.double().clone(), hessian.double(), options.num_bits
    n_out, n_in = w.shape
    left = [torch.linalg.inv(hessian[col:, col:]) for col in range(n_in)]
    pivots = [float(inverse[0, 0]) for inverse in left]  # U_jj²
    threshold = options.tau * sum(float(w[:, col].var()) / pivots[col] for col in range(n_in)) / n_in
    quantized, outliers, codes = torch.zeros_like(w), torch.zeros_like(w, dtype=torch.bool), -torch.ones_like(w).long()
    scales: list[float] = []
    zeros: list[float] = []
    for col in range(n_in):
        if col % options.group_size == 0:
            own = pivots[col : col + options.group_size]
            rows = [w[row, col : col + options.group_size].tolist() for row in range(n_out)]
            fitted = [fit_without(row, likely_outliers(row, own, bits, threshold), bits) for row in rows]
            scales, zeros = [scale for scale, _ in fitted], [zero for _, zero in fitted]
            if options.second_bits:
                scales = second_level(scales, options.second_bits, options.second_group)
                zeros = second_level(zeros, options.second_bits, options.second_group)
        for row in range(n_out):
            value, scale, zero = float(w[row, col]), scales[row], zeros[row]
            codes[row, col] = code(value, scale, zero, bits)
            quantized[row, col] = scale * (float(codes[row, col]) - zero)
            if (value - float(quantized[row, col])) ** 2 / pivots[col] > threshold:
                quantized[row, col] = float(torch.tensor(value).half())
                outliers[row, col], codes[row, col] = True, -1
            error = value - float(quantized[row, col])
            w[row, col + 1 :] -= error * left[col][0, 1:] / left[col][0, 0]
    return SpQRSolution(quantized, outliers, codes)
