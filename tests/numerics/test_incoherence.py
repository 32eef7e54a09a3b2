"""Incoherence: the scale is the best of all diagonals, and widths split as they should."""

from __future__ import annotations

import pytest
import torch

from qtool.numerics.hadamard import hadamard_matrix
from qtool.numerics.incoherence import incoherence_scale, kron_split, largest_hadamard_block


def test_the_scale_minimizes_the_product_that_it_is_for() -> None:
    """``sum(h / s^2) sum(w s^2)`` is at least ``sum(sqrt(h w))^2``, which only this scale reaches."""
    g = torch.Generator().manual_seed(0)
    h, w = (torch.rand(16, generator=g, dtype=torch.float64) ** 3 + 1e-3 for _ in range(2))
    scale = incoherence_scale(h, w)

    def product(s: torch.Tensor) -> float:
        return float((h / s**2).sum() * (w * s**2).sum())

    assert product(scale) == pytest.approx(float((h * w).sqrt().sum() ** 2), rel=1e-12)
    for _ in range(20):
        noise = 0.1 * torch.randn(16, generator=g, dtype=torch.float64)
        assert product(scale * noise.exp()) > product(scale)
    torch.testing.assert_close(h / scale**2, w * scale**2)


def test_dead_channels_keep_their_scale() -> None:
    scale = incoherence_scale(torch.tensor([0.0, 16.0, 0.0, 81.0]), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert scale.tolist() == [1.0, 1.0, 1.0, 3.0]


@pytest.mark.parametrize("n", [1, 2, 13, 26, 36, 40, 576, 1536, 11008, 14336])
def test_kronecker_orders_are_the_nearest(n: int) -> None:
    pairs = [(p, n // p) for p in range(1, n + 1) if n % p == 0 and p <= n // p]
    assert kron_split(n) == min(pairs, key=lambda pair: pair[1] - pair[0])


@pytest.mark.parametrize(
    ("n", "block"), [(1, 1), (2, 2), (6, 2), (9, 1), (12, 12), (18, 2), (40, 40), (44, 44), (576, 576), (50, 2)]
)
def test_the_largest_hadamard_block(n: int, block: int) -> None:
    assert largest_hadamard_block(n) == block
    matrix = hadamard_matrix(block).double()
    assert torch.equal(matrix @ matrix.T, block * torch.eye(block, dtype=torch.float64))


@pytest.mark.parametrize("n", range(1, 61))
def test_no_larger_hadamard_block_exists(n: int) -> None:
    """Below 92 a matrix of every multiple of four is known."""
    orders = [m for m in range(1, n + 1) if n % m == 0 and (m < 3 or m % 4 == 0)]
    assert largest_hadamard_block(n) == max(orders)
