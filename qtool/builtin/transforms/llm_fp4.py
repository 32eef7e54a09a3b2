"""LLM-FP4: pre-shifted exponent biases, powers of two for each channel (Liu et al. 2023, arXiv:2310.16836).

A float with a real exponent bias ``b`` is one with a real scale ``2^-b``. Activations that share one scale have
channels of very different ranges; the paper gives each a bias of its own that differs from the tensor's by an integer::

    b_j = 2^E - log2(max|X_j|) + log2(2 - 2^-M) - 1,   rho = min_j b_j,   k_j = clamp(round(b_j - rho), 0, 2^E - 1)

and folds what differs into the weights: ``X_j 2^k_j`` and ``W_j 2^-k_j``. So ``b_j - rho = log2(max|X| / max|X_j|)``
whatever the format's mantissa, and no channel passes the tensor's largest value by more than ``sqrt(2)``. Powers of two
change no mantissa: the model in full precision stays what it was, bit for bit.

The paper's search for real biases is a search for real scales, which rounding does: of weights, by the output's error,
``--weights fp4-channel-sfp32 --method rtn --set clip=search --set clip_metric=output --set clip_ceiling=1.75``; of the
tensor of activations, likewise, ``--activations fp4-tensor-static`` (``qtool.engine.static_scales``). Its search over
formats, ``fp4``, ``fp4_e1m2`` and ``fp4_e3m0``, is ``qtool inspect PLAN --activations fp4-tensor-static --activations
fp4_e1m2-tensor-static …``, whose ``least_activations`` is a scheme with exceptions for ``--activations``. Left out: to
do weights and activations in turn several times.

Shifted are all inputs whose scales are absorbed in front: behind norms, value heads, and inputs of down projections
whose gate lets a scale pass. A channel that is never active keeps the scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.builtin.transforms.awq import HEADS, by_value_head, scaled_kinds
from qtool.errors import UsageError
from qtool.model.graph import EXPERTS, Site
from qtool.model.plan import Proposal, TransformContext
from qtool.numerics.operators import Diag


@dataclass(frozen=True)
class LLMFP4Config:
    """Options of LLM-FP4.

    Attributes:
        largest: The largest shift, ``2^E - 1`` in the paper: 3 for E2M1.
        sites: Kinds of sites joined by commas, such as ``attn_in,mlp_in``; ``all`` for every one whose scales the
            modules in front absorb.
    """

    largest: int = 3
    sites: str = "all"

    def __post_init__(self) -> None:
        """Refuse shifts that are none, or beyond those of any small float."""
        if not 1 <= self.largest <= 31:
            raise UsageError(f"`largest` is a shift from 1 to 31, not {self.largest}", hint="--set largest=3")


class LLMFP4:
    """Proposes a diagonal of powers of two at every input that something in front can absorb."""

    version = 1
    needs = ("absmax",)
    Config = LLMFP4Config

    def plan(self, context: TransformContext, config: LLMFP4Config) -> Proposal:
        """Return ``T = diag(2^k)`` for each site.

        Raises:
            UsageError: The model has no sites of a kind.
            ArtifactError: The statistics lack the largest magnitude.
        """
        proposal = {}
        for kind in scaled_kinds(context, config.sites, heads=True):
            for site in context.graph.of_kind(kind):
                absmax = _largest_magnitude(context, site) if "diag" in site.foldable else None
                if absmax is not None:
                    scale = torch.exp2(exponent_shifts(absmax, config.largest))
                    proposal[site.id] = [Diag(scale, heads=len(scale) if scale.ndim > 1 else 1)]
        return Proposal(proposal)


def exponent_shifts(absmax: Float[Tensor, "*heads n"], largest: int) -> Float[Tensor, "*heads n"]:
    """Return ``k_j = clamp(round(log2(max_i a_i / a_j)), 0, largest)``; 0 for a channel that is never active.

    Args:
        absmax: Largest magnitude ``a_j`` of each channel over calibration tokens. Not modified.
        largest: The largest shift.
    """
    active = absmax > 0
    ratio = absmax.double().amax() / torch.where(active, absmax, 1.0).double()
    return torch.where(active, ratio.log2().round().clamp(0, largest), 0.0).to(absmax.dtype)


def _largest_magnitude(context: TransformContext, site: Site) -> Float[Tensor, "*heads n"] | None:
    """Return ``max|X_j|``, of value heads over the query heads that share one; None for an expert without tokens."""
    if site.name != HEADS:
        statistics = context.statistics[site.id]
        if site.name.startswith(EXPERTS) and not statistics.entries:
            return None
        return statistics.need("absmax", site=site.id)
    largest = by_value_head(context.statistics[site.id].need("absmax", site=site.id), site).amax(1)
    return largest if site.heads > 1 else largest[0]
