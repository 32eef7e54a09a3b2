"""The values that share one scale, laid along the last axis.

A weight is ``[out, in]`` and an activation ``[*batch, n]``; both are grouped along their last axis, so an output row
(``channel``) and a token's vector (``token``) are the same thing here: one group of the whole axis.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Shaped
from torch import Tensor

from qtool.errors import ShapeError
from qtool.scheme import Strategy


def to_groups(
    x: Shaped[Tensor, "*batch n"], strategy: Strategy, group_size: int | None = None
) -> Shaped[Tensor, "*rows group"]:
    """Arrange values so that the last axis holds those that share a scale.

    Args:
        x: Values or codes. Not modified; the result is a view of it where its strides allow.
        strategy: ``tensor`` gives ``[1, numel]``, ``channel`` and ``token`` give ``[*batch, 1, n]``, ``group`` gives
            ``[*batch, n / group_size, group_size]``.
        group_size: Neighbours that share a scale, for ``group`` only.

    Returns:
        The groups; ``from_groups`` undoes it.

    Raises:
        ShapeError: ``group_size`` is missing or does not divide ``n``.
    """
    if strategy == "tensor":
        return x.reshape(1, -1)
    if strategy != "group":
        return x.unsqueeze(-2)
    if not group_size or x.shape[-1] % group_size:
        raise ShapeError(
            f"groups of {group_size} do not divide an axis of {x.shape[-1]}", facts=(("shape", tuple(x.shape)),)
        )
    return x.reshape(*x.shape[:-1], -1, group_size)


def from_groups(groups: Shaped[Tensor, "*rows group"], shape: Sequence[int]) -> Shaped[Tensor, "*batch n"]:
    """Put groups back into the shape that ``to_groups`` was given.

    Args:
        groups: What ``to_groups`` returned, or anything of that shape. Not modified.
        shape: Shape of the tensor that was grouped.

    Returns:
        The values in their own shape.
    """
    return groups.reshape(tuple(shape))


def largest_magnitude(groups: Float[Tensor, "*rows group"]) -> Float[Tensor, "*rows"]:
    """Return ``max |x|`` of each group in float32."""
    return groups.float().abs().amax(-1)
