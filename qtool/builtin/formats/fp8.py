"""8-bit floats E4M3fn, Micikevicius et al. 2022, FP8 formats for deep learning, arXiv:2209.05433."""

from __future__ import annotations

from jaxtyping import Float, UInt8
from torch import Tensor

from qtool.builtin.formats.checks import nearest_scheme, refuse_unless_empty
from qtool.numerics.groups import largest_magnitude
from qtool.numerics.minifloats import E4M3_MAX, decode_e4m3, encode_e4m3, round_e4m3
from qtool.numerics.scales import fit_scale
from qtool.scheme import GroupParameters, TensorScheme


class E4M3:
    """``scale * e4m3(code)`` with ``scale = amax / 448``; codes are E4M3fn bytes and never NaN."""

    name: str = "fp8"
    bits: int = 8
    defaults: TensorScheme = TensorScheme(format="fp8")
    version: int = 1

    def check(self, scheme: TensorScheme) -> None:
        """Refuse zero points and E4M3 scales."""
        scales = ("fp32", "fp16", "bf16", "e8m0")
        nearest, reasons = nearest_scheme(scheme, self.defaults, scales=scales, zero_points=False, range_rules=False)
        refuse_unless_empty(scheme, reasons, nearest)

    def global_scale(self, amax: Float[Tensor, ""], scheme: TensorScheme) -> None:
        """Return None: there is one level of scales."""

    def fit(
        self,
        groups: Float[Tensor, "*rows group"],
        scheme: TensorScheme,
        *,
        global_scale: Float[Tensor, ""] | None = None,
        clip: float = 1.0,
    ) -> GroupParameters:
        """Fit scales; ``global_scale`` has no meaning here."""
        scale = fit_scale(
            largest_magnitude(groups) * clip,
            max_value=E4M3_MAX,
            scale_format=scheme.scale,
            exponent_rule=scheme.exponent_rule,
        )
        return GroupParameters(scale)

    def encode(self, groups: Float[Tensor, "*rows group"], parameters: GroupParameters) -> UInt8[Tensor, "*rows group"]:
        """Round values to E4M3fn bytes, ties to the even code."""
        return encode_e4m3(groups.float() / parameters.step().unsqueeze(-1))

    def decode(self, codes: UInt8[Tensor, "*rows group"], parameters: GroupParameters) -> Float[Tensor, "*rows group"]:
        """Return the float32 values that codes stand for."""
        return decode_e4m3(codes).mul_(parameters.step().unsqueeze(-1))

    def round(self, groups: Float[Tensor, "*rows group"], parameters: GroupParameters) -> Float[Tensor, "*rows group"]:
        """Return the decoded values of the codes of ``groups``, in their dtype."""
        steps = parameters.step().unsqueeze(-1)
        return round_e4m3(groups.float() / steps).mul_(steps).to(groups.dtype)
