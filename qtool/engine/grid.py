"""What the last axis of a tensor is rounded to: neighbouring parts, each with a scheme of its own.

Nearly every grid has one part. A plan may set the last channels of an input site apart (``qtool.model.plan.Segment``):
then the site's activations and the weights of all that reads it have a part for each segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from qtool.errors import SchemeError
from qtool.model.plan import Segment
from qtool.numerics.groups import each_parameter, from_groups, repeat_rows, to_blocks, to_groups
from qtool.numerics.second_level import store_second_level
from qtool.scheme import Format, GroupParameters, TensorScheme

GlobalScales = tuple[Tensor | None, ...]
"""Tensor-level multipliers or static scales, one a part; None where the part has none."""
ZeroPoints = tuple[Tensor | None, ...]
"""Zero points of static scales, likewise."""


@runtime_checkable
class RuledFormat(Protocol):
    """A format whose codes, and not only its fits, follow a rule of the scheme."""

    def under(self, scheme: TensorScheme) -> Format:
        """Return the format with the codes that it has under a scheme."""


@dataclass(frozen=True)
class GridPart:
    """Neighbouring columns with one scheme.

    Attributes:
        scheme: How they are quantized.
        format: The format of ``scheme``.
        channels: How many columns; None for all that the other parts leave.
    """

    scheme: TensorScheme
    format: Format
    channels: int | None = None

    @property
    def shares_rows(self) -> bool:
        """Whether rows of a weight share a scale, or a range of scales."""
        return self.scheme.strategy in ("tensor", "block") or self.scheme.scale_rows is not None

    @property
    def block_rows(self) -> int:
        """How many rows of a weight share the scales of their groups."""
        return self.scheme.block_rows or self.scheme.group_size or 1 if self.scheme.strategy == "block" else 1

    @property
    def each_group(self) -> GridPart:
        """The part that fits each group by itself; for blocks, those that ``together`` makes."""
        return replace(self, scheme=replace(self.scheme, strategy="group")) if self.block_rows > 1 else self

    def together(self, groups: Shaped[Tensor, "*rows group"]) -> Shaped[Tensor, "*blocks values"]:
        """Arrange groups so that the last axis holds all values that share a scale."""
        return to_blocks(groups, self.block_rows) if self.block_rows > 1 else groups

    def a_row_each(self, parameters: GroupParameters, n_out: int) -> GroupParameters:
        """Return parameters of what ``together`` makes with one entry for each group of ``n_out`` rows."""
        return parameters if self.block_rows == 1 else each_parameter(parameters, lambda own: self.repeated(own, n_out))

    def repeated(self, values: Shaped[Tensor, "*blocks"], n_out: int) -> Shaped[Tensor, "*rows"]:
        """Return one tensor as ``a_row_each`` does."""
        return repeat_rows(values, self.block_rows, n_out) if self.block_rows > 1 else values

    def runs(self, n: int) -> list[tuple[int, int]]:
        """Return the widths of neighbouring columns, ``n`` in all, with groups of one size, and that size.

        Only blocks, which may be cut off at the end, have more than one run.
        """
        size = self.scheme.group_size or n
        whole = n - n % size
        return [run for run in ((whole, size), (n - whole, n - whole)) if run[0]]

    def groups(self, x: Shaped[Tensor, "*batch n"]) -> Shaped[Tensor, "*rows group"]:
        """Arrange values of the part so that the last axis shares a scale; see ``to_groups``."""
        return to_groups(x, self.scheme.strategy, self.scheme.group_size)

    def largest(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*heads"]:
        """Return the largest magnitude of all values, or ``[heads, 1, 1]`` of each head's ``[heads, tokens, n]``."""
        return x.abs().amax((-2, -1), keepdim=True) if self.scheme.strategy == "head" else x.abs().amax()

    def ends(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*heads ends"]:
        """Return what a static scale of values is found from: the largest magnitude, or both ends if asymmetric.

        Those of heads are ``[heads, 1, 1]`` of ``[heads, tokens, n]``, in front of the axis of the ends.
        """
        if self.scheme.symmetric:
            return self.largest(x).unsqueeze(-1)
        if self.scheme.strategy == "head":
            return torch.stack((x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)), -1)
        return torch.stack((x.amin(), x.amax()))

    def static(self, ends: Float[Tensor, "*heads ends"]) -> GroupParameters:
        """Return a static scale, and its zero point if asymmetric, from what ``ends`` returns."""
        return self.format.fit(ends, self.scheme, clip=self.scheme.clip)

    def global_scale(self, amax: Float[Tensor, "*heads"]) -> Float[Tensor, "*heads"] | None:
        """Return the multiplier for values of largest magnitude ``amax``, or None without one.

        Of static scales it is the scale itself.
        """
        if self.scheme.static:
            return self.static(amax.unsqueeze(-1)).scale
        return self.format.global_scale(amax, self.scheme)

    def shared(self, x: Float[Tensor, "*batch n"]) -> tuple[Tensor | None, Tensor | None]:
        """Return the multiplier, or the static scale and zero point, of these very values: nothing was calibrated."""
        if not self.scheme.static:
            return self.global_scale(self.largest(x).float()), None
        found = self.static(self.ends(x).float())
        return found.scale, found.zero_point

    @property
    def has_global_scale(self) -> bool:
        """Whether the format wants a tensor-level multiplier."""
        return self.global_scale(torch.ones(())) is not None

    def fit(
        self,
        groups: Float[Tensor, "*rows group"],
        *,
        global_scale: Tensor | None,
        zero_point: Tensor | None = None,
        clip: float = 1.0,
    ) -> GroupParameters:
        """Fit groups to a fraction of the range that the scheme keeps; those of a block together.

        Scales that are codes are so already. A static scale is ``global_scale``, and its zero point ``zero_point``,
        whatever the groups are.
        """
        if self.scheme.static and global_scale is not None:
            shape = groups.shape[:-1]
            return GroupParameters(global_scale.expand(shape), None if zero_point is None else zero_point.expand(shape))
        return self.stored(groups, self.fit_each(groups, global_scale=global_scale, clip=clip))

    def fit_each(
        self, groups: Float[Tensor, "*rows group"], *, global_scale: Tensor | None, clip: float = 1.0
    ) -> GroupParameters:
        """Fit groups as ``fit`` does, with scales that are not codes yet: those depend on other rows."""
        if self.block_rows > 1:
            found = self.each_group.fit_each(self.together(groups), global_scale=global_scale, clip=clip)
            return self.a_row_each(found, len(groups))
        return self.format.fit(groups, self.scheme, global_scale=global_scale, clip=clip * self.scheme.clip)

    def stored(self, groups: Float[Tensor, "*rows group"], fitted: GroupParameters) -> GroupParameters:
        """Return what ``fit_each`` found for groups with scales that are codes, if the scheme has such."""
        bits, rows = self.scheme.scale_bits, self.scheme.scale_rows
        if bits is None or rows is None:
            return fitted
        silent = (groups == 0).all(-1)
        return store_second_level(fitted, silent, num_bits=bits, block=rows, scale_format=self.scheme.scale)


