"""DuQuant: block rotations against outliers, on both sides of a zig-zag order (Lin et al. 2024, arXiv:2406.01721).

At every input of linears activations become ``x diag(1/s) R1 P R2``. ``s`` is SmoothQuant's scale. ``R1`` rotates
blocks of channels and is built greedily: step by step the channel with a block's largest magnitude is spread over the
block. The permutation ``P`` deals the channels to blocks in a zig-zag, so that blocks become alike, and ``R2`` rotates
once more. The diagonal is folded where something in front can hold it; the rest runs online.

The search looks at a sample of token rows, and draws its random matrices once for all blocks of one size. It may end
with no rotation at all in a block that has no outliers. Rotations are stored in float32 and inverted where they are
used: exact, though orthogonal to seven digits only. The paper clips activations to 0.9 of their range and weights to
0.8; that is the preset ``DuQuant-W4A4KV4``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.builtin.transforms.smoothquant import smoothing_scale
from qtool.errors import UsageError
from qtool.model.graph import EXPERTS, Site
from qtool.model.plan import Proposal, TransformContext
from qtool.numerics.greedy_rotation import greedy_rotation, spreading_rotations
from qtool.numerics.operators import Block, Diag, Operator, Perm
from qtool.numerics.zigzag import zigzag_order

LARGEST_BLOCK = 128


@dataclass(frozen=True)
class DuQuantConfig:
    """Options of DuQuant.

    Attributes:
        alpha: Share of the difficulty that the scales move into the weights, in [0, 1].
        block_size: Channels that are rotated together. None: the largest power of two that divides the width, up to
            the paper's 128.
        steps: Greedy steps of each rotation at the most; the best one is kept.
    """

    alpha: float = 0.6
    block_size: int | None = None
    steps: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError("`alpha` must lie between 0 and 1", facts=(("received", self.alpha),))
        for name in ("block_size", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"`{name}` must be at least 1", facts=(("received", value),))


class DuQuant:
    """Proposes a diagonal, a rotation, an order and a second rotation at every input of linears."""

    version = 1
    needs: tuple[str, ...] = ("absmax", "sample")
    Config = DuQuantConfig

    def plan(self, context: TransformContext, config: DuQuantConfig) -> Proposal:
        """Return ``diag(1/s) R1 P R2`` for each input site that calibration saw tokens of.

        Raises:
            UsageError: The block size does not divide a width.
        """
        graph = context.graph
        generator = torch.Generator().manual_seed(context.seed)
        drawn: dict[int, Tensor] = {}
        proposal: dict[str, list[Operator]] = {}
        for layer in range(graph.dims.num_layers):
            for name in graph.input_sites_of(layer):
                site = graph.site(f"layers.{layer}.{name}")
                statistics = context.statistics[site.id]
                if name.startswith(EXPERTS) and not statistics.entries:
                    continue
                absmax, sample = (statistics.need(entry, site=site.id) for entry in self.needs)
                if not len(sample) or not graph.consumers(site):
                    continue
                size = _block_size(site, config)
                if size not in drawn:
                    drawn[size] = spreading_rotations(size, config.steps, generator)
                maxima = [context.weights(linear.name).abs().amax(0) for linear in graph.consumers(site)]
                smooth = Diag(1 / smoothing_scale(absmax, torch.stack(maxima).amax(0), config.alpha))
                proposal[site.id] = [smooth, *rotations(smooth.act(sample), drawn[size])]
        return Proposal(proposal)


def rotations(sample: Float[Tensor, "tokens n"], drawn: Float[Tensor, "steps size size"]) -> list[Operator]:
    """Return ``R1 P R2`` for smoothed activations; only ``R1`` where all channels are one block, nothing for size 1.

    Args:
        sample: Token rows.
        drawn: Rotations with a constant first row, one a step.
    """
    size, n = drawn.shape[-1], sample.shape[-1]
    blocks = n // size
    if size == 1:
        return []
    operators: list[Operator] = [_rotation(sample, drawn)]
    if blocks > 1:
        sample = operators[0].act(sample)
        order = Perm(zigzag_order(sample.abs().amax(0), blocks))
        operators += [order, _rotation(order.act(sample), drawn)]
    return operators


def _rotation(sample: Float[Tensor, "tokens n"], drawn: Float[Tensor, "steps size size"]) -> Block:
    found = greedy_rotation(sample.reshape(len(sample), -1, drawn.shape[-1]), drawn)
    return Block(found.float(), sample.shape[-1])


def _block_size(site: Site, config: DuQuantConfig) -> int:
    if config.block_size is None:
        return min(site.dim & -site.dim, LARGEST_BLOCK)
    if site.dim % config.block_size:
        raise UsageError(
            f"the block size of `duquant` does not divide the input at `{site.id}`",
            facts=(("width", site.dim), ("received", config.block_size)),
            hint=f"leave `block_size` out, or use {min(site.dim & -site.dim, LARGEST_BLOCK)}",
        )
    return config.block_size
