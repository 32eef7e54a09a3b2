"""SmoothQuant: per-channel scales that move outliers from activations to weights (Xiao et al. 2023, arXiv:2211.10438).

``s_j = max|X_j|**alpha / max_i|W_ij|**(1 - alpha)``; activations are divided by s, which the norm in front absorbs, and
the columns of every linear behind it are multiplied. The weight's maximum runs over all linears that share the input.
Only inputs that a norm produces are smoothed, as in the paper; a channel that is never active keeps the scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.errors import UsageError
from qtool.model.plan import Proposal, TransformContext
from qtool.numerics.operators import Diag

SMALLEST = 1e-5


@dataclass(frozen=True)
class SmoothQuantConfig:
    """Options of SmoothQuant.

    Attributes:
        alpha: Share of the difficulty that moves into the weights, in [0, 1]. The paper uses 0.5; its Llama-2 and
            Llama-3 recipes 0.85, Mistral 0.8.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError("`alpha` must lie between 0 and 1", facts=(("received", self.alpha),))


def smoothing_scale(
    activations: Float[Tensor, " in"], weights: Float[Tensor, " in"], alpha: float
) -> Float[Tensor, " in"]:
    """Return ``s_j = max|X_j|**alpha / max|W_j|**(1 - alpha)``, at least 1e-5; 1 where either maximum is zero.

    Args:
        activations: Largest magnitude of each input channel over calibration tokens.
        weights: Largest magnitude of each input channel over all consumers.
        alpha: Share of the difficulty that moves into the weights.
    """
    scale = activations.clamp_min(SMALLEST) ** alpha / weights.clamp_min(SMALLEST) ** (1 - alpha)
    dead = (activations == 0) | (weights == 0)
    return torch.where(dead, torch.ones_like(scale), scale.clamp_min(SMALLEST))


class SmoothQuant:
    """Proposes a diagonal at every input that a norm produces."""

    version = 1
    needs = ("absmax",)
    Config = SmoothQuantConfig

    def plan(self, context: TransformContext, config: SmoothQuantConfig) -> Proposal:
        """Return ``T = diag(1/s)`` for each smoothed site."""
        graph = context.graph
        proposal = {}
        for layer in range(graph.dims.num_layers):
            for name in graph.input_sites_of(layer):
                if graph.norm_of(name) is None:
                    continue
                site = graph.site(f"layers.{layer}.{name}")
                absmax = context.statistics[site.id].need("absmax", site=site.id)
                maxima = [context.weights(linear.name).abs().amax(0) for linear in graph.consumers(site)]
                scale = smoothing_scale(absmax, torch.stack(maxima).amax(0), config.alpha)
                proposal[site.id] = [Diag(1 / scale)]
        return Proposal(proposal)