@dataclass(frozen=True)
class Grid:
    """The parts of an axis, in the order of its columns.

    Attributes:
        parts: At least one; one of them takes the columns that the others leave.
    """

    parts: tuple[GridPart, ...]

    @classmethod
    def of(cls, scheme: TensorScheme, fmt: Format) -> Grid:
        """Return the grid of one scheme for all columns."""
        return cls((_part(scheme, fmt),))

    @classmethod
    def segmented(cls, scheme: TensorScheme, segments: Sequence[Segment], lookup: Callable[[str], Format]) -> Grid:
        """Return the grid of a scheme whose last columns are in formats of their own.

        Args:
            scheme: Of the columns in front, and of the others what their formats can carry.
            segments: How many columns at the end have which format.
            lookup: Finds a format by name.
        """
        apart = [(segment.channels, lookup(segment.format)) for segment in segments]
        parts = [_part(scheme_in(scheme, fmt), fmt, channels) for channels, fmt in apart]
        return cls((_part(scheme, lookup(scheme.format)), *parts))

    @property
    def only(self) -> GridPart | None:
        """The part of a grid that has no other."""
        return self.parts[0] if len(self.parts) == 1 else None

    def places(self, n: int) -> Iterator[tuple[slice, GridPart]]:
        """Yield the columns of each part of an axis of length ``n``."""
        rest = n - sum(part.channels or 0 for part in self.parts)
        start = 0
        for part in self.parts:
            stop = start + (rest if part.channels is None else part.channels)
            yield slice(start, stop), part
            start = stop

    def check(self, n: int, *, layer: str) -> None:
        """Refuse an axis whose parts the groups do not divide.

        Args:
            n: Length of the axis.
            layer: Name of the layer, for the message.

        Raises:
            SchemeError: A group does not divide its part.
        """
        if self.only is not None:
            self.only.scheme.groups_of(n, layer=layer)
            return
        places = list(self.places(n))
        for columns, part in places:
            size = part.scheme.group_size or 1
            if columns.start >= columns.stop or (columns.stop - columns.start) % size:
                widths = " + ".join(str(place.stop - place.start) for place, _ in places)
                raise SchemeError(
                    f"the plan sets channels apart in the input of `{layer}`, which groups of {size} do not divide",
                    facts=(("input size", f"{n} = {widths}"), ("scheme", part.scheme)),
                    hint="plan with the scheme that is going to be used: qtool transform STATISTICS --scheme SCHEME",
                )

    def global_scales(self, amax: Float[Tensor, "*heads n"]) -> GlobalScales:
        """Return the multiplier of each part from the largest magnitude of each column, of one token of each head."""
        return tuple(part.global_scale(part.largest(amax[..., own])) for own, part in self.places(amax.shape[-1]))

    def decode(self, codes: UInt8[Tensor, "out in"], parameters: Sequence[GroupParameters]) -> Float[Tensor, "out in"]:
        """Return the float32 values that codes stand for, of parameters for each part."""
        decoded = []
        for (columns, part), own in zip(self.places(codes.shape[-1]), parameters, strict=True):
            values = codes[:, columns]
            decoded.append(from_groups(part.format.decode(part.groups(values), own), values.shape))
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded, dim=-1)


