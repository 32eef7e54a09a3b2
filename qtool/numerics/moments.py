"""Second moments: the lower triangle of Σ x xᵀ without computing the upper one, its diagonal blocks, cross moments."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

PANEL = 192


def add_second_moment(total: Float[Tensor, "n n"], x: Float[Tensor, "tokens n"]) -> None:
    """Add ``Σ x xᵀ`` over tokens to the lower triangle of ``total``, in place.

    A symmetric product needs half of the multiplications of a general one; panels of columns get most of that. What
    stands above the diagonal panels stays as it was.

    Args:
        total: Running sum; modified, lower triangle only (and inside the diagonal panels).
        x: Values of some tokens, in the dtype of ``total``.
    """
    for start, stop in panels(x.shape[1]):
        total[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])


def add_block_moments(total: Float[Tensor, "blocks b b"], x: Float[Tensor, "tokens n"]) -> None:
    """Add the diagonal blocks of ``Σ x xᵀ`` over tokens to ``total``, in place.

    Args:
        total: Running sums of neighbouring channels, ``blocks * b`` of them; modified.
        x: Values of some tokens, in the dtype of ``total``.
    """
    by_block = x.reshape(len(x), *total.shape[:2]).permute(1, 2, 0)
    total.baddbmm_(by_block, by_block.mT)


def add_cross_moment(
    total: Float[Tensor, "m n"], left: Float[Tensor, "tokens m"], right: Float[Tensor, "tokens n"]
) -> None:
    """Add ``Σ left rightᵀ`` over tokens to ``total``, in place.

    Args:
        total: Running sum; modified.
        left: Values of some tokens, in the dtype of ``total``.
        right: Other values of the same tokens.
    """
    total.addmm_(left.T, right)


def panels(n: int) -> Iterator[tuple[int, int]]:
    """Cut ``n`` columns into runs that are wide enough for a fast product, and yield where each starts and stops."""
    width = max(PANEL, n // 8)
    for start in range(0, n, width):
        yield start, min(start + width, n)
