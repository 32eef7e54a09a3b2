"""4-bit floats E2M1: plain, and as the block formats MXFP4 (OCP MX v1.0) and NVFP4 (NVIDIA 2025, arXiv:2509.25149)."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float, UInt8
from torch import Tensor

from qtool.builtin.formats.checks import nearest_scheme, refuse_unless_empty
from qtool.numerics.groups import largest_magnitude
from qtool.numerics.minifloats import E2M1_MAX, decode_e2m1, encode_e2m1, round_e2m1
from qtool.numerics.scales import fit_scale, fp4_global_scale
from qtool.scheme import GroupParameters, TensorScheme


class E2M1:
    """``step * (e2m1(code) - zero_point)`` with codes ``sign << 3 | index``.

    Asymmetric groups are shifted by the middle of their range, ``c = (max + min) / 2``, before they are rounded with
    ``scale = (max - min) / 12``; the zero point is ``-c / scale``, a float32 that is not a code. E4M3 scales have a
    global scale above them, all others do not.
    """

    name: str = "fp4"
    bits: int = 4
    defaults: TensorScheme = TensorScheme(format="fp4")
    version: int = 1

    def check(self, scheme: TensorScheme) -> None:
        """Refuse zero points beside 8-bit scales, and rules that are not about E2M1."""
        nearest, reasons = self._nearest(scheme)
        refuse_unless_empty(scheme, reasons, nearest)

    def _nearest(self, scheme: TensorScheme) -> tuple[TensorScheme, list[str]]:
        """Return the nearest scheme that works, and what is wrong with this one."""
        scales = ("fp32", "fp16", "bf16", "e4m3", "e8m0")
        return nearest_scheme(scheme, self.defaults, scales=scales, zero_points=True, range_rules=False)

    def global_scale(self, amax: Float[Tensor, ""], scheme: TensorScheme) -> Float[Tensor, ""] | None:
        """Return ``amax / (6 * 448)`` for E4M3 scales, otherwise None."""
        return fp4_global_scale(amax) if scheme.scale == "e4m3" else None

    def fit(
        self,
        groups: Float[Tensor, "*rows group"],
        scheme: TensorScheme,
        *,
        global_scale: Float[Tensor, ""] | None = None,
        clip: float = 1.0,
    ) -> GroupParameters:
        """Fit scales, and shifts if asymmetric; a group of equal values keeps its value."""
        if scheme.symmetric:
            center, reach = None, largest_magnitude(groups)
        else:
            low, high = groups.amin(-1).float(), groups.amax(-1).float()
            center, reach = (low + high) / 2, (high - low) / 2
        scale = fit_scale(
            reach * clip,
            max_value=E2M1_MAX,
            scale_format=scheme.scale,
            exponent_rule=scheme.exponent_rule,
            global_scale=global_scale,
        )
        return GroupParameters(scale, None if center is None else -center / scale, global_scale)

    def encode(self, groups: Float[Tensor, "*rows group"], parameters: GroupParameters) -> UInt8[Tensor, "*rows group"]:
        """Round values to codes, ties to the even code."""
        return encode_e2m1(_in_steps(groups, parameters))

    def decode(self, codes: UInt8[Tensor, "*rows group"], parameters: GroupParameters) -> Float[Tensor, "*rows group"]:
        """Return the float32 values that codes stand for."""
        return _from_steps(decode_e2m1(codes), parameters)

    def round(self, groups: Float[Tensor, "*rows group"], parameters: GroupParameters) -> Float[Tensor, "*rows group"]:
        """Return the decoded values of the codes of ``groups``, in their dtype."""
        return _from_steps(round_e2m1(_in_steps(groups, parameters)), parameters).to(groups.dtype)


def _in_steps(groups: Tensor, parameters: GroupParameters) -> Tensor:
    """Return ``x / step + zero_point`` in float32, newly allocated."""
    scaled = groups.float() / parameters.step().unsqueeze(-1)
    return scaled if parameters.zero_point is None else scaled.add_(parameters.zero_point.unsqueeze(-1))


def _from_steps(values: Tensor, parameters: GroupParameters) -> Tensor:
    """Turn a new tensor of E2M1 values, in place, into ``step * (value - zero_point)``."""
    if parameters.zero_point is not None:
        values = values.sub_(parameters.zero_point.unsqueeze(-1))
    return values.mul_(parameters.step().unsqueeze(-1))


class _Block(E2M1):
    """E2M1 with a group size and a scale format that are part of its name."""

    def _nearest(self, scheme: TensorScheme) -> tuple[TensorScheme, list[str]]:
        """Send other groups and other scale formats to plain ``fp4``, which takes them."""
        own = self.defaults
        reason = f"`{self.name}` has {own.scale} scales of {own.group_size} values and no zero point"
        nearest = scheme if scheme.symmetric else replace(scheme, symmetric=True)
        if (scheme.strategy, scheme.group_size, scheme.scale) != (own.strategy, own.group_size, own.scale):
            nearest = replace(nearest, format="fp4")
        corrected, reasons = super()._nearest(nearest)
        return corrected, reasons if nearest == scheme else [reason]


class MXFP4(_Block):
    """OCP MXFP4: 32 values share a power of two."""

    name = "mxfp4"
    defaults = TensorScheme(format="mxfp4", strategy="group", group_size=32, scale="e8m0")


class NVFP4(_Block):
    """NVFP4: 16 values share an E4M3 scale, and a tensor a float32 multiplier."""

    name = "nvfp4"
    defaults = TensorScheme(format="nvfp4", strategy="group", group_size=16, scale="e4m3")
