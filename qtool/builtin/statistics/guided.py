"""Hessians of groups of a linear's rows, weighed by gradients: GuidedQuant, Kim et al. 2025, arXiv:2505.07004.

``H_k = Σ_t s_tk x_t x_tᵀ / Σ_t s_tk`` with the saliency ``s_tk`` of token t at the outputs of group k.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.builtin.statistics.saliency import GROUPS
from qtool.engine.gather import Gathering
from qtool.numerics.moments import add_second_moment


class GuidedAccumulator:
    """Sums s x xᵀ and s of each group in float32."""

    def __init__(self, n: int, saliency: Float[Tensor, "tokens groups"]) -> None:
        self.saliency, self.seen = saliency, 0
        self.sums = torch.zeros(saliency.shape[1], n, n, device=saliency.device)

    def update(self, x: Float[Tensor, "tokens n"]) -> None:
        """Add some tokens."""
        scales = self.saliency[self.seen : self.seen + len(x)].sqrt()
        for total, scale in zip(self.sums, scales.T, strict=True):
            add_second_moment(total, x * scale[:, None])
        self.seen += len(x)

    def result(self) -> Float[Tensor, "groups n n"]:
        """Return the weighted means, symmetric; zero for a group whose errors cost nothing."""
        weights = self.saliency[: self.seen].double().sum(0).clamp_min(torch.finfo(torch.float32).tiny).float()
        for total, weight in zip(self.sums, weights, strict=True):  # one at a time: there may be no room for all twice
            total /= weight
            total.copy_(torch.tril(total) + torch.tril(total, -1).T)
        return self.sums


class GuidedHessians:
    """The statistic ``guided_hessians``."""

    version = 1

    def start_guided(self, n: int, saliency: Float[Tensor, "tokens groups"]) -> GuidedAccumulator:
        """Return an accumulator for the input of a linear."""
        return GuidedAccumulator(n, saliency)

    def nbytes(self, n: int, gathering: Gathering) -> int:
        """Return the bytes of the matrices in float32, of a linear with as many outputs as groups or more."""
        del gathering
        return 4 * n * n * GROUPS
