"""Rounding to a grid whose scales stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.numerics.groups import each_parameter
from qtool.scheme import GroupParameters

RoundColumn: TypeAlias = Callable[[Tensor], Tensor]
"""Rounds one column of a weight, ``[out]``."""


@dataclass(frozen=True)
class FrozenColumns:
    """Neighbouring columns of a weight and the parameters of their groups.

    Attributes:
        columns: How many.
        group_size: Neighbouring columns that share parameters.
        parameters: Scales and zero points, one a row and group.
        round: ``round(values [..., columns], parameters)`` returns the nearest values of the grid in the same dtype.
    """

    columns: int
    group_size: int
    parameters: GroupParameters
    round: Callable[[Tensor, GroupParameters], Tensor]


def column_rounders(grid: Sequence[FrozenColumns]) -> list[RoundColumn]:
    """Return what rounds each column, from left to right."""
    return [rounder for part in grid for rounder in _rounders(part)]


def _rounders(part: FrozenColumns) -> Iterator[RoundColumn]:
    turned = each_parameter(part.parameters, lambda own: own.T.contiguous())
    for col in range(part.columns):
        yield partial(_round_column, part, each_parameter(turned, itemgetter(col // part.group_size)))


def _round_column(part: FrozenColumns, parameters: GroupParameters, column: Float[Tensor, " out"]) -> Tensor:
    return part.round(column.unsqueeze(-1), parameters).squeeze(-1)


def round_rows(grid: Sequence[FrozenColumns], values: Float[Tensor, "rows in"], start: int) -> Float[Tensor, "rows in"]:
    """Round whole rows of a weight.

    Args:
        grid: The grids of its columns, from left to right.
        values: Its rows from ``start`` on. Not modified.
        start: Index of the first of them in the weight.

    Returns:
        The nearest values of the grid.
    """
    rows, rounded, left = slice(start, start + len(values)), [], 0
    for part in grid:
        groups = values[:, left : left + part.columns].reshape(len(values), -1, part.group_size)
        parameters = each_parameter(part.parameters, itemgetter(rows))
        rounded.append(part.round(groups, parameters).reshape(len(values), part.columns))
        left += part.columns
    return rounded[0] if len(rounded) == 1 else torch.cat(rounded, dim=1)
