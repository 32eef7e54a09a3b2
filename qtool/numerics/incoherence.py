"""Incoherence processing: scales, and sizes of the structured rotations that spread a weight's large entries."""

from __future__ import annotations

from math import isqrt

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.errors import ShapeError
from qtool.numerics.hadamard import hadamard_factors


def incoherence_scale(input_energy: Float[Tensor, " in"], weight_energy: Float[Tensor, " in"]) -> Float[Tensor, " in"]:
    """Return ``s_j = (H_jj / (W.T W)_jj) ** (1/4)``; 1 where either is zero.

    Columns of the weight are multiplied by it and inputs divided, which makes both energies equal: it minimizes
    ``trace(H) * ||W||_F^2`` over all diagonals.

    Args:
        input_energy: Diagonal of the Hessian ``H``, the mean square of each input channel.
        weight_energy: Sum of squares of each column, over all linears that share the input.

    References:
        Chee et al. 2023, QuIP, arXiv:2307.13304, section 4 and supplement B.
    """
    dead = (input_energy <= 0) | (weight_energy <= 0)
    one = torch.ones_like(input_energy)
    return torch.where(dead, one, torch.where(dead, one, input_energy / weight_energy) ** 0.25)


def kron_split(n: int) -> tuple[int, int]:
    """Split ``n = p q`` with ``p <= q`` as near to each other as they get; a prime gives ``(1, n)``."""
    return next((p, n // p) for p in range(isqrt(n), 0, -1) if n % p == 0)


def largest_hadamard_block(n: int) -> int:
    """Return the largest divisor of ``n`` that is the order of a Hadamard matrix."""
    return next(size for size in range(n, 0, -1) if n % size == 0 and _constructible(size))


def _constructible(order: int) -> bool:
    try:
        hadamard_factors(order)
    except ShapeError:
        return False
    return True
