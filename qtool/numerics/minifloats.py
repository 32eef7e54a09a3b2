"""Floats of 4 and 8 bits: E2M1 and E4M3 elements, and E8M0, the power of two that MX blocks share.

Rounding is to nearest, ties to the even code, and elements saturate instead of becoming infinite or NaN. Signed
zeros have codes of their own; the rounding functions return values only, in which a zero may lose its sign.

References:
    Rouhani et al. 2023, OCP Microscaling Formats (MX) v1.0. Micikevicius et al. 2022, FP8, arXiv:2209.05433.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from qtool.scheme import ExponentRule

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_EXPONENT_FIELD = 0x7F800000
_MANTISSA_BITS = 23
_BIAS = 127


def round_e2m1(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round to the nearest of ``0, ±.5, ±1, ±1.5, ±2, ±3, ±4, ±6`` in float32; NaN stays NaN."""
    return _round(x, max_value=E2M1_MAX, min_normal=1.0, mantissa_bits=1)


def encode_e2m1(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Round to E2M1 and return ``sign << 3 | index``, the index being that of the magnitude in ``E2M1_MAGNITUDES``."""
    halves = round_e2m1(x).abs_().mul_(2).to(torch.uint8)
    # 0, 1, 2, 3, 4 halves have themselves as index; 6, 8 and 12 have floor(h / 4) + 4, which is never less below.
    index = torch.minimum(halves, (halves >> 2) + 4)
    return index | x.signbit().to(torch.uint8) << 3


def decode_e2m1(codes: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the float32 values of 4-bit codes; code 8 is -0."""
    signed = (*E2M1_MAGNITUDES, *(-value for value in E2M1_MAGNITUDES))
    table = torch.tensor(signed, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.flatten().int()).reshape(codes.shape)


def round_e4m3(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round to the nearest finite E4M3fn value, ±448 at most, in float32; NaN stays NaN."""
    return _round(x, max_value=E4M3_MAX, min_normal=2.0**-6, mantissa_bits=3)


def encode_e4m3(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Round to E4M3fn and return the bytes; the NaN codes 127 and 255 come from NaN only."""
    # Clamped first, because not every version and device saturates in the cast.
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def decode_e4m3(codes: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the float32 values of E4M3fn bytes."""
    return codes.view(torch.float8_e4m3fn).float()


def _round(x: Tensor, *, max_value: float, min_normal: float, mantissa_bits: int) -> Tensor:
    """Round to a float format with ``M`` mantissa bits: nearest, ties to even, saturating.

    The format's spacing at ``x`` is ``q = max(2^floor(log2 |x|), min_normal) / 2^M``. Adding and subtracting
    ``1.5 * 2^23 * q``, whose float32 neighbours are ``q`` apart, rounds to a multiple of ``q``: seven passes, no table.
    """
    rounded = x.float().clamp(-max_value, max_value)
    binade = (rounded.view(torch.int32) & _EXPONENT_FIELD).view(torch.float32)
    shift = binade.clamp_(min=min_normal).mul_(1.5 * 2.0 ** (_MANTISSA_BITS - mantissa_bits))
    return rounded.add_(shift).sub_(shift)


def shared_exponents(amax: Float[Tensor, "*rows"], *, max_value: float, rule: ExponentRule) -> Int[Tensor, "*rows"]:
    """Choose the exponent ``k`` of the power-of-two scale ``2^k`` of blocks.

    ``floor`` is ``floor(log2 amax) - floor(log2 max_value)``. ``even`` adds one where ``amax`` is at least half way
    from ``max_value`` to the next power of two (7 for E2M1: mantissas from 1.75). ``rceil`` is
    ``ceil(log2(amax / max_value))``, the least at which ``amax`` does not saturate. All three work on the bits of
    ``amax`` and are exact for normal float32.

    Args:
        amax: Largest magnitude of each block, not negative. Not modified.
        max_value: Largest magnitude of an element at scale 1.
        rule: How the exponent is rounded.

    Returns:
        Exponents in [-127, 127] as int32, so that E8M0's NaN (255) is never written; 0 for blocks of zeros.

    References:
        Rouhani et al. 2023, OCP Microscaling Formats (MX) v1.0, section 6.3 (``floor``).
    """
    fraction, exponent = math.frexp(max_value)
    one = 1 << _MANTISSA_BITS
    mantissa = round((2 * fraction - 1) * one)
    carry = {"floor": 0, "even": (one - mantissa) // 2, "rceil": one - 1 - mantissa}[rule]
    biased = (amax.float().view(torch.int32) + carry) >> _MANTISSA_BITS
    return (biased - _BIAS - (exponent - 1)).clamp(-_BIAS, _BIAS).masked_fill(amax == 0, 0)


def encode_e8m0(scale: Float[Tensor, "*rows"]) -> UInt8[Tensor, "*rows"]:
    """Return the exponent bytes of the powers of two nearest to ``scale``, at most 254 (255 comes from NaN only)."""
    limit = 2.0**_BIAS
    return scale.float().clamp(1 / limit, limit).to(torch.float8_e8m0fnu).view(torch.uint8)


def decode_e8m0(codes: UInt8[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Return ``2^(code - 127)`` in float32, NaN for 255."""
    return codes.view(torch.float8_e8m0fnu).float()
