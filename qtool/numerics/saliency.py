"""How much an error of each token costs at a linear's output: GuidedQuant, Kim et al. 2025, arXiv:2505.07004.

To first order an error δ of the outputs z changes the loss ℓ by ⟨∂ℓ/∂z, δ⟩, so an error of token t at channel c counts
(∂ℓ/∂z_tc)². Contiguous groups of channels share the mean of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor


def row_groups(n_out: int, groups: int) -> tuple[slice, ...]:
    """Cut the rows of a weight into contiguous groups whose sizes differ by one at most, never more than rows."""
    count = min(groups, n_out)
    edges = [n_out * index // count for index in range(count + 1)]
    return tuple(slice(start, stop) for start, stop in pairwise(edges))


def group_saliency(gradient: Float[Tensor, "tokens out"], groups: int) -> Float[Tensor, "tokens groups"]:
    """Return the mean of (∂ℓ/∂z_tc)² over the channels c of each group, in float32 or wider.

    Args:
        gradient: The loss's gradient at the outputs of a linear.
        groups: How many groups; fewer where there are not as many channels.
    """
    squares = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square()
    return torch.stack([squares[:, rows].mean(-1) for rows in row_groups(gradient.shape[-1], groups)], dim=-1)


def scaled_saliency(saliency: Float[Tensor, "tokens groups"]) -> Float[Tensor, "tokens groups"]:
    """Multiply with the power of two that brings the mean between 1/2 and 1; zeros stay zeros.

    The mean of squared gradients may be smaller than what formats hold, and only their ratios matter.
    """
    mean = float(saliency.double().mean()) if saliency.numel() else 0.0
    return saliency * 2.0 ** -math.frexp(mean)[1] if mean > 0 and math.isfinite(mean) else saliency


def shared_saliency(saliencies: Sequence[Float[Tensor, "tokens _"]]) -> Float[Tensor, " tokens"]:
    """Return one weight for each token: the mean over linears, each divided by its mean over tokens and groups.

    Linears count alike, since the scale of a saliency says nothing. One that is zero everywhere does not count.

    Args:
        saliencies: Of the linears that read one site.
    """
    total = torch.zeros(len(saliencies[0]), dtype=torch.float64)
    for saliency in saliencies:
        of_tokens = saliency.double().mean(-1)
        mean = float(of_tokens.mean())
        if mean > 0:
            total += of_tokens / mean / len(saliencies)
    return total.float()
