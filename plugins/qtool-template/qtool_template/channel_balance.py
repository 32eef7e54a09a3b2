"""Channel balance: scale the input channels of down_proj towards one common magnitude.

``T = diag(t)`` with ``t_j = (g / a_j)**strength``, where ``a_j`` is channel j's largest magnitude over calibration
tokens and ``g`` the geometric mean of all. Outlier channels shrink, so a scale that many channels share fits more of
them; down_proj's columns grow in turn. A diagonal passes the product with the gate, so up_proj absorbs it and nothing
runs online. It is SmoothQuant's idea at the one site that SmoothQuant leaves out, without a look at the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.errors import UsageError
from qtool.model.plan import Proposal, TransformContext
from qtool.numerics.operators import Diag, Operator

SITE = "up_down"


@dataclass(frozen=True)
class ChannelBalanceConfig:
    """Options, given as ``--set strength=0.7``.

    Attributes:
        strength: 0 leaves every channel as it is, 1 gives all of them the same magnitude.
    """

    strength: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UsageError("`strength` must lie between 0 and 1", facts=(("received", self.strength),))


def balancing_factors(absmax: Float[Tensor, " n"], strength: float) -> Float[Tensor, " n"]:
    """Return ``(g / absmax_j)**strength`` with ``g`` the geometric mean; 1 for a channel that is never active.

    Args:
        absmax: Largest magnitude of each channel, in units of the activations. Not modified.
        strength: In [0, 1].

    Returns:
        Positive factors, without unit, whose geometric mean over active channels is 1.
    """
    active = absmax > 0
    logs = torch.where(active, absmax, 1.0).double().log()
    common = logs.sum() / active.sum().clamp_min(1)
    return torch.where(active, torch.exp(strength * (common - logs)), 1.0).to(absmax.dtype)


class ChannelBalance:
    """Proposes one diagonal a block."""

    version = 1
    needs = ("absmax",)
    Config = ChannelBalanceConfig

    def plan(self, context: TransformContext, config: ChannelBalanceConfig) -> Proposal:
        """Return a diagonal in front of every down_proj."""
        proposal: dict[str, list[Operator]] = {}
        for site in context.graph.of_kind(SITE):
            absmax = context.statistics[site.id].need("absmax", site=site.id)
            proposal[site.id] = [Diag(balancing_factors(absmax, config.strength))]
        return Proposal(proposal)
