"""Rounding that gradients do not see."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:  # noqa: ANN401 - torch's own
        del ctx, x
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - torch's own
        del ctx
        return gradients[0], None


def straight_through(x: Float[Tensor, "*shape"], rounded: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return ``rounded``, whose gradient goes to ``x`` as it is.

    References:
        Bengio et al. 2013, Estimating or propagating gradients through stochastic neurons, arXiv:1308.3432.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded
    result: Tensor = _StraightThrough.apply(x, rounded.detach())  # type: ignore[no-untyped-call]
    return result
