"""SINQ: scales that give rows and columns of a weight equal spread (Müller et al. 2025, arXiv:2509.22944).

``W_ij = u_i v_j M_ij``, where the rows and columns of ``M`` have about equal standard deviation. They are found by
Sinkhorn-like steps on the logarithms of ``u`` and ``v``, from the weights alone. What is rounded is ``M``.

The column scale ``v`` is the transform: ``T = diag(v)`` in front, shared by the linears that read one input, whose
weights are stacked for the search (the paper's variant without cost at run time; it has a ``v`` for each linear
otherwise). It is folded into the norm in front, into up_proj in front of down_proj, and into v_proj in front of o_proj,
where the query heads that share a value head share its ``v``; without anything in front that could hold it, it runs
online. The row scale ``u`` needs no operator: a format with a scale a row or a group multiplies it into its scales
without changing a code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.errors import UsageError
from qtool.model.graph import Site
from qtool.model.plan import Proposal, TransformContext
from qtool.numerics.operators import Diag
from qtool.numerics.sinkhorn import sinkhorn_scales


@dataclass(frozen=True)
class SINQConfig:
    """Options of SINQ.

    Attributes:
        iterations: Steps of the search; the most balanced iterate is kept.
    """

    iterations: int = 16

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise UsageError("`iterations` must not be negative", facts=(("received", self.iterations),))


class SINQ:
    """Proposes a diagonal at every input of linears, for o_proj at the value heads."""

    version = 1
    needs: tuple[str, ...] = ()
    Config = SINQConfig

    def plan(self, context: TransformContext, config: SINQConfig) -> Proposal:
        """Return ``T = diag(v)`` for each site."""
        proposal = {}
        for site in _sites(context):
            weights = [context.weights(linear.name) for linear in context.graph.consumers(site)]
            if weights:
                stacked = torch.cat([by_repeat(weight, site) for weight in weights])
                column_scale = sinkhorn_scales(stacked, iterations=config.iterations)[1]
                by_head = column_scale.reshape(site.heads, site.dim) if site.heads > 1 else column_scale
                proposal[site.id] = [Diag(by_head, site.heads)]
        return Proposal(proposal)


def by_repeat(weight: Float[Tensor, "out in"], site: Site) -> Float[Tensor, "out repeat channels"]:
    """Return a weight's columns as ``[repeat, heads * dim]``: those of one entry of the site lie along ``repeat``."""
    heads, dim = site.heads, site.dim
    return weight.reshape(len(weight), heads, -1, dim).transpose(1, 2).flatten(2)


def _sites(context: TransformContext) -> Iterator[Site]:
    """Yield the input sites, ``vo`` in place of ``o_in``."""
    graph = context.graph
    for layer in range(graph.dims.num_layers):
        for name in graph.input_sites_of(layer):
            if name != "o_in":
                yield graph.site(f"layers.{layer}.{name}")
        yield from graph.of_kind("vo", layer)
