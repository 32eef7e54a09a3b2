from __future__ import annotations

import pytest

from qtool.steps.intervals import coverage, quantile, standard_error

# Two-sided quantiles of Student's distribution, as every table of statistics prints them.
TABLE = [
    (1, 0.5, 1),
    (1, 0.95, 12.7062047362),
    (2, 0.95, 4.30265272975),
    (3, 0.95, 3.18244630528),
    (7, 0.95, 2.36462425159),
    (10, 0.95, 2.22813885199),
    (200, 0.95, 1.97189622363),
    (1, 0.99, 63.6567411629),
    (2, 0.5, 0.816496580928),
    (5, 0.99, 4.03214298356),
    (30, 0.99, 2.74999565357),
]


@pytest.mark.parametrize(("degrees", "confidence", "expected"), TABLE)
def test_quantile_is_that_of_students_distribution(degrees: int, confidence: float, expected: float) -> None:
    assert quantile(degrees, confidence) == pytest.approx(expected, rel=1e-10)


def test_coverage_of_one_degree_is_cauchys() -> None:
    assert coverage(1.0, 1) == pytest.approx(0.5)
    assert coverage(0.0, 7) == 0.0


def test_standard_error_divides_by_one_less_than_the_number() -> None:
    # s² = ((1-3)² + (2-3)² + (6-3)²) / 2 = 7
    assert standard_error([1.0, 2.0, 6.0]) == pytest.approx((7 / 3) ** 0.5)