def _part(scheme: TensorScheme, fmt: Format, channels: int | None = None) -> GridPart:
    return GridPart(scheme, fmt.under(scheme) if isinstance(fmt, RuledFormat) else fmt, channels)


def scheme_in(scheme: TensorScheme, fmt: Format) -> TensorScheme:
    """Return a scheme in another format: its symmetry, groups, scales and range rule as far as that can carry them.

    What the format cannot carry is as in its defaults; of several ways the one that gives up least, the rule first. The
    whole range is kept: channels are set apart since their largest values matter, so the clip is for the others.
    """
    own = replace(fmt.defaults, format=fmt.name, outlier_threshold=scheme.outlier_threshold)
    for with_groups, with_symmetry, with_scale, with_rule in product((True, False), repeat=4):
        shared = replace(own, strategy=scheme.strategy, group_size=scheme.group_size, static=scheme.static)
        tried = shared if with_groups else own
        tried = replace(tried, symmetric=scheme.symmetric) if with_symmetry else tried
        scales = {"scale": scheme.scale, "scale_bits": scheme.scale_bits, "scale_rows": scheme.scale_rows}
        tried = replace(tried, **scales) if with_scale else tried  # type: ignore[arg-type]
        tried = replace(tried, range_rule=scheme.range_rule) if with_rule else tried
        try:
            fmt.check(tried)
        except SchemeError:
            continue
        return tried
    return own
