"""Random orthogonal matrices, drawn uniformly."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor


def random_orthogonal(n: int, generator: torch.Generator, *, count: int | None = None) -> Float64[Tensor, "*count n n"]:
    """Draw orthogonal matrices from the uniform (Haar) distribution.

    The orthogonal factor of a Gaussian matrix is uniform once the signs of its triangular factor's diagonal, which
    the factorization leaves open, are made positive.

    Args:
        n: Order.
        generator: Source of the randomness, on the CPU.
        count: How many; None for one without a leading axis.

    References:
        Mezzadri 2007, How to generate random matrices from the classical compact groups, arXiv:math-ph/0609050.
    """
    leading = () if count is None else (count,)
    gaussian = torch.randn(*leading, n, n, generator=generator, dtype=torch.float64, device=generator.device)
    q, r = torch.linalg.qr(gaussian)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q)
    drawn: Tensor = (q * signs[..., None, :]).contiguous()
    return drawn
