"""Atom: channels in the order of their energy, the strongest of them in 8 bits (Zhao et al. 2024, arXiv:2310.19102).

At the input of every quantized linear, channels are sorted by ``Σ_t x_tj²``, the diagonal of the Hessian, and the last
``outliers`` of them become a segment of their own format, for activations and weights alike. The order is a permutation
online in front of norms and of attention's output projection, as in the paper, which gathers channels inside its fused
norm; at ``up_down`` the rows of what writes the site move instead. Linears that share an input share its order.

A segment ends where scale groups end: it is the multiple of the group nearest to ``outliers``, one group at least and
half of the channels at most. A site whose channels are all in one group is left as it is.

The paper quantizes in groups of 128, clips activations to 0.9 and weights to 0.85 of their range, and rounds by GPTQ:
that is the scheme and the mitigator, not the transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import torch

from qtool.errors import UsageError
from qtool.model.graph import EXPERTS, Site
from qtool.model.plan import Proposal, Segment, TransformContext
from qtool.numerics.operators import Operator, Perm


@dataclass(frozen=True)
class AtomConfig:
    """Options of Atom.

    Attributes:
        outliers: How many channels of each input are set apart.
        outlier_format: What they are quantized in.
    """

    outliers: int = 128
    outlier_format: str = "int8"

    def __post_init__(self) -> None:
        """Refuse no outliers at all.

        Raises:
            UsageError: ``outliers`` is not positive.
        """
        if self.outliers < 1:
            raise UsageError("`outliers` must be positive", facts=(("received", self.outliers),))


class Atom:
    """Proposes a permutation and a segment at every input site."""

    version = 1
    needs = ("hessian",)
    Config = AtomConfig

    def plan(self, context: TransformContext, config: AtomConfig) -> Proposal:
        """Return the channels of each site in ascending order of energy, the last of them set apart.

        An expert that no token was sent to keeps its order.
        """
        graph = context.graph
        operators: dict[str, list[Operator]] = {}
        segments: dict[str, tuple[Segment, ...]] = {}
        for layer in range(graph.dims.num_layers):
            for name in graph.input_sites_of(layer):
                site = graph.site(f"layers.{layer}.{name}")
                width = graph.width(name)
                channels = segment_channels(config.outliers, width, scale_groups(context, site))
                known = context.statistics[site.id]
                unseen = name.startswith(EXPERTS) and not known.entries
                if not graph.consumers(site) or not channels or unseen:
                    continue
                energy = known.need("hessian", site=site.id).diagonal()
                operators[site.id] = [Perm(torch.argsort(energy, stable=True))]
                segments[site.id] = (Segment(channels, config.outlier_format),)
        return Proposal(operators, segments)


def segment_channels(wished: int, width: int, group: int) -> int:
    """Return how many channels to set apart: the multiple of the group nearest to what is wished.

    Args:
        wished: How many channels.
        width: Channels of the site.
        group: Channels that share a scale; 1 where all of them do.

    Returns:
        At least a group and at most half of the channels; 0 where there is only one group.

    Example:
        >>> segment_channels(128, 4096, 128), segment_channels(200, 4096, 96), segment_channels(128, 128, 128)
        (128, 192, 0)
    """
    most = width // 2 // group
    return group * min(max(1, round(wished / group)), most)


def scale_groups(context: TransformContext, site: Site) -> int:
    """Return the channels after which scale groups of weights and of activations both end; 1 without groups."""
    parts = (part for one in context.schemes_at(site) for part in (one.weights, one.activations))
    sizes = [part.group_size for part in parts if part is not None and part.group_size]
    if context.scheme.scale_per_head and site.kind == "o_in":
        sizes.append(context.graph.dims.head_dim)
    return lcm(*sizes)
