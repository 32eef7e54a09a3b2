"""Fake quantizers that are learned, from their papers' formulas, and their gradients by plain autograd.

References:
    Cheng et al. 2023, SignRound, arXiv:2309.05516, equations 3 and 4: ``s clamp(round(W / s + V), n, m)`` with
    ``s = (α max W - β min W) / (2^b - 1)``. Shao et al. 2024, OmniQuant, arXiv:2308.13137, equation 2:
    ``clamp(round(W / h) + z, 0, 2^N - 1)`` with ``h = (γ max W - β min W) / (2^N - 1)``, ``z = -round(β min W / h)``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(x: Tensor) -> Tensor:
    """Round to nearest; the gradient is that of the identity."""
    return x + (x.round() - x).detach()


def as_stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a scale to its storage type; the gradient is that of the identity."""
    return scale + (scale.to(dtype).to(scale.dtype) - scale).detach()


def symmetric_oracle(weight: Tensor, scale: Tensor, offset: Tensor, *, bits: int) -> Tensor:
    """Return ``s clamp(round(W / s + V), -2^(b-1), 2^(b-1) - 1)`` for groups in rows."""
    step = scale.unsqueeze(-1)
    return step * rounded(weight / step + offset).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def asymmetric_oracle(
    weight: Tensor, ends: tuple[Tensor, Tensor], offset: Tensor, *, bits: int, dtype: torch.dtype
) -> Tensor:
    """Return ``s (clamp(round(W / s + V) + z, 0, 2^b - 1) - z)`` for groups in rows, whose ranges end at ``ends``."""
    low, high = ends
    scale = as_stored((high - low) / (2**bits - 1), dtype)
    zero = rounded(-low / scale).unsqueeze(-1)
    step = scale.unsqueeze(-1)
    return step * ((rounded(weight / step + offset) + zero).clamp(0, 2**bits - 1) - zero)


def interpolated(levels: Tensor, place: Tensor) -> Tensor:
    """Return what is at a fractional index among levels, on straight lines between them and beyond the ends."""
    cell = place.floor().long().clamp(0, len(levels) - 2)
    return levels[cell] + (place - cell) * (levels[cell + 1] - levels[cell])
