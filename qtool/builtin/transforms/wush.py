"""WUSH: the closed-form block transform for both second moments (arXiv:2512.00956).

For each block of ``b`` channels, with ``M_W = WᵀW / out`` over the stacked rows of all linears that read the input and
``M_X`` the block of the Hessian, both dampened by ``λ tr / b``::

    M_W = L_W L_Wᵀ,   M_X = L_X L_Xᵀ,   L_Wᵀ L_X = U S Vᵀ
    T_act = H S^-½ Uᵀ L_Wᵀ,   T_wgt = H S^-½ Vᵀ L_Xᵀ = T_act^-ᵀ      (x̂ᵀ = T_act xᵀ)

Weights and activations then have the same second moment ``H S Hᵀ``, and with the Hadamard matrix ``H / √b`` every
channel of a block has the same energy. Among all ``T`` it has the least product of the two sides' energies, which is
what rounding with a scale a block loses. ``T_actᵀ`` runs online.

The moments are those of the statistics, and must know of tokens with massive activations: with token weights other than
``uniform`` they do not, and these tokens' outliers are mixed into every channel (measured in ``recipes/README.md``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.builtin.transforms.block_hadamard import BlockOptions, blocked_sites
from qtool.errors import UsageError
from qtool.model.graph import EXPERTS, Site
from qtool.model.plan import Proposal, TransformContext
from qtool.numerics.hadamard import hadamard_matrix
from qtool.numerics.operators import Block, Operator
from qtool.numerics.second_moments import cholesky, dampened, diagonal_blocks, limit_condition, weight_moment_blocks
from qtool.scheme import ModelScheme

FINE_GROUP = 16
"""Most values to an E4M3 scale for which blocks are not rotated by themselves."""


@dataclass(frozen=True)
class AffineBlockConfig(BlockOptions):
    """Options of the transforms that are made from both second moments.

    Attributes:
        dampening: ``λ``, added to the diagonal of either moment as a fraction of its mean, in (0, 10]. The more
            there is, the less the transform depends on the calibration text.
        max_condition: Largest condition number of a block's transform, 1 or more; its singular values are clamped.
        hadamard: Rotate each block by a Hadamard matrix at the end, so that all of its channels have like energies.
            ``auto`` does so, as the papers do, unless groups of at most 16 have E4M3 scales (NVFP4): there a rotation
            was measured to cost more than it gains, most with the heavy-tailed inputs of down projections.
    """

    dampening: float = 0.01
    max_condition: float = 1000.0
    hadamard: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        """Refuse values that no matrix can have."""
        super().__post_init__()
        if not 0 < self.dampening <= 10:
            raise UsageError(
                "`dampening` must lie above 0 and be at most 10",
                facts=(("received", self.dampening),),
                hint="--set dampening=0.1",
            )
        if not self.max_condition >= 1:
            raise UsageError(
                "`max_condition` must be 1 or more",
                facts=(("received", self.max_condition),),
                hint="--set max-condition=1000",
            )


@dataclass(frozen=True)
class Moments:
    """Dampened second moments of one site in blocks, float64.

    Attributes:
        weights: ``M_W`` of all consumers together.
        inputs: ``M_X``.
    """

    weights: Float[Tensor, "blocks b b"]
    inputs: Float[Tensor, "blocks b b"]


class WUSH:
    """Proposes a block-diagonal matrix at every input site."""

    version = 1
    needs = ("hessian",)
    Config = AffineBlockConfig

    def plan(self, context: TransformContext, config: AffineBlockConfig) -> Proposal:
        """Return one ``T = blkdiag(T_actᵀ)`` a site; an expert of which no statistics were gathered is left out.

        Raises:
            ArtifactError: The statistics hold no Hessian.
            NumericalError: A second moment is not positive definite even with the dampening.
            UsageError: The model has no sites of a kind that was asked for.
        """
        return affine_blocks(context, config, wush_matrices)


def affine_blocks(
    context: TransformContext, config: AffineBlockConfig, matrices_of: Callable[[Tensor, Tensor], Tensor]
) -> Proposal:
    """Return blocks made from both second moments at every input site.

    Args:
        context: Gives statistics, weights and the scheme.
        config: Where, how large, how dampened.
        matrices_of: Makes matrices ``[blocks, b, b]`` of the dampened moments of weights and of inputs.
    """
    operators: dict[str, list[Operator]] = {}
    for site, block in blocked_sites(context, config):
        moments = site_moments(context, site, block, config.dampening)
        if moments is not None:
            matrices = finished(matrices_of(moments.weights, moments.inputs), config, *context.schemes_at(site))
            operators[site.id] = [Block(matrices, site.dim)]
    return Proposal(operators)


def wush_matrices(
    weights: Float[Tensor, "*blocks b b"], inputs: Float[Tensor, "*blocks b b"]
) -> Float[Tensor, "*blocks b b"]:
    """Return ``T = L_W U S^-½``, which makes both second moments the same diagonal ``S``; nothing is rotated yet.

    Args:
        weights: ``M_W``, positive definite. Not modified.
        inputs: ``M_X``, positive definite. Not modified.

    Returns:
        ``T`` with ``Tᵀ M_X T = T⁻¹ M_W T⁻ᵀ = S``, descending.

    Raises:
        NumericalError: A block is not positive definite.
    """
    left = cholesky(weights)
    u, s, _ = torch.linalg.svd(left.mT @ cholesky(inputs))
    t: Tensor = (left @ u) * s.rsqrt().unsqueeze(-2)
    return t


def site_moments(context: TransformContext, site: Site, block: int, dampening: float) -> Moments | None:
    """Return the dampened second moments of a site; None for an expert of which nothing was gathered.

    Raises:
        ArtifactError: The statistics hold no Hessian.
    """
    statistics = context.statistics[site.id]
    if site.name.startswith(EXPERTS) and not statistics.entries:
        return None
    hessian = statistics.need("hessian", site=site.id)
    consumers = (context.weights(linear.name) for linear in context.graph.consumers(site))
    return Moments(
        dampened(weight_moment_blocks(consumers, block), dampening),
        dampened(diagonal_blocks(hessian, block), dampening),
    )


def finished(
    matrices: Float[Tensor, "blocks b b"], config: AffineBlockConfig, *schemes: ModelScheme
) -> Float[Tensor, "blocks b b"]:
    """Limit the condition number, rotate where that is asked or helps, and store in float32."""
    limited = limit_condition(matrices, config.max_condition)
    if config.hadamard == "on" or (config.hadamard == "auto" and not all(map(_is_fine, schemes))):
        size = matrices.shape[-1]
        limited = limited @ (hadamard_matrix(size).to(limited) / sqrt(size))
    return limited.to(torch.float32)


def _is_fine(scheme: ModelScheme) -> bool:
    """Say whether scales follow each outlier so closely that spreading it does not pay."""
    parts = [part for part in (scheme.weights, scheme.activations) if part is not None]
    return bool(parts) and all(
        part.scale == "e4m3" and part.group_size is not None and part.group_size <= FINE_GROUP for part in parts
    )
