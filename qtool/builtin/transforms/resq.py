"""ResQ: the principal subspace of activations in 8 bits, the rest in 4 (Saxena et al. 2024, arXiv:2412.14363).

The residual is turned into ``U = P blkdiag(R_low, R_high)``: ``P`` holds the eigenvectors of the normalised residual's
second moments in ascending order, summed over all inputs that read it; random rotations spread what is inside of each
of the two subspaces. The last channels, 1/8 of them, become a segment of their own format at all these inputs. Each
key/value head is turned likewise, by the second moments of its values behind attention (their mean over the query
heads that share it), and a gather in front of attention's output projection puts the strong channels of all heads at
the end. The input of down projections is turned by block Hadamards online, without a segment.

``U`` and the value heads are folded. The gather and the Hadamards run online.

Left out: the paper also sets apart channels of keys in the KV cache; qtool's caches have one format.

A segment ends where scale groups end, as in ``atom``: it is the multiple of the group nearest to the share.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, lcm

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from qtool.builtin.transforms.atom import scale_groups, segment_channels
from qtool.errors import UsageError
from qtool.model.graph import RESIDUAL
from qtool.model.plan import Proposal, Segment, TransformContext
from qtool.numerics.operators import Hadamard, Operator, Orthogonal, Perm
from qtool.numerics.random_orthogonal import random_orthogonal
from qtool.numerics.second_moments import diagonal_blocks


@dataclass(frozen=True)
class ResQConfig:
    """Options of ResQ.

    Attributes:
        share: Part of the channels that is set apart.
        outlier_format: What they are quantized in.
        block: Widest Hadamard at the input of down projections, a power of two; the widest that divides it is taken.
    """

    share: float = 0.125
    outlier_format: str = "int8"
    block: int = 256

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range.
        """
        if not 0 < self.share <= 0.5:
            raise UsageError("`share` is above 0 and up to 0.5", facts=(("received", self.share),))
        if self.block < 1 or self.block & (self.block - 1):
            raise UsageError("`block` must be a power of two", facts=(("received", self.block),))


class ResQ:
    """Proposes the bases, the gather and the segments."""

    version = 1
    needs = ("hessian",)
    Config = ResQConfig

    def plan(self, context: TransformContext, config: ResQConfig) -> Proposal:
        """Return operators and segments of the whole model."""
        graph = context.graph
        generator = torch.Generator().manual_seed(context.seed)
        operators: dict[str, list[Operator]] = {}
        segments: dict[str, tuple[Segment, ...]] = {}
        readers = [
            site
            for layer in range(graph.dims.num_layers)
            for name in graph.input_sites_of(layer)
            if graph.from_residual(name) and graph.consumers(site := graph.site(f"layers.{layer}.{name}"))
        ]
        hidden = graph.dims.hidden
        groups = lcm(*(scale_groups(context, site) for site in readers))
        high = segment_channels(round(config.share * hidden), hidden, groups)
        total = torch.zeros(hidden, hidden, dtype=torch.float64)
        for site in readers:
            total += context.residual[site.id].need("hessian", site=site.id).double()
            if high:
                segments[site.id] = (Segment(high, config.outlier_format),)
        operators[RESIDUAL] = [Orthogonal(split_basis(total, high, generator))]
        for layer in range(graph.dims.num_layers):
            for site in graph.of_kind("vo", layer):
                found = _heads(context, config, layer, generator)
                operators |= {site.id: [found.rotation], f"layers.{layer}.o_in": [found.gather]}
                segments |= {f"layers.{layer}.o_in": found.segments} if found.segments else {}
            for site in graph.of_kind("up_down", layer):
                operators[site.id] = [Hadamard(site.dim, block_size=gcd(config.block, site.dim))]
        return Proposal(operators, segments)


@dataclass(frozen=True)
class _Heads:
    """What happens to the value heads of a block."""

    rotation: Orthogonal
    gather: Perm
    segments: tuple[Segment, ...]


def _heads(context: TransformContext, config: ResQConfig, layer: int, generator: torch.Generator) -> _Heads:
    """Return the bases of a block's value heads, and what brings their strong channels together."""
    dims, site = context.graph.dims, context.graph.site(f"layers.{layer}.o_in")
    size, heads = dims.value_dim, dims.num_heads
    heads_of = f"layers.{layer}.vo"
    hessian = context.statistics[heads_of].need("hessian", site=heads_of).double()
    moments = value_moments(hessian, size, dims.group)
    apart = segment_channels(round(config.share * site.dim), site.dim, scale_groups(context, site))
    high = max(1, apart // heads) if apart else 0
    rotation = Orthogonal(split_basis(moments, high, generator), heads=len(moments))
    strong = torch.arange(site.dim) % size >= size - high
    gather = Perm(torch.argsort(strong.to(torch.uint8), stable=True))
    return _Heads(rotation, gather, (Segment(apart, config.outlier_format),) if apart else ())


def value_moments(hessian: Float[Tensor, "n n"], size: int, group: int) -> Float[Tensor, "kv_heads size size"]:
    """Return the second moments of each value head behind attention, as a mean over the query heads that share it.

    Args:
        hessian: Of what the output projection reads: heads side by side, those that share values next to each other.
            Not modified.
        size: Channels of a head.
        group: Query heads that share a value head.
    """
    return diagonal_blocks(hessian, size).reshape(-1, group, size, size).mean(1)


def split_basis(
    moments: Float64[Tensor, "*heads n n"], high: int, generator: torch.Generator
) -> Float64[Tensor, "*heads n n"]:
    """Return ``P blkdiag(R_low, R_high)``: weak directions first, the ``high`` strongest last, each rotated inside.

    Args:
        moments: Symmetric and positive semidefinite. Not modified.
        high: How many directions are strong.
        generator: Draws the rotations.

    References:
        Saxena et al. 2024, ResQ, arXiv:2412.14363, section 3.
    """
    vectors = torch.linalg.eigh((moments + moments.mT) / 2).eigenvectors
    count, low = (None if moments.ndim == 2 else len(moments)), moments.shape[-1] - high
    parts = (vectors[..., :low], vectors[..., low:])
    turned = [part @ random_orthogonal(part.shape[-1], generator, count=count) for part in parts if part.shape[-1]]
    return torch.cat(turned, dim=-1)
