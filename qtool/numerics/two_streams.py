"""Second moments of two inputs of one layer: what a weight reads, and what it would read in full precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Of the mean second moment: settles directions that no input has where nothing is damped.
_FLOOR = 1e-10


@dataclass(frozen=True)
class TwoStreams:
    """``H = E x_q x_qᵀ``, ``C = E x_f x_qᵀ`` and ``R = E x_f x_fᵀ`` in float64, and what follows from them.

    Attributes:
        quantized: ``H``.
        cross: ``C``; its first index is of ``x_f``.
        full: ``R``.
        forward: ``(C - H) (H + λI)⁻¹``: what best predicts ``x_f`` from ``x_q``, less the identity.
        backward: ``(Cᵀ - R) (R + λI)⁻¹``: the same of ``x_q`` from ``x_f``.
    """

    quantized: Float[Tensor, "in in"]
    cross: Float[Tensor, "in in"]
    full: Float[Tensor, "in in"]
    forward: Float[Tensor, "in in"]
    backward: Float[Tensor, "in in"]

    @classmethod
    def of(
        cls,
        quantized: Float[Tensor, "in in"],
        cross: Float[Tensor, "in in"],
        full: Float[Tensor, "in in"],
        dampening_frac: float,
    ) -> TwoStreams:
        """Prepare both predictions.

        Args:
            quantized: ``H``. Not modified.
            cross: ``C``. Not modified.
            full: ``R``. Not modified.
            dampening_frac: λ of each as a fraction of its mean diagonal entry. It draws both predictions to the
                identity, which they are where both inputs are the same.
        """
        quantized, cross, full = quantized.double(), cross.double(), full.double()
        forward = divided(cross - quantized, quantized, dampening_frac)
        return cls(quantized, cross, full, forward, divided(cross.T - full, full, dampening_frac))

    def target(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return ``W C H⁻¹``: of all ``V``, ``V x_q`` is nearest to ``W x_f``. In the dtype of the weight."""
        return (weight.double() + weight.double() @ self.forward).to(weight.dtype)

    def wanted(self, weight: Float[Tensor, "out in"], decoded: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return ``T = (W R - Ŵ Cᵀ) R⁻¹``: ``T x_f`` is nearest to ``W x_f - Ŵ x_q``. In the dtype of the weight."""
        wide = decoded.double()
        return (weight.double() - wide - wide @ self.backward).to(weight.dtype)

    def energy(self, full: Float[Tensor, "out in"], quantized: Float[Tensor, "out in"]) -> float:
        """Return ``E ‖A x_f - Ŵ x_q‖²`` of two weights ``A`` and ``Ŵ``."""
        a, w = full.double(), quantized.double()
        return float((a @ self.full * a - 2 * (a @ self.cross * w) + w @ self.quantized * w).sum())


def divided(
    matrix: Float[Tensor, "in in"], moments: Float[Tensor, "in in"], dampening_frac: float
) -> Float[Tensor, "in in"]:
    """Return ``M (S + λI)⁻¹``."""
    mean = float(moments.diagonal().mean())
    damped = moments.clone()
    damped.diagonal().add_(max(dampening_frac, _FLOOR) * mean if mean > 0 else 1.0)
    divided: Tensor = torch.linalg.solve(damped, matrix.T)
    return divided.T
