"""What a linear is to make up for where it reads something else than in the full-precision model.

With ``x_f`` and ``x_q`` what it reads in the two, ``H`` the mean of ``x_q x_qᵀ`` and ``C`` that of ``x_f x_qᵀ``, the
output error ``‖Ŵ x_q − W x_f‖²`` is ``tr(V H Vᵀ) − 2 tr(W D Vᵀ)`` and a constant, with ``V = Ŵ − W`` and the deviation
``D = C − H``. Matrices are in the order in which columns are visited, and ``Uᵀ U = (H + λ I)⁻¹``.

References:
    Li et al. 2025, GPTAQ, arXiv:2504.02692.
    Zhang et al. 2025, Qronos, arXiv:2505.11695.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def carried_deviation(deviation: Float[Tensor, "in in"], upper: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Return ``P = triu(D Uᵀ, 1) U``: what one unit of a column adds to those after it, so that they make up for it.

    The columns ``t`` after ``j`` make up best for ``w_j (x_f − x_q)_j`` by ``w_j D_jt H_tt⁻¹``. Since ``H = U⁻¹ U⁻ᵀ``
    and the block ``tt`` of ``U⁻¹``, which is upper triangular, is ``U_tt⁻¹``, ``H_tt⁻¹`` is ``U_ttᵀ U_tt``. For ``k``
    in ``t``, row ``k`` of ``U`` is 0 outside of ``t``, so ``D_jt U_ttᵀ`` is row ``j`` of ``D Uᵀ`` behind its diagonal.

    Args:
        deviation: ``D``. Not modified.
        upper: ``U``. Not modified.

    Returns:
        The matrix, strictly upper triangular.
    """
    return ((deviation @ upper.T).triu_(1) @ upper).triu_(1)


def deviation_target(
    weight: Float[Tensor, "out in"],
    hessian_diagonal: Float[Tensor, " in"],
    deviation: Float[Tensor, "in in"],
    upper: Float[Tensor, "in in"],
) -> Float[Tensor, "out in"]:
    """Return the weight from which GPTQ makes the codes of Qronos.

    Qronos rounds its first column to the nearest of ``v = (W C_1 − W_t H_t1) / H_11 = w_1 + W D_1 / H_11``, which is
    best where all others stay. Then the others are re-targeted to the best there is with the first at its ``q``,
    ``[W (C + λ I)_t − q H_1t] (H + λ I)_tt⁻¹``, and GPTQ rounds them. The best there is with the first at any ``u`` is
    ``W̃_t + (u − W̃_1) U_1t / U_11``, where ``W̃ = W (C + λ I) (H + λ I)⁻¹ = W + W D Uᵀ U`` is best of all. GPTQ gets from
    ``u = v`` to ``u = q`` by its first update, so this starts it at ``v``, with the others best for that.

    Args:
        weight: ``W``, with its columns in the order of the visits. Not modified.
        hessian_diagonal: Of ``H``, without damping; no zeros.
        deviation: ``D``. Not modified.
        upper: ``U``. Not modified.

    Returns:
        The target, in the order of the visits; the weight itself where ``D`` is 0.
    """
    pull = weight @ deviation
    moved = pull @ upper.T @ upper
    first = pull[:, 0] / hessian_diagonal[0] - moved[:, 0]
    return weight + moved + torch.outer(first, upper[0] / upper[0, 0])
