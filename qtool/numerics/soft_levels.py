"""Rounding to the levels of a format with offsets that can be learned.

The levels of a grid are the values that its codes stand for at scale 1. Between two neighbours a value has a fractional
position, from 0 at the lower to 1 at the upper; rounded to nearest it goes up beyond one half. An offset is added to
the position before it is rounded, so that ±1/2 decides between the two neighbours whatever the spacing: for integers
that is AutoRound's ``round(W / s + V)``, and it means the same for floats.

References:
    Cheng et al. 2023, SignRound, arXiv:2309.05516, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from qtool.numerics.levels import level_codes
from qtool.scheme import Format, GroupParameters


@dataclass(frozen=True)
class Levels:
    """The different values that the codes of a format stand for at scale 1.

    Attributes:
        values: Ascending.
        codes: A code for each value: the lowest that stands for it.
        places: The index among the values of what each code stands for; of a code that stands for no number, any.
    """

    values: Float[Tensor, " k"]
    codes: UInt8[Tensor, " k"]
    places: Int[Tensor, " codes"]


def levels_of(fmt: Format, *, zero_points: bool, device: torch.device) -> Levels:
    """Return the levels of a format.

    Args:
        fmt: The format.
        zero_points: Whether codes are counted from a zero point, which is 0 here.
        device: Where the result is to be.
    """
    every, standing = torch.arange(2**fmt.bits, device=device).to(torch.uint8), level_codes(fmt).to(device)
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    parameters = GroupParameters(one, zero if zero_points else None)
    decoded, values = (fmt.decode(codes.unsqueeze(0), parameters).squeeze(0) for codes in (every, standing))
    places = torch.searchsorted(values, decoded.nan_to_num()).clamp(max=len(values) - 1)
    return Levels(values, standing, places)


def cells(x: Float[Tensor, "*shape"], levels: Float[Tensor, " k"]) -> Int[Tensor, "*shape"]:
    """Return the index of the lower of the two levels that a value is between; outside, of the two that are nearest."""
    return (torch.searchsorted(levels, x.detach().contiguous(), right=True) - 1).clamp_(0, len(levels) - 2)


def positions(x: Float[Tensor, "*shape"], levels: Float[Tensor, " k"]) -> Float[Tensor, "*shape"]:
    """Return the fractional index of values among the levels; beyond the ends it goes on as it does at the end."""
    cell = cells(x, levels)
    low = levels[cell]
    return cell + (x - low) / (levels[cell + 1] - low)


class _SoftRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, levels: Tensor) -> Tensor:  # noqa: ANN401 - torch's own
        cell = cells(x, levels)
        low = levels[cell]
        width = levels[cell + 1] - low
        wanted = cell + torch.round((x - low) / width + offset)
        index = wanted.clamp(0, len(levels) - 1)
        ctx.save_for_backward(width, wanted == index)
        return levels[index.long()]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's own
        width, inside = ctx.saved_tensors
        passed = gradients[0] * inside
        return passed, passed * width, None


def soft_round(
    x: Float[Tensor, "*shape"], offset: Float[Tensor, "*shape"], levels: Float[Tensor, " k"]
) -> Float[Tensor, "*shape"]:
    """Round to the level whose index is nearest to the position of ``x`` plus an offset.

    The gradient passes straight through the rounding: 1 for ``x``, for the offset the distance between the neighbours
    of ``x``; both are 0 where there is no level so far out.

    Args:
        x: Values in units of steps.
        offset: Added to the positions.
        levels: Ascending; at least two.
    """
    result: Tensor = _SoftRound.apply(x, offset, levels)  # type: ignore[no-untyped-call]
    return result
