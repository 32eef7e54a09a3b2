"""The triangular system of GPTQ and its relatives: what rounding a column does to those that come after it.

``U``, upper triangular with ``Uᵀ U = (H + λ I)⁻¹``, has its rows and columns in the order of the visits. When rounding
lowers column ``j`` by ``r``, the loss is least if every later column ``k`` is lowered by ``r U_jk / U_jj`` as well. The
block of ``U`` from ``j`` on is the same for ``H`` without the columns before ``j``, so one factor serves all steps.

References:
    Frantar et al. 2023, GPTQ, arXiv:2210.17323, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qtool.errors import NumericalError

_HIGHEST_DAMPENING = 0.1
_LEAST_RAISED_DAMPENING = 1e-4


@dataclass(frozen=True)
class LinearTerm:
    """What a column adds to those after it, besides what makes up for its error: ``w_k += s_j P_jk``.

    Attributes:
        matrix: ``P``, strictly upper triangular, in the order of the visits.
        drift: ``s_j`` is how far updates have moved column ``j`` from where it started; otherwise it is the column
            itself. Both are as they are just before ``j`` is rounded.
    """

    matrix: Float[Tensor, "in in"]
    drift: bool = False


@dataclass(frozen=True)
class InverseFactor:
    """``U``, upper triangular with ``Uᵀ U = (H + λ I)⁻¹``, and what it took to get it.

    Attributes:
        upper: The factor.
        dampening_frac: λ as a fraction of the mean diagonal entry: what was asked, or more.
        wide: Whether it took float64, where that was not the dtype of the Hessian.
        order: Columns in the order of the visits, which is that of the factor; None from left to right.
        term: What is added to GPTQ's updates, if anything.
    """

    upper: Float[Tensor, "in in"]
    dampening_frac: float
    wide: bool
    order: Int[Tensor, " in"] | None = None
    term: LinearTerm | None = None

    def feedback(self) -> Float[Tensor, "in in"]:
        """Return ``U_jk / U_jj`` above the diagonal and 0 elsewhere."""
        return (self.upper / self.upper.diagonal().unsqueeze(-1)).triu_(1).contiguous()

    def loss(self, errors: Float[Tensor, "in out"]) -> Float[Tensor, " out"]:
        """Return ``diag(E (H + λ I) Eᵀ) = diag(E U⁻¹ U⁻ᵀ Eᵀ)`` of transposed errors in the order of the visits."""
        spread: Tensor = torch.linalg.solve_triangular(self.upper.T, errors, upper=False)
        return spread.square_().sum(0)

    def visited(self, matrix: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
        """Put the rows and columns of a matrix into the order of the visits."""
        return matrix if self.order is None else matrix.index_select(0, self.order).index_select(1, self.order)


def inverse_cholesky(hessian: Float[Tensor, "n n"]) -> Float[Tensor, "n n"] | None:
    """Return the upper Cholesky factor ``U`` of the inverse, ``Uᵀ U = H⁻¹``.

    By way of the inverse: ``J chol(J H J)⁻¹ J``, with ``J`` the reversal of the axis, is the same matrix for one
    factorization less, but two to four times less accurate in float32 where a few directions dominate ``H``.

    Args:
        hessian: Symmetric matrix; only its lower triangle is read. Not modified.

    Returns:
        The factor, with positive diagonal; None if ``H``, or its inverse as computed, is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    # What is not finite in a column makes its pivot so too.
    return None if int(failed) or not bool(torch.isfinite(upper.diagonal()).all()) else upper


def factorize_inverse(hessian: Float[Tensor, "in in"], dampening_frac: float) -> InverseFactor:
    """Factorize the damped inverse, with more damping and then in float64 where that fails.

    Tries λ at ``dampening_frac``, then ten times as much at a time up to 0.1, first in the dtype of the Hessian, then
    all of them again in float64.

    Args:
        hessian: Symmetric, no zeros on the diagonal. Not modified.
        dampening_frac: λ as a fraction of the mean diagonal entry.

    Returns:
        The factor, in the dtype of the Hessian.

    Raises:
        NumericalError: No attempt found a positive definite matrix.
    """
    fracs = [dampening_frac]
    while fracs[-1] < _HIGHEST_DAMPENING:
        fracs.append(min(max(10 * fracs[-1], _LEAST_RAISED_DAMPENING), _HIGHEST_DAMPENING))
    for dtype in dict.fromkeys((hessian.dtype, torch.float64)):
        mean = hessian.diagonal().to(dtype).mean()
        for frac in fracs:
            damped = hessian.to(dtype, copy=True)
            damped.diagonal().add_(frac * mean)
            upper = inverse_cholesky(damped)
            if upper is not None:
                return InverseFactor(upper.to(hessian.dtype), frac, wide=dtype != hessian.dtype)
    raise NumericalError(
        "the damped Hessian is not positive definite",
        facts=(("dampening", f"{fracs[0]:g} to {fracs[-1]:g} of the mean diagonal"), ("size", len(hessian))),
        hint="calibrate on more samples",
    )
