"""The best low-rank approximation of a matrix, as two factors of equal size.

Quantization error is close to noise, whose singular values fall slowly. The randomized method then finds almost the
energy of the best subspace, not the subspace itself; that is why small matrices are decomposed exactly.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.errors import ShapeError

# Below this the exact decomposition takes seconds at most.
_EXACT_UP_TO = 1024
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4


def truncated_svd(
    error: Float[Tensor, "out in"], rank: int, *, seed: int = 0
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Factor the rank-r matrix nearest to ``E = U S Vᵀ``: ``(U_r S_r^½, S_r^½ V_rᵀ)``.

    Exact, unless the smaller side is over 1024 and over four times the rank: then by subspace iteration from a
    random start (16 extra directions, 4 iterations).

    Args:
        error: Matrix to approximate. Not modified.
        rank: Number of singular directions to keep, 1 to the smaller side.
        seed: Of the random start. The same on every device.

    Returns:
        ``up`` and ``down``, whose product is the approximation; each takes the square root of the singular values, so
        that both suit a 16-bit format. In the dtype of ``error``.

    Raises:
        ShapeError: The rank is not between 1 and the smaller side.

    References:
        Yao et al. 2023, ZeroQuant-V2, arXiv:2303.08302, section 5 (the split of the singular values).
        Halko et al. 2011, Finding structure with randomness, arXiv:0909.4061, algorithm 4.4.
    """
    smaller = min(error.shape)
    if not 1 <= rank <= smaller:
        raise ShapeError(f"a matrix of shape {tuple(error.shape)} has no part of rank {rank}", hint=f"rank={smaller}")
    if smaller > _EXACT_UP_TO and 4 * rank < smaller:
        basis = _range_basis(error, rank + _OVERSAMPLING, seed)
        inner, sigma, vh = torch.linalg.svd(basis.T @ error, full_matrices=False)
        u = basis @ inner
    else:
        u, sigma, vh = torch.linalg.svd(error, full_matrices=False)
    root = sigma[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(-1) * vh[:rank]


def _range_basis(matrix: Float[Tensor, "out in"], size: int, seed: int) -> Float[Tensor, "out size"]:
    """Return an orthonormal basis that holds most of the energy of ``matrix``; each step is made orthonormal anew."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], size, generator=generator, dtype=torch.float32)
    basis: Tensor = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return basis
