"""The values of a grid in ascending order, from nothing but its codes."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qtool.scheme import Format, GroupParameters


def level_codes(fmt: Format) -> UInt8[Tensor, " levels"]:
    """Return the codes of a format by ascending value: one a value, the lowest code, and none that is not finite."""
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    values = fmt.decode(codes.unsqueeze(0), GroupParameters(torch.ones(1)))[0]
    finite = torch.isfinite(values)
    values, order = values[finite].sort(stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = values[1:] != values[:-1]
    return codes[finite][order][first]


def levels(fmt: Format) -> Float[Tensor, " levels"]:
    """Return the values of a format at scale 1, without a zero point, in ascending order."""
    return fmt.decode(level_codes(fmt).unsqueeze(0), GroupParameters(torch.ones(1)))[0]


def level_index(table: Float[Tensor, "*rows levels"], values: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """Return where values are between levels: ``k + t`` for a part ``t`` of the way from level ``k`` to ``k + 1``.

    Args:
        table: At least two levels a row, in ascending order.
        values: In the dtype of the table.

    Returns:
        Positions from 0 to ``levels - 1``, where values beyond the ends are.
    """
    table = table.contiguous()
    last = table.shape[-1] - 1
    low = (torch.searchsorted(table, values.contiguous(), right=True) - 1).clamp_(0, last - 1)
    below, above = table.gather(-1, low), table.gather(-1, low + 1)
    return low + ((values - below) / (above - below)).clamp_(0, 1)


def second_nearest(
    table: Float[Tensor, "*rows levels"], values: Float[Tensor, "*rows n"], nearest: Float[Tensor, "*rows n"]
) -> Float[Tensor, "*rows n"]:
    """Return the level beside the nearest one that is nearer to the value.

    Args:
        table: At least two levels a row, in ascending order.
        values: In the dtype of the table.
        nearest: The level nearest to each, as the format rounds it.

    Returns:
        Levels.
    """
    last = table.shape[-1] - 1
    place = level_index(table, nearest).round_().long()
    below, above = table.gather(-1, (place - 1).clamp_(0)), table.gather(-1, (place + 1).clamp_(max=last))
    downwards = ((values - below).abs() < (values - above).abs()) & (place > 0) | (place == last)
    return torch.where(downwards, below, above)
