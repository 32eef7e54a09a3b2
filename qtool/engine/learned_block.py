"""The linears of a block as grids that can be learned: groups of one size and format lie together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.grid import GridPart
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import SchemeError
from qtool.numerics.groups import from_groups
from qtool.numerics.learned_grid import Groups, LearnedGrid
from qtool.numerics.soft_levels import levels_of
from qtool.scheme import GroupParameters, TensorScheme
from qtool.scheme_parts import one_level

Kind = tuple[TensorScheme, int]
"""Groups of which kind: scheme, and values to a group."""


@dataclass(frozen=True)
class _Piece:
    """The groups of one part of one linear.

    Attributes:
        name: Of the linear.
        kind: Which grid they are in.
        rows: Where they are in it.
        shape: Of the columns that they are made of.
        scales: Shape of their scales as they are stored.
        global_scale: Their multiplier, if any.
        offset: What is added to their values, if anything; it stays as it is.
    """

    name: str
    kind: Kind
    rows: slice
    shape: torch.Size
    scales: torch.Size
    global_scale: Tensor | None
    offset: Tensor | None

    def values(self, learned: Float[Tensor, "groups size"]) -> Float[Tensor, "out columns"]:
        """Return what stands for the weight, of what all groups of this kind stand for."""
        own = learned[self.rows]
        return from_groups(own if self.offset is None else own + self.offset.reshape(-1, 1), self.shape)


class LearnedBlock:
    """What is learned of the weights of a block.

    Args:
        problems: Of each linear, by full name.
        starts: What each is quantized to at first.

    Attributes:
        grids: What is learned, a grid for each kind of groups.
    """

    def __init__(self, problems: Mapping[str, LayerProblem], starts: Mapping[str, QuantizedLinear]) -> None:
        self.starts = dict(starts)
        self._pieces: list[_Piece] = []
        found: dict[Kind, list[tuple[Tensor, Tensor, GroupParameters, GridPart]]] = {}
        for name, problem in problems.items():
            start, places = starts[name], problem.grid.places(problem.weight.shape[1])
            for (columns, part), parameters in zip(places, start.parameters, strict=True):
                _check_learnable(name, part, parameters)
                weight, codes = problem.weight[:, columns], start.codes[:, columns]
                groups = part.groups(weight).flatten(0, -2)
                kind = (part.scheme, groups.shape[-1])
                before = sum(len(one[0]) for one in found.setdefault(kind, []))
                rows = slice(before, before + len(groups))
                stored = parameters.scale.shape
                beside = parameters.global_scale, parameters.offset
                self._pieces.append(_Piece(name, kind, rows, weight.shape, stored, *beside))
                found[kind].append((groups, part.groups(codes).flatten(0, -2), parameters, part))
        self.grids: dict[Kind, LearnedGrid] = {kind: _grid(members) for kind, members in found.items()}

    def weights(self) -> dict[str, Float[Tensor, "out in"]]:
        """Return what stands for the weights, differentiable in what is learned."""
        values = {kind: grid.values() for kind, grid in self.grids.items()}
        parts: dict[str, list[Tensor]] = {}
        for piece in self._pieces:
            parts.setdefault(piece.name, []).append(piece.values(values[piece.kind]))
        joined = {name: own[0] if len(own) == 1 else torch.cat(own, dim=1) for name, own in parts.items()}
        outliers = {name: self.starts[name].outliers for name in joined}
        return {name: weight if (own := outliers[name]) is None else own.put(weight) for name, weight in joined.items()}

    def quantized(self) -> dict[str, QuantizedLinear]:
        """Return the linears as they are now; corrections beside them stay."""
        chosen = {kind: grid.chosen() for kind, grid in self.grids.items()}
        codes: dict[str, list[Tensor]] = {}
        parameters: dict[str, list[GroupParameters]] = {}
        for piece in self._pieces:
            all_codes, scale, zero_point = chosen[piece.kind]
            codes.setdefault(piece.name, []).append(from_groups(all_codes[piece.rows], piece.shape))
            own = GroupParameters(
                scale[piece.rows].reshape(piece.scales).clone(),
                None if zero_point is None else zero_point[piece.rows].reshape(piece.scales).clone(),
                piece.global_scale,
                offset=piece.offset,
            )
            parameters.setdefault(piece.name, []).append(own)
        return {
            name: replace(
                start,
                codes=codes[name][0].clone() if len(codes[name]) == 1 else torch.cat(codes[name], dim=1),
                parameters=tuple(parameters[name]),
            )
            for name, start in self.starts.items()
        }


def _check_learnable(name: str, part: GridPart, parameters: GroupParameters) -> None:
    """Refuse scales that rows share in blocks, scales that are codes, and a second scale of a group.

    Raises:
        SchemeError: The part has such scales.
    """
    if part.block_rows > 1:
        raise SchemeError(
            f"ranges are learned for each row, and the rows of `{name}` share theirs in blocks",
            facts=(("scheme", part.scheme),),
            hint="--method gptq, or --weights fp8-channel",
        )
    if parameters.scale_codes is not None:
        raise SchemeError(
            f"ranges are learned, and the scales of `{name}` are codes that rows share ranges of",
            facts=(("scheme", part.scheme),),
            hint=f"--method gptq, or --weights {one_level(part.scheme)}",
        )
    if parameters.negative is not None:
        raise SchemeError(
            f"ranges are learned with one scale a group, and the groups of `{name}` have two",
            facts=(("scheme", part.scheme),),
            hint="--method gptq, or --weights mxfp4",
        )


def _grid(members: list[tuple[Tensor, Tensor, GroupParameters, GridPart]]) -> LearnedGrid:
    """Put groups of one kind below each other."""
    weights, codes, parameters, parts = zip(*members, strict=True)
    part, zeros = parts[0], [own.zero_point for own in parameters if own.zero_point is not None]
    levels = levels_of(part.format, zero_points=bool(zeros) or part.scheme.offset, device=weights[0].device)
    one = weights[0].new_ones(())
    multipliers = [
        (one if own.global_scale is None else own.global_scale.to(one)).expand(own.scale.numel()) for own in parameters
    ]
    groups = Groups(
        torch.cat([_above_offset(*one) for one in zip(weights, parameters, strict=True)]),
        torch.cat([own.scale.flatten() for own in parameters]),
        torch.cat([zero.flatten() for zero in zeros]) if zeros else None,
        torch.cat(multipliers),
        levels,
        part.scheme.scale,
    )
    return LearnedGrid(groups, torch.cat(codes))


def _above_offset(groups: Float[Tensor, "groups size"], parameters: GroupParameters) -> Float[Tensor, "groups size"]:
    """Return what scale and codes stand for."""
    return groups if parameters.offset is None else groups - parameters.offset.reshape(-1, 1)
