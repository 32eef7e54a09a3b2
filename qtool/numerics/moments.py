"""Second moments: the lower triangle of Σ x xᵀ, without computing the upper one."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

PANEL = 256


def add_second_moment(total: Float[Tensor, "n n"], x: Float[Tensor, "tokens n"]) -> None:
    """Add ``Σ x xᵀ`` over tokens to the lower triangle of ``total``, in place.

    A symmetric product needs half of the multiplications of a general one; panels of columns get most of that. What
    stands above the diagonal panels stays as it was.

    Args:
        total: Running sum; modified, lower triangle only (and inside the diagonal panels).
        x: Values of some tokens, in the dtype of ``total``.
    """
    n = x.shape[1]
    panel = max(PANEL, n // 8)
    for start in range(0, n, panel):
        stop = min(start + panel, n)
        total[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])
