"""What an error of each token costs at a linear's outputs: GuidedQuant, Kim et al. 2025, arXiv:2505.07004.

The mean of the squared gradient over contiguous groups of output channels, up to a power of two.
"""

from __future__ import annotations

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from qtool.engine.gather import Gathering
from qtool.numerics.saliency import group_saliency, scaled_saliency

GROUPS = 4
"""The paper's number of groups for models of 7 to 13 billion weights."""


class SaliencyAccumulator:
    """Keeps a row for each token."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.rows: list[Tensor] = []

    def update(self, x: Float[Tensor, "tokens n"]) -> None:
        """Add the gradients of some tokens."""
        self.rows.append(group_saliency(x, self.groups).cpu())

    def result(self) -> BFloat16[Tensor, "tokens groups"]:
        """Return the rows in the order of the tokens."""
        return scaled_saliency(torch.cat(self.rows)).bfloat16()


class Saliency:
    """The statistic ``saliency``."""

    version = 1

    def start_gradient(self, n: int, gathering: Gathering, device: torch.device) -> SaliencyAccumulator:
        """Return an accumulator for a linear."""
        del n, gathering, device
        return SaliencyAccumulator(GROUPS)
