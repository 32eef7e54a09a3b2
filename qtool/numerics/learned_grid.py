"""Groups of weights whose rounding and range can be learned by gradient descent.

A group's value is ``step · (level − zero_point)``. What is learned: an offset for each weight, which decides between
the two levels beside it, and a factor for each end of a group's range, which changes scale and zero point. Scales are
rounded to their storage format and zero points to codes in every step, with the gradient passed straight through, so
that what is learned is what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qtool.numerics.scales import LARGEST_SHORT, store_scale
from qtool.numerics.soft_levels import Levels, positions, soft_round
from qtool.numerics.straight_through import straight_through
from qtool.scheme import ScaleFormat

# How far from the middle between two levels a weight is kept that another method rounded the other way.
_MARGIN = 0.01


@dataclass(frozen=True)
class Groups:
    """Groups of one size and format, those of several linears one below the other; none of it is modified.

    Attributes:
        weight: What is to be rounded.
        scale: Scales to start from, as stored.
        zero_point: Zero points to start from, or None.
        multiplier: Tensor-level multiplier of each group's scale.
        levels: What codes stand for at scale 1.
        scale_format: How scales are stored.
    """

    weight: Float[Tensor, "groups size"]
    scale: Float[Tensor, " groups"]
    zero_point: Float[Tensor, " groups"] | None
    multiplier: Float[Tensor, " groups"]
    levels: Levels
    scale_format: ScaleFormat

    @property
    def has_integer_zeros(self) -> bool:
        """Whether zero points are codes, which range rules round, and not shifts."""
        zeros, bottom, top = self.zero_point, self.levels.values[0], self.levels.values[-1]
        if zeros is None or bottom < 0:
            return False
        return bool(((zeros.frac() == 0) & (zeros >= 0) & (zeros <= top)).all())


class LearnedGrid:
    """What is learned of some groups.

    Args:
        groups: The groups.
        start: The code that each weight is rounded to at first; None for the nearest.

    Attributes:
        offset: Of each weight, in levels: at 0 everything is as it was at the start; from ``-1/2`` to ``1/2`` it
            chooses one of the two levels beside it.
        high: Factor of the upper end of each group's range.
        low: Factor of the lower end where it has one of its own; the same tensor as ``high`` where not.
    """

    def __init__(self, groups: Groups, start: UInt8[Tensor, "groups size"] | None = None) -> None:
        self.groups, self._start = groups, start
        self.offset = torch.zeros_like(groups.weight)
        self.high = torch.ones_like(groups.scale)
        self._integer_zeros = groups.has_integer_zeros
        self._top = float(groups.levels.values[-1])
        self.low = torch.ones_like(groups.scale) if self._integer_zeros else self.high
        self.anchor = torch.zeros_like(groups.weight)
        if start is not None:
            # At the start every weight has the level that it is to have, also if another one is nearer.
            in_steps, levels = self._in_steps(groups.scale, groups.zero_point), groups.levels.values
            wanted = groups.levels.places[start.long()]
            place, reach = positions(in_steps, levels), 0.5 - _MARGIN
            moved = place.clamp(wanted - reach, wanted + reach) - place
            self.anchor = moved.masked_fill(soft_round(in_steps, self.anchor, levels) == levels[wanted], 0.0)

    def parameters(self) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"] | None]:
        """Return scales as stored and zero points, differentiable in the factors of the range."""
        groups = self.groups
        if groups.zero_point is None:
            return self._stored(groups.scale * self.high), None
        if not self._integer_zeros:
            scale = self._stored(groups.scale * self.high)
            return scale, groups.zero_point * (groups.scale / scale)
        above, below = (self._top - groups.zero_point) * self.high, groups.zero_point * self.low
        scale = self._stored(groups.scale * ((above + below) / self._top))
        zero_point = below * (groups.scale / scale)
        return scale, straight_through(zero_point, zero_point.detach().round().clamp(0, self._top))

    def values(self) -> Float[Tensor, "groups size"]:
        """Return what stands for the weights, differentiable in offsets and factors."""
        scale, zero_point = self.parameters()
        levels = soft_round(self._in_steps(scale, zero_point), self.anchor + self.offset, self.groups.levels.values)
        centered = levels if zero_point is None else levels - zero_point.unsqueeze(-1)
        return centered * (scale * self.groups.multiplier).unsqueeze(-1)

    @torch.no_grad()
    def chosen(self) -> tuple[UInt8[Tensor, "groups size"], Tensor, Tensor | None]:
        """Return codes, scales and zero points as they are now; of codes that decode alike, the one of the start."""
        scale, zero_point = self.parameters()
        levels = soft_round(self._in_steps(scale, zero_point), self.anchor + self.offset, self.groups.levels.values)
        known = self.groups.levels
        places = torch.searchsorted(known.values, levels)
        codes = known.codes[places]
        if self._start is not None:
            codes = torch.where(known.places[self._start.long()] == places, self._start, codes)
        return codes, scale, zero_point

    def _in_steps(self, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        scaled = self.groups.weight / (scale * self.groups.multiplier).unsqueeze(-1)
        return scaled if zero_point is None else scaled + zero_point.unsqueeze(-1)

    def _stored(self, scale: Tensor) -> Tensor:
        one = torch.ones((), device=scale.device) if self.groups.scale_format in LARGEST_SHORT else None
        return straight_through(scale, store_scale(scale.detach(), self.groups.scale_format, global_scale=one))
