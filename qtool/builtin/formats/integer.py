"""Integers of 2 to 8 bits, symmetric or with a zero point."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qtool.builtin.formats.candidates import closest, range_factors
from qtool.builtin.formats.checks import nearest_scheme, refuse_unless_empty
from qtool.numerics.integers import (
    decode_integers,
    encode_integers,
    fit_asymmetric,
    fit_offset,
    fit_real,
    fit_symmetric,
    round_integers,
)
from qtool.scheme import GroupParameters, RangeRule, TensorScheme

_RULES: tuple[RangeRule, ...] = ("full", "half", "signed_full", "narrow")


def _defaults(name: str) -> TensorScheme:
    """Return what ``name`` alone means: symmetric, one bfloat16 scale an output row, nothing clipped."""
    return TensorScheme(format=name, scale="bf16")


class Integer:
    """``scale * (code - zero_point)``; symmetric codes are offset by ``2^(bits - 1)``.

    Zero points are integers of ``bits`` bits, and 0 always has a code; unless the scheme has ``real`` ones, or codes,
    or an offset in their place: ``scale * code + offset``.
    """

    name: str
    bits: int
    defaults: TensorScheme
    version = 1
    narrow = False

    def under(self, scheme: TensorScheme) -> Integer:
        """Return the format without its lowest code if the scheme says so."""
        return _narrowed(self) if scheme.range_rule == "narrow" else self

    def check(self, scheme: TensorScheme) -> None:
        """Refuse short scales, which are FP4's, and zero points beside power-of-two scales."""
        nearest, reasons = nearest_scheme(
            scheme,
            self.defaults,
            scales=("fp32", "fp16", "bf16", "e8m0"),
            zero_points=True,
            range_rules=_RULES,
            real_zero_points=True,
            scale_codes=True,
        )
        refuse_unless_empty(scheme, reasons, nearest)

    def global_scale(self, amax: Float[Tensor, ""], scheme: TensorScheme) -> None:
        """Return None: integers have one level of scales."""

    def fit(
        self,
        groups: Float[Tensor, "*rows group"],
        scheme: TensorScheme,
        *,
        global_scale: Float[Tensor, ""] | None = None,
        clip: float = 1.0,
    ) -> GroupParameters:
        """Fit scales, and zero points if asymmetric; ``global_scale`` has no meaning here.

        Those that are going to be codes are not rounded: their code depends on other groups.
        """
        coded = scheme.scale_bits is not None
        scale_format = "fp32" if coded else scheme.scale
        if scheme.offset:
            scale, offset = fit_offset(groups, num_bits=self.bits, scale_format=scale_format, clip=clip)
            return GroupParameters(scale, offset=offset)
        if not scheme.symmetric:
            fitted_by = fit_real if scheme.real or coded else fit_asymmetric
            scale, zero_point = fitted_by(groups, num_bits=self.bits, scale_format=scale_format, clip=clip)
            return GroupParameters(scale, zero_point)
        fitted = [
            fit_symmetric(
                groups,
                num_bits=self.bits,
                range_rule=scheme.range_rule,
                scale_format=scale_format,
                exponent_rule=scheme.exponent_rule,
                clip=clip * factor,
            )
            for factor in range_factors(scheme)
        ]
        return closest(groups, [GroupParameters(scale) for scale in fitted], self.round)

    def encode(self, groups: Float[Tensor, "*rows group"], parameters: GroupParameters) -> UInt8[Tensor, "*rows group"]:
        """Round values to codes, ties to even."""
        above, zero_point = _above_offset(groups, parameters), _zero_point(parameters)
        return encode_integers(above, parameters.step(), zero_point, self.bits, narrow=self.narrow)

    def decode(self, codes: UInt8[Tensor, "*rows group"], parameters: GroupParameters) -> Float[Tensor, "*rows group"]:
        """Return the float32 values that codes stand for."""
        decoded = decode_integers(codes, parameters.step(), _zero_point(parameters), self.bits)
        return decoded if parameters.offset is None else decoded.add_(parameters.offset.unsqueeze(-1))

    def round(self, groups: Float[Tensor, "*rows group"], parameters: GroupParameters) -> Float[Tensor, "*rows group"]:
        """Return the decoded values of the codes of ``groups``, in their dtype."""
        above, zero_point = _above_offset(groups, parameters), _zero_point(parameters)
        rounded = round_integers(above, parameters.step(), zero_point, self.bits, narrow=self.narrow)
        return rounded if parameters.offset is None else rounded.add_(parameters.offset.unsqueeze(-1)).to(groups.dtype)


def _above_offset(groups: Tensor, parameters: GroupParameters) -> Tensor:
    """Return what is divided by the step."""
    return groups if parameters.offset is None else groups.float() - parameters.offset.unsqueeze(-1)


def _zero_point(parameters: GroupParameters) -> Tensor | None:
    """Return what codes are counted from: 0 above an offset."""
    return parameters.zero_point if parameters.offset is None else torch.zeros_like(parameters.scale)


class _Narrow(Integer):
    """Symmetric integers whose lowest code stands for nothing, so that no search of levels finds it."""

    narrow = True

    def __init__(self, of: Integer) -> None:
        self.name, self.bits, self.defaults = of.name, of.bits, of.defaults

    def decode(self, codes: UInt8[Tensor, "*rows group"], parameters: GroupParameters) -> Float[Tensor, "*rows group"]:
        """Return the float32 values that codes stand for, NaN for code 0."""
        return super().decode(codes, parameters).masked_fill_(codes == 0, torch.nan)


@cache
def _narrowed(of: Integer) -> Integer:
    return of if of.narrow else _Narrow(of)


class Int2(Integer):
    """Four levels; symmetric ones are -2, -1, 0, 1."""

    name, bits, defaults = "int2", 2, _defaults("int2")


class Int3(Integer):
    """Eight levels."""

    name, bits, defaults = "int3", 3, _defaults("int3")


class Int4(Integer):
    """Sixteen levels."""

    name, bits, defaults = "int4", 4, _defaults("int4")


class Int5(Integer):
    """32 levels."""

    name, bits, defaults = "int5", 5, _defaults("int5")


class Int6(Integer):
    """64 levels."""

    name, bits, defaults = "int6", 6, _defaults("int6")


class Int7(Integer):
    """128 levels."""

    name, bits, defaults = "int7", 7, _defaults("int7")


class Int8(Integer):
    """256 levels."""

    name, bits, defaults = "int8", 8, _defaults("int8")
