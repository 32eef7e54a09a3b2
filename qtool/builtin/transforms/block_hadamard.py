"""Block Hadamard: rotations as wide as a scale group (MR-GPTQ, arXiv:2509.23202; BRQ, arXiv:2511.04214).

``T = blkdiag(H_B, H_B, …) / √B`` at the input of every quantized linear, run online; weights get the same. A rotation
of a whole vector carries the energy of outliers into all scale groups. One that is aligned with the groups of a block
format spreads them within their own group only. For NVFP4 that is 16 channels, for MXFP4 32.

Where the block does not divide a width, the largest power of two that divides both is taken instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import torch

from qtool.errors import UsageError
from qtool.model.graph import Site
from qtool.model.plan import Proposal, TransformContext
from qtool.numerics.hadamard import random_signs
from qtool.numerics.operators import Hadamard, Operator

WITHOUT_GROUPS = 128


@dataclass(frozen=True)
class BlockOptions:
    """Where blocks lie, for every method that has some.

    Attributes:
        block: Channels of a block, a power of two. None is the scale group of the scheme's weights, else of its
            activations, else 128.
        sites: Kinds of input sites joined by commas, such as ``attn_in,mlp_in``; ``all`` for every one that a
            quantized linear reads.
    """

    block: int | None = None
    sites: str = "all"

    def __post_init__(self) -> None:
        """Refuse blocks that have no Hadamard matrix of Sylvester's."""
        if self.block is not None and (self.block < 1 or self.block & (self.block - 1)):
            raise UsageError("`block` must be a power of two", facts=(("received", self.block),), hint="--set block=16")


@dataclass(frozen=True)
class BlockHadamardConfig(BlockOptions):
    """Options of the block rotation.

    Attributes:
        random: Random signs in front of the rotation, other ones at each site.
    """

    random: bool = False


class BlockHadamard:
    """Proposes a block Hadamard at every input site."""

    version = 1
    needs: tuple[str, ...] = ()
    Config = BlockHadamardConfig

    def plan(self, context: TransformContext, config: BlockHadamardConfig) -> Proposal:
        """Return one Hadamard operator a site.

        Raises:
            UsageError: The model has no sites of a kind that was asked for.
        """
        generator = torch.Generator().manual_seed(context.seed)
        operators: dict[str, list[Operator]] = {}
        for site, block in blocked_sites(context, config):
            signs = random_signs(site.dim, generator).to(torch.int8) if config.random else None
            operators[site.id] = [Hadamard(site.dim, signs=signs, block_size=block)]
        return Proposal(operators)


def blocked_sites(context: TransformContext, options: BlockOptions) -> Iterator[tuple[Site, int]]:
    """Yield each site that a method of blocks acts on, with the channels of its blocks.

    Raises:
        UsageError: The model has no sites of a kind that was asked for.
    """
    graph, wanted = context.graph, _wanted(context, options)
    for layer in range(graph.dims.num_layers):
        for name in graph.input_sites_of(layer):
            site = graph.site(f"layers.{layer}.{name}")
            if site.kind in wanted and graph.consumers(site):
                yield site, block_size(options.block or scale_group(context, site), site.dim)


def scale_group(context: TransformContext, site: Site) -> int:
    """Return how many channels of a site share a scale: of weights, else of activations, else 128."""
    schemes = context.schemes_at(site)
    parts = (*(one.weights for one in schemes), *(one.activations for one in schemes))
    return next((part.group_size for part in parts if part is not None and part.group_size), WITHOUT_GROUPS)


def block_size(wished: int, width: int) -> int:
    """Return the wished block where it divides the width, else the largest power of two that divides both.

    A group that is no power of two has blocks of the largest one that divides it.

    Example:
        >>> block_size(32, 576), block_size(128, 576), block_size(96, 576)
        (32, 64, 32)
    """
    common = gcd(wished, width)
    return common & -common


def _wanted(context: TransformContext, options: BlockOptions) -> set[str]:
    """Return the kinds of sites that are asked for."""
    graph = context.graph
    kinds = dict.fromkeys(
        name.rpartition(".")[2] for layer in range(graph.dims.num_layers) for name in graph.input_sites_of(layer)
    )
    asked = set(kinds) if options.sites == "all" else set(options.sites.split(","))
    if unknown := sorted(asked - kinds.keys()):
        raise UsageError(
            f"this model has no input sites `{', '.join(unknown)}`",
            facts=(("input sites", ", ".join(kinds)),),
            hint=f"--set sites={','.join(kinds)}",
        )
    return asked
