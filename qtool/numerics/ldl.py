"""GPTQ's factor as linear feedback: the LDL decomposition of the Hessian, which QuIP's LDLQ rounds with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LinearFeedback:
    """``H = (F + I) D (F + I)ᵀ`` in the order in which columns are visited.

    Attributes:
        feedback: ``F``, strictly upper triangular. Column ``k`` is rounded to
            ``Q(w_k + Σ_{i<k} (w_i - q_i) F_ik)``, from the weight as it was.
        pivots: The diagonal of ``D``. ``Σ_k D_k r_k²`` is the loss, with ``r_k`` what rounding column ``k`` did.
    """

    feedback: Float[Tensor, "in in"]
    pivots: Float[Tensor, " in"]

    def trace_fraction(self) -> float:
        """Return ``tr(D) / tr(H)``.

        Where nothing clips, LDLQ loses ``step²/12 tr(D)`` a row on average, and rounding to nearest
        ``step²/12 tr(H)``.
        """
        pivots = self.pivots.double()
        trace = (pivots * (1 + self.feedback.double().square().sum(0))).sum()
        return float(pivots.sum() / trace)


def linear_feedback(upper: Float[Tensor, "in in"]) -> LinearFeedback:
    """Turn the factor of the inverse into the LDL decomposition of the Hessian.

    From ``Uᵀ U = H⁻¹`` follows ``H = U⁻¹ U⁻ᵀ``, so ``F + I`` is ``U⁻¹`` with its columns divided by their diagonal
    entries ``1 / U_kk``, and ``D_k = 1 / U_kk²``.

    Args:
        upper: ``U``, upper triangular with positive diagonal. Not modified.

    Returns:
        Feedback and pivots.

    References:
        Chee et al. 2023, QuIP, arXiv:2307.13304, section 3 and theorem 6.
    """
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    diagonal = upper.diagonal()
    inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
    return LinearFeedback((inverse * diagonal).triu_(1), diagonal.square().reciprocal())
