"""What formats of small floats share: steps, zero points, and names that stand for a block and its scale."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float, UInt8
from torch import Tensor

from qtool.builtin.formats.candidates import closest, range_factors
from qtool.builtin.formats.checks import nearest_scheme, refuse_unless_empty
from qtool.numerics.groups import largest_magnitude
from qtool.numerics.minifloats import Minifloat
from qtool.numerics.scales import fit_scale
from qtool.scheme import GroupParameters, RangeRule, ScaleFormat, TensorScheme


class Floats:
    """``step * (element(code) - zero_point)`` with ``scale = amax / max_value``.

    Codes are never NaN or infinite. Asymmetric groups, which only some formats have, are shifted by the middle of their
    range, ``c = (max + min) / 2``, before they are rounded with ``scale = (max - min) / (2 * max_value)``; the zero
    point is ``-c / scale``, a float32 that is not a code.
    """

    name: str
    bits: int
    defaults: TensorScheme
    version: int = 1
    element: Minifloat
    scales: tuple[ScaleFormat, ...] = ("fp32", "fp16", "bf16", "e8m0")
    zero_points: bool = False
    range_rules: tuple[RangeRule, ...] = ()
    blocks: bool = False

    def check(self, scheme: TensorScheme) -> None:
        """Refuse zero points, scales and rules that the format does not have."""
        nearest, reasons = self._nearest(scheme)
        refuse_unless_empty(scheme, reasons, nearest)

    def _nearest(self, scheme: TensorScheme) -> tuple[TensorScheme, list[str]]:
        """Return the nearest scheme that works, and what is wrong with this one."""
        return nearest_scheme(
            scheme,
            self.defaults,
            scales=self.scales,
            zero_points=self.zero_points,
            range_rules=self.range_rules,
            blocks=self.blocks,
        )

    def global_scale(self, amax: Float[Tensor, ""], scheme: TensorScheme) -> Float[Tensor, ""] | None:
        """Return None: there is one level of scales."""
        return None

    def fit(
        self,
        groups: Float[Tensor, "*rows group"],
        scheme: TensorScheme,
        *,
        global_scale: Float[Tensor, ""] | None = None,
        clip: float = 1.0,
    ) -> GroupParameters:
        """Fit scales, and shifts if asymmetric; an asymmetric group of equal values keeps its value."""
        if scheme.symmetric:
            center, reach = None, largest_magnitude(groups)
        else:
            low, high = groups.amin(-1).float(), groups.amax(-1).float()
            center, reach = (low + high) / 2, (high - low) / 2
        fitted = []
        for factor in range_factors(scheme):
            scale = fit_scale(
                reach * (clip * factor),
                max_value=self.element.max_value,
                scale_format=scheme.scale,
                exponent_rule=scheme.exponent_rule,
                global_scale=global_scale,
            )
            fitted.append(GroupParameters(scale, None if center is None else -center / scale, global_scale))
        return closest(groups, fitted, self.round)

    def encode(self, groups: Float[Tensor, "*rows group"], parameters: GroupParameters) -> UInt8[Tensor, "*rows group"]:
        """Round values to codes, ties to the even code."""
        return self.element.encode(_in_steps(groups, parameters))

    def decode(self, codes: UInt8[Tensor, "*rows group"], parameters: GroupParameters) -> Float[Tensor, "*rows group"]:
        """Return the float32 values that codes stand for."""
        return _from_steps(self.element.decode(codes), parameters)

    def round(self, groups: Float[Tensor, "*rows group"], parameters: GroupParameters) -> Float[Tensor, "*rows group"]:
        """Return the decoded values of the codes of ``groups``, in their dtype."""
        return _from_steps(self.element.round(_in_steps(groups, parameters)), parameters).to(groups.dtype)


def _in_steps(groups: Tensor, parameters: GroupParameters) -> Tensor:
    """Return ``x / step + zero_point`` in float32, newly allocated."""
    scaled = groups.float() / parameters.step().unsqueeze(-1)
    return scaled if parameters.zero_point is None else scaled.add_(parameters.zero_point.unsqueeze(-1))


def _from_steps(values: Tensor, parameters: GroupParameters) -> Tensor:
    """Turn a new tensor of elements, in place, into ``step * (value - zero_point)``."""
    if parameters.zero_point is not None:
        values = values.sub_(parameters.zero_point.unsqueeze(-1))
    return values.mul_(parameters.step().unsqueeze(-1))


class Block(Floats):
    """Floats with a group size and a scale format that are part of their name.

    Attributes:
        plain: The format with the same elements that takes other groups and scales.
    """

    plain: str

    def _nearest(self, scheme: TensorScheme) -> tuple[TensorScheme, list[str]]:
        """Send other groups and other scale formats to the plain format, as far as that takes them."""
        own = self.defaults
        reason = f"`{self.name}` has {own.scale} scales of {own.group_size} values and no zero point"
        nearest = scheme if scheme.symmetric else replace(scheme, symmetric=True)
        shared = (own.strategy, own.group_size, own.scale)
        if (scheme.strategy, scheme.group_size, scheme.scale) != shared or scheme.static:
            nearest = replace(nearest, format=self.plain)
        corrected, reasons = super()._nearest(nearest)
        return corrected, reasons if nearest == scheme else [reason]


def block_of_32(name: str) -> TensorScheme:
    """Return what the name of an OCP MX format means: 32 values share a power of two."""
    return TensorScheme(format=name, strategy="group", group_size=32, scale="e8m0")
