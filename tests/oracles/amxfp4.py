"""AMXFP4 one value at a time, as Lee et al. 2024, arXiv:2411.09909, have it: a shared scale for each sign."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from tests.oracles.rounding import E2M1_MAX, decode_e2m1, encode_e2m1, mx_exponent


def shared_scales(block: Sequence[float], *, power_of_two: bool = False) -> tuple[float, float]:
    """Return ``max(x⁺) / 6`` and ``max|x⁻| / 6`` in E5M2, or their powers of two; 1 for a side without values."""
    sides = [[max(sign * value, 0.0) for value in block] for sign in (1.0, -1.0)]
    found = []
    for side in sides:
        if not any(side):
            found.append(1.0)
        elif power_of_two:
            found.append(2.0 ** mx_exponent(side, "even"))
        else:
            found.append(float(np.float32(max(side) / E2M1_MAX).astype(ml_dtypes.float8_e5m2)) or 2.0**-16)
    return found[0], found[1]


def round_block(block: Sequence[float], *, power_of_two: bool = False) -> tuple[list[int], list[float]]:
    """Return the codes of a block and what they decode to: a code's sign says which scale it has."""
    above, below = shared_scales(block, power_of_two=power_of_two)
    codes = [encode_e2m1(value / (below if value < 0 else above)) for value in block]
    return codes, [decode_e2m1(code) * (below if code >= 8 else above) for code in codes]
