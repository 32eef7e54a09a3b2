"""CAT: the block transform that balances concentration and alignment (arXiv:2603.04359).

For each block of channels, with the second moments ``Σ_w = WᵀW / out`` over all linears that read the input and ``Σ_x``
the block of the Hessian, both dampened::

    M = (Σ_w # Σ_x⁻¹)^½,   x → x M,   W → W M⁻¹,   then a block Hadamard on both

``A # B`` is the geometric mean of matrices. ``M`` is symmetric, and makes ``M Σ_x M = M⁻¹ Σ_w M⁻¹``. It equals the
transform of ``wush`` up to a rotation of each block: WUSH turns to the common eigenvectors before its Hadamard, CAT
stays as near to the original channels as it can.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from qtool.builtin.transforms.wush import AffineBlockConfig, affine_blocks
from qtool.model.plan import Proposal, TransformContext
from qtool.numerics.second_moments import geometric_mean, matrix_power


class CAT:
    """Proposes a block-diagonal matrix at every input site."""

    version = 1
    needs = ("hessian",)
    Config = AffineBlockConfig

    def plan(self, context: TransformContext, config: AffineBlockConfig) -> Proposal:
        """Return one ``T = blkdiag(M H)`` a site; an expert of which no statistics were gathered is left out.

        Raises:
            ArtifactError: The statistics hold no Hessian.
            NumericalError: A second moment is not positive definite even with the dampening.
            UsageError: The model has no sites of a kind that was asked for.
        """
        return affine_blocks(context, config, cat_matrices)


def cat_matrices(
    weights: Float[Tensor, "*blocks b b"], inputs: Float[Tensor, "*blocks b b"]
) -> Float[Tensor, "*blocks b b"]:
    """Return ``M = (Σ_w # Σ_x⁻¹)^½``; nothing is rotated yet.

    Args:
        weights: ``Σ_w``, positive definite. Not modified.
        inputs: ``Σ_x``, positive definite. Not modified.

    Returns:
        The symmetric ``M`` with ``M Σ_x M = M⁻¹ Σ_w M⁻¹``.

    Raises:
        NumericalError: A block is not positive definite.
    """
    return matrix_power(geometric_mean(weights, matrix_power(inputs, -1.0)), 0.5)
