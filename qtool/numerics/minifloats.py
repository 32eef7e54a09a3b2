"""Floats of 4 to 8 bits: elements, scales without a sign, and E8M0, the power of two that MX blocks share.

Rounding is to nearest, ties to the even code, and elements saturate instead of becoming infinite or NaN. Without a
mantissa there is no even one, and ties between powers of two go to the larger (IEEE 754-2019, section 4.3.1). Signed
zeros have codes of their own; what is rounded is values only, in which a zero may lose its sign.

References:
    Rouhani et al. 2023, OCP Microscaling Formats (MX) v1.0. Micikevicius et al. 2022, FP8, arXiv:2209.05433.
    Liu et al. 2023, LLM-FP4, arXiv:2310.16836 (E1M2 and E3M0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from qtool.scheme import ExponentRule

_EXPONENT_FIELD = 0x7F800000
_MANTISSA_BITS = 23
_BIAS = 127


@dataclass(frozen=True)
class Minifloat:
    """A float of 4 to 8 bits: sign if it has one, ``E`` bits of exponent, ``M`` bits of mantissa, as IEEE 754 has them.

    Codes from that of ``max_value`` on stand for nothing finite: where the format has an infinity it is the next one,
    and all others are NaN.

    Attributes:
        exponent_bits: ``E``; the bias is ``2^(E - 1) - 1``.
        mantissa_bits: ``M``.
        max_value: Largest finite value.
        signed: Whether there is a sign; if not, the top bit belongs to the exponent and negative values become 0.
        native: torch's own dtype for the bytes, which is faster, if it has one.
    """

    exponent_bits: int
    mantissa_bits: int
    max_value: float
    signed: bool = True
    native: torch.dtype | None = None

    @property
    def min_normal(self) -> float:
        """The least value with a whole mantissa."""
        return math.ldexp(4.0, -(2 ** (self.exponent_bits - 1)))

    @property
    def min_value(self) -> float:
        """The least value above 0."""
        return math.ldexp(self.min_normal, -self.mantissa_bits)

    def round(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round to the nearest finite value, in float32: ties to the even code, saturating; NaN stays NaN.

        The format's spacing at ``x`` is ``q = max(2^floor(log2 |x|), min_normal) / 2^M``. Adding and subtracting
        ``1.5 * 2^23 * q``, whose float32 neighbours are ``q`` apart, rounds to a multiple of ``q``: seven passes, no
        table.
        """
        rounded = x.float().clamp(-self.max_value if self.signed else 0.0, self.max_value)
        binade = (rounded.view(torch.int32) & _EXPONENT_FIELD).view(torch.float32)
        shift = binade.clamp_(min=self.min_normal).mul_(1.5 * 2.0 ** (_MANTISSA_BITS - self.mantissa_bits))
        return rounded.add_(shift).sub_(shift)

    def encode(self, x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
        """Round as ``round`` does and return the codes, with a sign also for zeros.

        NaN has a code where the format has one and torch knows it; elsewhere its code is any.
        """
        if self.native is not None:
            # Clamped first, because not every version and device saturates in the cast.
            return x.float().clamp(-self.max_value, self.max_value).to(self.native).view(torch.uint8)
        magnitude = self.round(x).abs_()
        # A normal float32 has the exponent and the top of the mantissa side by side, as the code has them.
        offset = (_BIAS + 1 - 2 ** (self.exponent_bits - 1)) << self.mantissa_bits
        fields = (magnitude.view(torch.int32) >> (_MANTISSA_BITS - self.mantissa_bits)).sub_(offset)
        # Below, the code counts the least value; above, this is never more than the other.
        steps = magnitude.div_(self.min_value).clamp_(max=2**self.mantissa_bits).int()
        codes = torch.maximum(fields, steps).to(torch.uint8)
        return (
            codes | x.signbit().to(torch.uint8) << (self.exponent_bits + self.mantissa_bits) if self.signed else codes
        )

    def decode(self, codes: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the float32 values of codes, by a table, since torch casts its own dtypes one by one."""
        return look_up(self.values, codes)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """What each code stands for."""
        if self.native is not None:
            return tuple(torch.arange(256, dtype=torch.uint8).view(self.native).float().tolist())
        magnitudes = []
        for code in range(2 ** (self.exponent_bits + self.mantissa_bits)):
            exponent, mantissa = divmod(code, 2**self.mantissa_bits)
            whole = mantissa + 2**self.mantissa_bits * (exponent > 0)
            value = math.ldexp(whole * self.min_value, max(exponent - 1, 0))
            magnitudes.append(value if value <= self.max_value else math.nan)
        return (*magnitudes, *(-value for value in magnitudes)) if self.signed else tuple(magnitudes)


def look_up(table: tuple[float, ...], codes: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the entries of a table in float32."""
    return _on_device(table, codes.device).index_select(0, codes.flatten().int()).reshape(codes.shape)


@cache
def _on_device(table: tuple[float, ...], device: torch.device) -> Float[Tensor, " codes"]:
    """Return a table, sent to a device once: what a CUDA graph records may copy nothing from the host."""
    with torch.inference_mode(mode=False):  # a cached inference tensor could not serve a later backward pass
        return torch.tensor(table, dtype=torch.float32, device=device)


E1M2 = Minifloat(1, 2, 3.5)
E2M1 = Minifloat(2, 1, 6.0)
E3M0 = Minifloat(3, 0, 16.0)
E2M3 = Minifloat(2, 3, 7.5)
E3M2 = Minifloat(3, 2, 28.0)
E4M3 = Minifloat(4, 3, 448.0, native=torch.float8_e4m3fn)
E5M2 = Minifloat(5, 2, 57344.0, native=torch.float8_e5m2)
UE5M3 = Minifloat(5, 3, 114688.0, signed=False)


def shared_exponents(amax: Float[Tensor, "*rows"], *, max_value: float, rule: ExponentRule) -> Int[Tensor, "*rows"]:
    """Choose the exponent ``k`` of the power-of-two scale ``2^k`` of blocks.

    ``floor`` is ``floor(log2 amax) - floor(log2 max_value)``. ``even`` adds one where ``amax`` is at least half way
    from ``max_value`` to the next power of two (7 for E2M1: mantissas from 1.75). ``rceil`` is
    ``ceil(log2(amax / max_value))``, the least at which ``amax`` does not saturate. All three work on the bits of
    ``amax`` and are exact for normal float32.

    Args:
        amax: Largest magnitude of each block, not negative. Not modified.
        max_value: Largest magnitude of an element at scale 1.
        rule: How the exponent is rounded; ``search``, which is about values, starts from ``even``.

    Returns:
        Exponents in [-127, 127] as int32, so that E8M0's NaN (255) is never written; 0 for blocks of zeros.

    References:
        Rouhani et al. 2023, OCP Microscaling Formats (MX) v1.0, section 6.3 (``floor``).
    """
    fraction, exponent = math.frexp(max_value)
    one = 1 << _MANTISSA_BITS
    mantissa = round((2 * fraction - 1) * one)
    carry = {"floor": 0, "rceil": one - 1 - mantissa}.get(rule, (one - mantissa) // 2)
    biased = (amax.float().view(torch.int32) + carry) >> _MANTISSA_BITS
    return (biased - _BIAS - (exponent - 1)).clamp(-_BIAS, _BIAS).masked_fill(amax == 0, 0)


def encode_e8m0(scale: Float[Tensor, "*rows"]) -> UInt8[Tensor, "*rows"]:
    """Return the exponent bytes of the powers of two nearest to ``scale``, at most 254 (255 comes from NaN only)."""
    limit = 2.0**_BIAS
    return scale.float().clamp(1 / limit, limit).to(torch.float8_e8m0fnu).view(torch.uint8)


def decode_e8m0(codes: UInt8[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Return ``2^(code - 127)`` in float32, NaN for 255."""
    return codes.view(torch.float8_e8m0fnu).float()
