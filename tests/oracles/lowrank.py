"""The smallest error that a rank-r correction of a quantized weight can reach.

All are one theorem: the best rank-r ``C`` under ``||(E - C) S||_F`` for an invertible ``S`` is the truncated
SVD of ``E S`` times the inverse of ``S``, and what is left is the sum of sigma_i^2 for i > r.

References:
    Eckart and Young 1936. Yao et al. 2023, ZeroQuant-V2 (LoRC), arXiv:2303.08302: ``S = I``.
    Zhang et al. 2024, LQER, arXiv:2402.02446 (L2QER): ``S`` is the diagonal of normalized mean magnitudes.
    Zhang et al. 2024, QERA, arXiv:2410.06040, theorem 1: ``S`` is the square root of the autocorrelation; theorem 2:
    that of its diagonal.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def output_error(error: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]) -> float:
    """Compute ``tr(E H E.T)`` row by row."""
    error, hessian = error.double(), hessian.double()
    return sum((float(row @ hessian @ row) for row in error), 0.0)


def matrix_root(hessian: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return the symmetric square root; eigenvalues below 1e-12 of the largest are noise and count as 0."""
    values, vectors = torch.linalg.eigh(hessian.double())
    kept = torch.where(values > 1e-12 * values.max(), values, 0.0)
    root: Tensor = vectors @ torch.diag(kept.sqrt()) @ vectors.T
    return root


def weighted_oracle(
    error: Float[Tensor, "out in"], factor: Float[Tensor, "in in"], rank: int
) -> tuple[Float[Tensor, "out in"], float]:
    """Find the rank-r ``C`` that minimizes ``||(E - C) S||_F^2``.

    Args:
        error: ``E = W - W_hat``. Not modified.
        factor: ``S``. Directions that it maps to 0 get a correction of 0.
        rank: Largest rank of the correction.

    Returns:
        The correction, and the smallest loss, ``sum_{i > r} sigma_i(E S)^2``.
    """
    factor = factor.double()
    u, sigma, vh = torch.linalg.svd(error.double() @ factor, full_matrices=False)
    kept = u[:, :rank] @ torch.diag(sigma[:rank]) @ vh[:rank]
    return kept @ torch.linalg.pinv(factor, rtol=1e-10), sum((float(s) ** 2 for s in sigma[rank:]), 0.0)


def lorc_oracle(
    weight: Float[Tensor, "out in"], quantized: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "out in"], float]:
    """Return the best rank-r correction under the plain Frobenius norm, and that norm squared."""
    return weighted_oracle(weight.double() - quantized.double(), torch.eye(weight.shape[1]), rank)


def qera_oracle(
    weight: Float[Tensor, "out in"],
    quantized: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    rank: int,
) -> tuple[Float[Tensor, "out in"], float]:
    """Return the best rank-r correction under ``tr(E H E.T)``, and that loss."""
    return weighted_oracle(weight.double() - quantized.double(), matrix_root(hessian), rank)


def l2qer_oracle(
    weight: Float[Tensor, "out in"],
    quantized: Float[Tensor, "out in"],
    mean_abs: Float[Tensor, " in"],
    rank: int,
) -> tuple[Float[Tensor, "out in"], float]:
    """Return the best rank-r correction under normalized mean magnitudes of the inputs, and what is left in them."""
    scales = mean_abs.double() / (mean_abs.double().min() * mean_abs.double().max()).sqrt()
    return weighted_oracle(weight.double() - quantized.double(), torch.diag(scales), rank)


def qera_approx_oracle(
    weight: Float[Tensor, "out in"],
    quantized: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    rank: int,
) -> tuple[Float[Tensor, "out in"], float]:
    """Return the best rank-r correction under the diagonal of ``H``, and what is left under it."""
    scales = hessian.double().diagonal().sqrt()
    return weighted_oracle(weight.double() - quantized.double(), torch.diag(scales), rank)
