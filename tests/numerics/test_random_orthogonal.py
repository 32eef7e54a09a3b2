"""Random orthogonal matrices: orthogonal, seeded, and uniform."""

from __future__ import annotations

import pytest
import torch

from qtool.numerics.random_orthogonal import random_orthogonal


@pytest.mark.parametrize("n", [1, 2, 7, 48])
def test_they_are_orthogonal(n: int) -> None:
    q = random_orthogonal(n, torch.Generator().manual_seed(n))
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)


def test_the_generator_decides() -> None:
    first, again, other = (random_orthogonal(5, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    several = random_orthogonal(5, torch.Generator().manual_seed(3), count=2)
    assert not torch.allclose(several[0], several[1])


def test_they_are_uniform() -> None:
    """Of a uniform matrix the trace has mean 0 and variance 1; a factorization's own signs give another mean."""
    q = random_orthogonal(4, torch.Generator().manual_seed(0), count=4000)
    traces = q.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(float(traces.mean())) < 0.06
    assert float(traces.var()) == pytest.approx(1, abs=0.1)
    assert float(q.mean(0).abs().max()) < 0.04
