"""Scales as they are stored: floats, powers of two, and short ones under a tensor-level multiplier.

A scale is rounded to its storage format before any code is chosen with it, it is never 0, and a group of zeros gets
scale 1. E4M3 alone cannot hold the scales of small weights (its least is 2^-9), so it always comes with a global scale,
and so do the other short formats: UE5M3, which spends E4M3's sign on its exponent, and E2M1 and INT4 (1 to 15), whose
multiplier makes the largest scale of a tensor 6 or 15. E5M2 has the range of float16 and comes alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from qtool.errors import SchemeError
from qtool.numerics.minifloats import (
    E2M1,
    E4M3,
    UE5M3,
    Minifloat,
    decode_e8m0,
    encode_e8m0,
    shared_exponents,
)
from qtool.scheme import ExponentRule, ScaleFormat

_FLOATS: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e5m2": torch.float8_e5m2,
}
_MINIFLOATS: Mapping[str, Minifloat] = {"e4m3": E4M3, "ue5m3": UE5M3, "e2m1": E2M1}
LARGEST_SHORT: Mapping[str, float] = {**{name: kind.max_value for name, kind in _MINIFLOATS.items()}, "int4": 15.0}
"""Largest scale of the formats that have a tensor-level multiplier above them."""
PACKED = frozenset({"e2m1", "int4"})
"""Scale formats of 4 bits, two of which are stored in a byte."""
LIMITS: Mapping[str, tuple[float, float]] = {
    "fp32": (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max),
    "fp16": (2.0**-24, torch.finfo(torch.float16).max),
    "bf16": (torch.finfo(torch.bfloat16).tiny, torch.finfo(torch.bfloat16).max),
    "e5m2": (2.0**-16, torch.finfo(torch.float8_e5m2).max),
    **{name: (kind.min_value, kind.max_value) for name, kind in _MINIFLOATS.items()},
    "int4": (1.0, 15.0),
    "e8m0": (2.0**-127, 2.0**127),
}
"""Least and largest positive value. Subnormals count where the format is narrow and hardware keeps them."""
_LEAST_NORMAL: Mapping[str, float] = {
    "fp16": torch.finfo(torch.float16).tiny,
    "e5m2": torch.finfo(torch.float8_e5m2).tiny,
    "e4m3": E4M3.min_normal,
    "ue5m3": UE5M3.min_normal,
}
# Keeps global times block scale a normal float32, so that no device flushes a step to zero.
_LEAST_GLOBAL_SCALE = 2.0**-100


def fit_scale(
    amax: Float[Tensor, "*rows"],
    *,
    max_value: float,
    scale_format: ScaleFormat,
    exponent_rule: ExponentRule = "even",
    global_scale: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "*rows"]:
    """Return the stored scale that maps ``amax`` to ``max_value``: ``amax / max_value``, rounded.

    Args:
        amax: Largest magnitude of each group. Not modified.
        max_value: Largest magnitude of an element at scale 1.
        scale_format: How the scale is stored.
        exponent_rule: Rounding of power-of-two scales; see ``shared_exponents``.
        global_scale: Multiplier of short scales, and of those only.

    Returns:
        Scales in float32, exactly as stored and still to be multiplied by ``global_scale``.

    Raises:
        SchemeError: Short scales without a global scale, or a global scale without them.
    """
    if scale_format == "e8m0" and global_scale is None:
        return decode_e8m0((shared_exponents(amax, max_value=max_value, rule=exponent_rule) + 127).to(torch.uint8))
    return store_scale(amax.float() / max_value, scale_format, global_scale=global_scale)


def store_scale(
    scale: Float[Tensor, "*rows"], scale_format: ScaleFormat, *, global_scale: Float[Tensor, ""] | None = None
) -> Float[Tensor, "*rows"]:
    """Round step sizes to their storage format.

    Args:
        scale: Value of one code step; it keeps its sign. Not modified.
        scale_format: How it is stored; ``e8m0`` takes the nearest power of two (to fit one to values, with an exponent
            rule, use ``fit_scale``).
        global_scale: Multiplier of short scales, and of those only; what is stored is ``scale / global_scale``.

    Returns:
        Scales in float32, exactly as stored: of a magnitude that the format has, and 1 where ``scale`` is 0.

    Raises:
        SchemeError: Short scales without a global scale, or a global scale without them.
    """
    if (scale_format in LARGEST_SHORT) != (global_scale is not None):
        raise SchemeError(
            f"`{scale_format}` scales {'need a' if global_scale is None else 'have no'} global scale",
            hint="pass what the format's `global_scale` returns for the largest magnitude of the tensor",
        )
    relative = scale.float() if global_scale is None else scale.float() / global_scale
    stored = decode_scale(encode_scale(relative.abs().clamp(*LIMITS[scale_format]), scale_format), scale_format)
    return stored.copysign(relative).masked_fill(scale == 0, 1.0)


def count_subnormal(scale: Float[Tensor, "*rows"], scale_format: ScaleFormat) -> int:
    """Count stored scales whose mantissa is cut short, or which are the least that there is, since 0 is none.

    Scales of 4 bits do not count: they have hardly a mantissa to lose.
    """
    if scale_format in PACKED:
        return 0
    magnitude, least = scale.abs(), LIMITS[scale_format][0]
    return int(((magnitude < _LEAST_NORMAL.get(scale_format, 0.0)) | (magnitude <= least)).sum())


def count_saturated(scale: Float[Tensor, "*rows"], scale_format: ScaleFormat) -> int:
    """Count stored scales that are the largest of their format: what they were fitted to may lie far beyond.

    Scales under a multiplier do not count: it makes the largest of a tensor just that.
    """
    return 0 if scale_format in LARGEST_SHORT else int((scale.abs() >= LIMITS[scale_format][1]).sum())


def encode_scale(scale: Float[Tensor, "*rows"], scale_format: ScaleFormat) -> Shaped[Tensor, "*rows"]:
    """Return scales in their storage dtype; formats that not every reader of safetensors knows as uint8 codes."""
    if scale_format == "e8m0":
        return encode_e8m0(scale)
    if scale_format == "int4":
        return scale.round().to(torch.uint8)
    if scale_format in _MINIFLOATS:
        codes = _MINIFLOATS[scale_format].encode(scale)
        return codes.view(torch.float8_e4m3fn) if scale_format == "e4m3" else codes
    return scale.to(_FLOATS[scale_format])


def decode_scale(stored: Shaped[Tensor, "*rows"], scale_format: ScaleFormat) -> Float[Tensor, "*rows"]:
    """Return the float32 values of stored scales."""
    if scale_format == "e8m0":
        return decode_e8m0(stored)
    if scale_format in _MINIFLOATS:
        return _MINIFLOATS[scale_format].decode(stored.view(torch.uint8))
    return stored.float()


def fp4_global_scale(
    amax: Float[Tensor, ""], scale_format: ScaleFormat = "e4m3", *, largest: float | None = None
) -> Float[Tensor, ""]:
    """Return ``amax / (6 * 448)``: the multiplier at which the block with ``amax`` has the largest E4M3 scale.

    Args:
        amax: Largest magnitude of the tensor. Not modified.
        scale_format: Format of the scales below it; 448 is that of E4M3.
        largest: The scale that the block with ``amax`` gets instead, where some are to be larger.

    Returns:
        The multiplier in float32, 1 for a tensor of zeros. Some readers store its reciprocal.
    """
    largest = largest or LARGEST_SHORT[scale_format]
    multiplier = (amax.float() / (E2M1.max_value * largest)).clamp(min=_LEAST_GLOBAL_SCALE)
    return multiplier.masked_fill(amax == 0, 1.0)
