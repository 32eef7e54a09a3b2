"""The best low-rank approximation of a matrix, as two factors of equal size.

Quantization error is close to noise, whose singular values fall slowly. The randomized method then finds almost the
energy of the best subspace, not the subspace itself; that is why small matrices are decomposed exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from qtool.errors import ShapeError

# Below this the exact decomposition takes seconds at most.
_EXACT_UP_TO = 1024
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
# Of the mean second moment: enough to order what the inputs never show, too little to change what they do.
_FLOOR = 1e-10
# Of the trace: above the rounding errors of a product of thousands of float64.
_RIDGE = 1e-12


def truncated_svd(
    error: Float[Tensor, "out in"], rank: int, *, seed: int = 0
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Factor the rank-r matrix nearest to ``E = U S Vᵀ``: ``(U_r S_r^½, S_r^½ V_rᵀ)``.

    By the eigenvectors of ``E Eᵀ`` or ``Eᵀ E``, the smaller one, in float64, which takes less time than the
    decomposition of ``E`` itself. Exact, unless the smaller side is over 1024 and over four times the rank: then by
    subspace iteration from a random start (16 extra directions, 4 iterations).

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
    if len(error) > error.shape[1]:  # vectors of the smaller side tell those of the other
        right, left = truncated_svd(error.T, rank, seed=seed)
        return left.T.contiguous(), right.T.contiguous()
    return weighted_truncation(error, error.new_ones(error.shape[1]), rank, seed=seed)


def weighted_truncation(
    error: Float[Tensor, "out in"],
    moments: Float[Tensor, "in in"] | Float[Tensor, " in"],
    rank: int,
    *,
    seed: int = 0,
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Factor the rank-r ``C`` that minimizes ``tr((E - C) M (E - C)ᵀ)``.

    With any ``S Sᵀ = M`` that is ``(E S)_r S⁻¹``, the truncated SVD under a whitening. Its left singular vectors
    ``U_r`` are all one needs: ``C = U_r U_rᵀ E``, and they are eigenvectors of ``E M Eᵀ``. So neither a root nor an
    inverse of ``M`` is taken: it may be singular, and inputs that are never seen get no inflated correction but their
    part of ``E`` in the same outputs. What is left is ``Σ σ_i(E S)²`` over ``i > r``.

    Exact, unless the smaller side is over 1024 and over four times the rank: then by subspace iteration as
    ``truncated_svd``. Computed in float64. ``1e-10`` of the mean second moment is added to the diagonal, which
    settles directions without any; moments of 0 throughout stand for the identity.

    Args:
        error: Matrix ``E`` to approximate. Not modified.
        moments: ``M``, symmetric and positive semidefinite, or its diagonal if it is diagonal. Only its relative
            size matters. Not modified.
        rank: Rank of the correction, 1 to the smaller side.
        seed: Of the random start. The same on every device.

    Returns:
        ``up`` and ``down``, whose product is ``C``; the two vectors of each component have the same length, so that
        both suit a 16-bit format. In the dtype of ``error``.

    Raises:
        ShapeError: The rank is not between 1 and the smaller side.

    References:
        Zhang et al. 2024, LQER, arXiv:2402.02446 (a diagonal ``S``).
        Zhang et al. 2024, QERA, arXiv:2410.06040, theorems 1 (``S = M^½``) and 2 (a diagonal ``M``).
    """
    wide, weigh = error.double(), _weigher(moments.double())
    if _is_large(error, rank):
        basis = _range_basis(wide, rank + _OVERSAMPLING, seed, weigh)
    else:
        # All outputs, or where there are more of them than inputs those that the error can reach.
        tall = error.shape[0] > error.shape[1]
        basis = torch.linalg.qr(wide).Q if tall else torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    reduced = basis.T @ wide
    gram = reduced @ weigh(reduced.T)
    leading = _eigenvectors((gram + gram.T) / 2)[:, -rank:].flip(-1)
    up, down = basis @ leading, leading.T @ reduced
    root = torch.linalg.vector_norm(down, dim=-1).sqrt()
    down = down / torch.where(root > 0, root, 1.0).unsqueeze(-1)
    return (up * root).to(error.dtype), down.to(error.dtype)


def best_up(
    error: Float[Tensor, "out in"], down: Float[Tensor, "rank in"], hessian: Float[Tensor, "in in"]
) -> Float[Tensor, "out rank"]:
    """Return the ``L`` that minimizes ``tr((E - L R) H (E - L R)ᵀ)``: ``E H Rᵀ (R H Rᵀ)⁻¹``.

    Computed in float64; what all directions of ``R`` hold, times 1e-12, is added to what each holds.

    References:
        Saha et al. 2024, CALDERA, arXiv:2405.18886, algorithm 2.
    """
    rows, wide = down.double(), hessian.double()
    seen = wide @ rows.T
    return _solved(rows @ seen, (error.double() @ seen).T).T.to(error.dtype)


def best_down(error: Float[Tensor, "out in"], up: Float[Tensor, "out rank"]) -> Float[Tensor, "rank in"]:
    """Return the ``R`` that minimizes ``tr((E - L R) H (E - L R)ᵀ)`` whatever ``H``: ``(Lᵀ L)⁻¹ Lᵀ E``."""
    columns = up.double()
    return _solved(columns.T @ columns, columns.T @ error.double()).to(error.dtype)


