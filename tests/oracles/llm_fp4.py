"""LLM-FP4's quantizer one value at a time, with real exponent biases (Liu et al. 2023, arXiv:2310.16836)."""

from __future__ import annotations

import math
from collections.abc import Sequence

EXPONENT_BITS, MANTISSA_BITS = 2, 1


def bias_of(amax: float, exponent_bits: int = EXPONENT_BITS, mantissa_bits: int = MANTISSA_BITS) -> float:
    """Return ``b = 2^E - log2(amax) + log2(2 - 2^-M) - 1``, at which ``amax`` is the largest value."""
    return 2**exponent_bits - math.log2(amax) + math.log2(2 - 2.0**-mantissa_bits) - 1


def quantize(x: float, bias: float, exponent_bits: int = EXPONENT_BITS, mantissa_bits: int = MANTISSA_BITS) -> float:
    """Return ``round(x / s) s`` with ``s = 2^(max(floor(log2|x| + b), 1) - M - b)``, within the largest value."""
    limit = (2 - 2.0**-mantissa_bits) * 2.0 ** (2**exponent_bits - 1 - bias)
    clipped = math.copysign(min(abs(x), limit), x)
    if clipped == 0:
        return 0.0
    scale = 2.0 ** (max(math.floor(math.log2(abs(clipped)) + bias), 1) - mantissa_bits - bias)
    return round(clipped / scale) * scale


def channel_shifts(maxima: Sequence[float]) -> list[int]:
    """Return the integers by which the biases of channels exceed the least of them, ``rho``."""
    biases = [bias_of(amax) for amax in maxima]
    return [min(max(round(bias - min(biases)), 0), 2**EXPONENT_BITS - 1) for bias in biases]


def searched_bias(row: Sequence[float], hessian: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Search 100 biases from 0.01 to 1.2 of the first for the least output error ``e H eᵀ`` of a row of weights."""
    start = bias_of(max(abs(value) for value in row))

    def error(bias: float) -> float:
        errors = [quantize(value, bias) - value for value in row]
        return sum(
            a * b * h for a, line in zip(errors, hessian, strict=True) for b, h in zip(errors, line, strict=True)
        )

    return min((error(bias), bias) for bias in (start * (0.01 + 1.19 * step / 99) for step in range(100)))


def searched_activation_bias(
    sample: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float]],
    amax: float,
    exponent_bits: int,
    mantissa_bits: int,
) -> tuple[float, dict[float, float]]:
    """Search 100 biases from 1/4 below that of ``amax`` to 6 above for the least error in ``x W^T``.

    Returns:
        The best, and the error of each.
    """
    fields = (exponent_bits, mantissa_bits)
    start = bias_of(amax, *fields)
    found = {}
    for bias in (start - 0.25 + 6.25 * step / 99 for step in range(100)):
        errors = [[quantize(x, bias, *fields) - x for x in token] for token in sample]
        outputs = [sum(e * w for e, w in zip(token, row, strict=True)) for token in errors for row in weights]
        found[bias] = sum(output**2 for output in outputs)
    return min(found, key=lambda bias: found[bias]), found
