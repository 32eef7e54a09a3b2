"""Shrinkage: what little was seen of one thing, completed by what was seen of all things like it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from qtool.errors import NumericalError


def shrink(
    own: Float[Tensor, "*shape"], shared: Float[Tensor, "*shape"], *, tokens: int, prior: float
) -> Float[Tensor, "*shape"]:
    """Return ``(N own + τ shared) / (N + τ)``: the shared mean counts as much as ``τ`` tokens.

    For Hessians this is the posterior mean under an inverse Wishart prior around the shared one. It is positive
    definite where the shared one is, however few tokens there were.

    Args:
        own: Mean over the ``N`` tokens of the one, such as a Hessian. Not modified.
        shared: Mean over the tokens of all. Not modified.
        tokens: ``N``, 0 or more.
        prior: ``τ`` in tokens, 0 or more.

    Returns:
        A new tensor in the dtype of ``own``; exactly ``own`` for ``τ = 0``, exactly ``shared`` for ``N = 0``.

    Raises:
        NumericalError: Both are 0, or one is negative: nothing was seen of either.

    References:
        Ledoit and Wolf 2004, A well-conditioned estimator for large-dimensional covariance matrices.
    """
    if min(tokens, prior) < 0 or tokens + prior <= 0:
        raise NumericalError("nothing to shrink and nothing to shrink to", facts=(("N", tokens), ("τ", prior)))
    weight = tokens / (tokens + prior)
    return own.mul(weight).add_(shared.to(own), alpha=1 - weight)