def _solved(gram: Float[Tensor, "n n"], right: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Return ``G⁻¹ B`` without waiting for a device, where a pseudoinverse would wait for its eigenvalues."""
    ridge, damped = _RIDGE * gram.diagonal().sum(), gram.clone()
    damped.diagonal().add_(torch.where(ridge > 0, ridge, 1.0))
    lower, _ = torch.linalg.cholesky_ex(damped)
    return torch.cholesky_solve(right, lower)


def _eigenvectors(symmetric: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return eigenvectors by ascending eigenvalue."""
    vectors: Tensor = torch.linalg.eigh(symmetric)[1]
    return vectors


def leading_eigenvectors(hessian: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "n rank"]:
    """Return orthonormal eigenvectors of the largest eigenvalues, the largest first, in float64.

    Exact, unless the matrix is so large that ``truncated_svd`` would not be: then by subspace iteration from a start
    that is always the same, since what is made of them is shared.

    Args:
        hessian: Symmetric and positive semidefinite. Not modified.
        rank: How many.

    Raises:
        ShapeError: There are not so many.
    """
    wide = hessian.double()
    if not _is_large(wide, rank):
        vectors = _eigenvectors(wide)
    else:
        basis = _range_basis(wide, rank + _OVERSAMPLING, seed=0)
        vectors = basis @ _eigenvectors(basis.T @ wide @ basis)
    return vectors[:, -rank:].flip(-1)


def projected_out(hessian: Float[Tensor, "n n"], leading: Float[Tensor, "n rank"]) -> Float[Tensor, "n n"]:
    """Return ``(I - V Vᵀ) H (I - V Vᵀ)``; for eigenvectors ``V`` that is ``H - V Λ Vᵀ``.

    Inputs that are always 0 stay so. The others get 1e-10 of the mean second moment, so that where nothing else is left
    all count alike.

    Args:
        hessian: ``H``, symmetric. Not modified.
        leading: ``V``, with orthonormal columns. Not modified.

    Returns:
        What is left, in the dtype of ``H``.
    """
    wide, vectors = hessian.double(), leading.double()
    half = wide - vectors @ (vectors.T @ wide)
    left = half - half @ vectors @ vectors.T
    left = (left + left.T) / 2
    live = (wide.diagonal() != 0).double()
    left *= torch.outer(live, live)
    left.diagonal().add_(live * (_FLOOR * wide.diagonal().mean()))
    return left.to(hessian.dtype)


def quantize_components(
    factor: Float[Tensor, "rank n"],
) -> tuple[Int8[Tensor, "rank n"], Float[Tensor, " rank"]]:
    """Round each row to codes from -127 to 127 and one FP16 scale: ``codes * scale``.

    Rows are the components of a correction, which differ in size by their singular values, while the entries of one are
    alike. The scale is rounded before the codes are chosen; one beyond the range of FP16 is infinite.

    Args:
        factor: Rows to round. Not modified.

    Returns:
        Codes and scales; both 0 for a row of zeros.
    """
    scale = (factor.abs().amax(-1) / 127).half()
    step = torch.where(scale > 0, scale, 1.0).to(factor.dtype).unsqueeze(-1)
    return (factor / step).round().clamp(-127, 127).to(torch.int8), scale


def _is_large(matrix: Float[Tensor, "out in"], rank: int) -> bool:
    """Say whether the exact decomposition is not worth its time.

    Raises:
        ShapeError: The matrix has no part of that rank.
    """
    smaller = min(matrix.shape)
    if not 1 <= rank <= smaller:
        raise ShapeError(f"a matrix of {smaller} directions has no part of rank {rank}", hint=f"rank={smaller}")
    return smaller > _EXACT_UP_TO and 4 * rank < smaller


def _weigher(
    moments: Float[Tensor, "in in"] | Float[Tensor, " in"],
) -> Callable[[Float[Tensor, "in size"]], Float[Tensor, "in size"]]:
    """Return what multiplies columns by second moments with a floor."""
    mean = (moments.diagonal() if moments.ndim == 2 else moments).mean()
    floor = torch.where(mean > 0, _FLOOR * mean, 1.0)

    def weigh(columns: Tensor) -> Tensor:
        product = moments @ columns if moments.ndim == 2 else moments.unsqueeze(-1) * columns
        return product + floor * columns

    return weigh


def _range_basis(
    matrix: Float[Tensor, "out in"],
    size: int,
    seed: int,
    weigh: Callable[[Float[Tensor, "in size"]], Float[Tensor, "in size"]] | None = None,
) -> Float[Tensor, "out size"]:
    """Return an orthonormal basis that holds most of the energy of ``matrix``; each step is made orthonormal anew.

    With ``weigh``, multiplication by ``M``, most of that of ``matrix M matrixᵀ``.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], size, generator=generator, dtype=torch.float32).to(matrix)
    basis: Tensor = torch.linalg.qr(matrix @ (start if weigh is None else weigh(start))).Q
    for _ in range(_POWER_ITERATIONS):
        inner: Tensor = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ (inner if weigh is None else weigh(inner))).Q
    return basis
