"""The values that share one scale, laid along the last axis.

A weight is ``[out, in]`` and an activation ``[*batch, n]``; both are grouped along their last axis, so an output row
(``channel``) and a token's vector (``token``) are the same thing here: one group of the whole axis.

The rows of a block (``block``) are groups of its side, which have equal parameters: they are fitted together, as
``to_blocks`` lays them, and otherwise are groups like any other. What an axis lacks of whole blocks is filled with 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import pad

from qtool.errors import ShapeError
from qtool.scheme import GroupParameters, SecondLevel, Strategy


def to_groups(
    x: Shaped[Tensor, "*batch n"], strategy: Strategy, group_size: int | None = None
) -> Shaped[Tensor, "*rows group"]:
    """Arrange values so that the last axis holds those that share a scale.

    Args:
        x: Values or codes. Not modified; the result is a view of it where its strides allow.
        strategy: ``tensor`` gives ``[1, numel]``, ``head`` of ``[*batch, heads, tokens, n]`` gives
            ``[*batch, heads, 1, 1, tokens n]``, ``channel`` and ``token`` give ``[*batch, 1, n]``, ``group`` gives
            ``[*batch, n / group_size, group_size]``, and so does ``block``, with 0 in what the last one lacks.
        group_size: Neighbours that share a scale, for ``group`` and ``block`` only.

    Returns:
        The groups; ``from_groups`` undoes it.

    Raises:
        ShapeError: ``group_size`` is missing or does not divide ``n``.
    """
    if strategy == "tensor":
        return x.reshape(1, -1)
    if strategy == "head":
        return x.flatten(-2)[..., None, None, :]
    if strategy == "block" and group_size:
        x = pad(x, (0, -x.shape[-1] % group_size))
    elif strategy != "group":
        return x.unsqueeze(-2)
    if not group_size or x.shape[-1] % group_size:
        raise ShapeError(
            f"groups of {group_size} do not divide an axis of {x.shape[-1]}", facts=(("shape", tuple(x.shape)),)
        )
    return x.reshape(*x.shape[:-1], -1, group_size)


def from_groups(groups: Shaped[Tensor, "*rows group"], shape: Sequence[int]) -> Shaped[Tensor, "*batch n"]:
    """Put groups back into the shape that ``to_groups`` was given, without what it filled up.

    Args:
        groups: What ``to_groups`` returned, or anything of that shape. Not modified.
        shape: Shape of the tensor that was grouped.

    Returns:
        The values in their own shape.
    """
    if groups.numel() != prod(shape):
        groups = groups.flatten(-2)[..., : shape[-1]]
    return groups.reshape(tuple(shape))


def to_blocks(groups: Shaped[Tensor, "out groups side"], rows: int) -> Shaped[Tensor, "blocks groups values"]:
    """Arrange the groups of ``rows`` neighbouring rows so that the last axis holds all of their values.

    Args:
        groups: Groups of each row. Not modified.
        rows: Rows of a block; what the last block lacks is filled with 0.

    Returns:
        The blocks; ``repeat_rows`` gives what is fitted to them back to each row.
    """
    filled = pad(groups, (0, 0, 0, 0, 0, -len(groups) % rows))
    return filled.reshape(-1, rows, *groups.shape[1:]).transpose(1, 2).flatten(2)


def repeat_rows(of_blocks: Shaped[Tensor, "blocks groups"], rows: int, n_out: int) -> Shaped[Tensor, "out groups"]:
    """Return for each of ``n_out`` rows what its block of ``rows`` has."""
    return of_blocks.repeat_interleave(rows, 0)[:n_out]


def combine_parameters(parts: Sequence[GroupParameters], combine: Callable[[list[Tensor]], Tensor]) -> GroupParameters:
    """Combine parameters, tensor by tensor: those with one entry a group; the multiplier is that of the first.

    Args:
        parts: Parameters with the same tensors.
        combine: Makes one tensor of those of the parts.
    """
    return GroupParameters(
        combine([part.scale for part in parts]),
        _combined(parts, "zero_point", combine),
        parts[0].global_scale,
        _combined_codes(parts, "scale_codes", combine),
        _combined_codes(parts, "zero_point_codes", combine),
        _combined(parts, "negative", combine),
        _combined(parts, "offset", combine),
    )


def _combined(parts: Sequence[GroupParameters], name: str, combine: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
    """Combine one tensor, if there is any."""
    found = [getattr(part, name) for part in parts]
    return None if found[0] is None else combine(found)


def _combined_codes(
    parts: Sequence[GroupParameters], name: str, combine: Callable[[list[Tensor]], Tensor]
) -> SecondLevel | None:
    """Combine the codes of one tensor, and what they stand for, if there are any."""
    found = [getattr(part, name) for part in parts]
    if found[0] is None:
        return None
    return SecondLevel(*(combine([getattr(one, leaf) for one in found]) for leaf in ("codes", "low", "step")))


def each_parameter(parameters: GroupParameters, change: Callable[[Tensor], Tensor]) -> GroupParameters:
    """Return parameters with each tensor of one entry a group changed."""
    return combine_parameters([parameters], lambda found: change(found[0]))


def largest_magnitude(groups: Float[Tensor, "*rows group"]) -> Float[Tensor, "*rows"]:
    """Return ``max |x|`` of each group in float32."""
    return groups.float().abs().amax(-1)
