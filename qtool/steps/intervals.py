"""How sure a mean is: standard errors, and confidence intervals from few values by Student's distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

CONFIDENCE = 0.95


def standard_error(values: Sequence[float]) -> float:
    """Return ``s / sqrt(n)``, with the sample's standard deviation ``s`` (divisor ``n - 1``), of two values or more."""
    return stdev(values) / math.sqrt(len(values))


def quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return the ``t`` for which a Student variable lies in ``[-t, t]`` with a probability of ``confidence``.

    Args:
        degrees: Degrees of freedom, one or more: one less than the number of values.
        confidence: In ``(0, 1)``.
    """
    low, high = 0.0, 1.0
    while coverage(high, degrees) < confidence:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        if coverage(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return high


def coverage(t: float, degrees: int) -> float:
    """Return the probability that a Student variable lies in ``[-t, t]``, by its finite series.

    With ``theta = atan(t / sqrt(degrees))`` and ``c = cos(theta)**2`` it is ``sin(theta) (1 + c/2 + c**2 3/8 + …)``
    for even degrees and ``2/pi (theta + sin(theta) cos(theta) (1 + 2/3 c + …))`` for odd ones.

    Args:
        t: Half the width of the interval, not negative.
        degrees: Degrees of freedom, one or more.

    References:
        Abramowitz and Stegun 1964, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    theta = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term, total = 1.0, 0.0
    for index in range(degrees // 2):
        total += term
        term *= math.cos(theta) ** 2 * (2 * index + 1 + odd) / (2 * index + 2 + odd)
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * math.cos(theta) * total)
    return math.sin(theta) * total
