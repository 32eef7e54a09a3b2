"""Rules that fit a group several times and keep what is closest to its values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.scheme import GroupParameters, TensorScheme


def range_factors(scheme: TensorScheme) -> tuple[float, ...]:
    """Return the multiples of its range that a scheme fits each group to; of equal errors the first wins.

    ``search`` tries the power of two that ``even`` takes and both beside it. ``four_over_six`` puts the largest value
    at 6 or at 4, beside which the grid is finer (2025, arXiv:2512.02010).
    """
    if scheme.scale == "e8m0" and scheme.exponent_rule == "search":
        return (1.0, 0.5, 2.0)
    return (1.0, 1.5) if scheme.range_rule == "four_over_six" else (1.0,)


def closest(
    groups: Float[Tensor, "*rows group"],
    fitted: Sequence[GroupParameters],
    rounding: Callable[[Tensor, GroupParameters], Tensor],
) -> GroupParameters:
    """Return for each group the parameters with the least squared error.

    Args:
        groups: Values; the last axis shares a scale. Not modified.
        fitted: Candidates that differ in their scales only.
        rounding: Returns the values that stand for groups.
    """
    first, *others = fitted
    if not others:
        return first
    unit = first.step().unsqueeze(-1)  # so that small values do not vanish in their squares

    def error(parameters: GroupParameters) -> Tensor:
        return (rounding(groups, parameters).float() - groups.float()).div_(unit).square_().sum(-1)

    scale, least = first.scale, error(first)
    for one in others:
        found = error(one)
        scale = torch.where(found < least, one.scale, scale)
        least = torch.minimum(found, least)
    return GroupParameters(scale, first.zero_point, first.global_scale)
