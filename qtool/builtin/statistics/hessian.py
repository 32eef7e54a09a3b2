"""Hessian of a linear's squared error: the token-weighted mean of x xᵀ (Frantar et al. 2023, arXiv:2210.17323).

Whole, or the blocks along its diagonal alone, which are what errors inside of a group depend on and take ``n * 128``
numbers in place of ``n²``.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.gather import Gathering
from qtool.numerics.moments import add_block_moments, add_second_moment
from qtool.numerics.second_moments import block_size


class HessianAccumulator:
    """Sums w x xᵀ, all of it or its diagonal blocks, and w in float32."""

    def __init__(self, n: int, gathering: Gathering, device: torch.device, *, whole: bool = True) -> None:
        size = block_size(n)
        self.sum = torch.zeros((n, n) if whole else (n // size, size, size), device=device)
        self.add = add_second_moment if whole else add_block_moments
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.gathering, self.seen = gathering, 0

    def update(self, x: Float[Tensor, "tokens n"]) -> None:
        """Add some tokens."""
        scales = self.gathering.scales(x, self.seen)
        self.seen += x.shape[0]
        if scales is None:
            self.weight += x.shape[0]
        else:
            self.weight += scales.double().square().sum()
            x = x * scales[:, None]
        self.add(self.sum, x)

    def result(self) -> Float[Tensor, "*blocks n n"]:
        """Return the weighted mean, symmetric."""
        lower = self.sum / self.weight.clamp_min(torch.finfo(torch.float32).tiny).float()
        return torch.tril(lower) + torch.tril(lower, -1).mT


class Hessian:
    """The statistic ``hessian``."""

    version = 1
    of_products: Literal[True] = True

    def start(self, n: int, gathering: Gathering, device: torch.device) -> HessianAccumulator:
        """Return an accumulator for a site."""
        return HessianAccumulator(n, gathering, device)

    def nbytes(self, n: int, gathering: Gathering) -> int:
        """Return the bytes of the matrix in float32."""
        del gathering
        return 4 * n * n


class HessianBlocks:
    """The statistic ``hessian_blocks``: the Hessian's diagonal blocks of ``block_size(n)`` channels."""

    version = 1
    of_products: Literal[True] = True

    def start(self, n: int, gathering: Gathering, device: torch.device) -> HessianAccumulator:
        """Return an accumulator for a site."""
        return HessianAccumulator(n, gathering, device, whole=False)

    def nbytes(self, n: int, gathering: Gathering) -> int:
        """Return the bytes of the blocks in float32."""
        del gathering
        return 4 * n * block_size(n)
