"""Scales as they are stored: float32, float16, bfloat16, E4M3 under a tensor-level multiplier, and E8M0.

A scale is rounded to its storage format before any code is chosen with it, it is never 0, and a group of zeros gets
scale 1. E4M3 alone cannot hold the scales of small weights (its least is 2^-9), so it always comes with a global scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from qtool.errors import SchemeError
from qtool.numerics.minifloats import (
    E2M1_MAX,
    E4M3_MAX,
    decode_e4m3,
    decode_e8m0,
    encode_e4m3,
    encode_e8m0,
    shared_exponents,
)
from qtool.scheme import ExponentRule, ScaleFormat

_FLOATS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Least and largest positive value. Subnormals count where the format is narrow and hardware keeps them.
_LIMITS: Mapping[str, tuple[float, float]] = {
    "fp32": (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max),
    "fp16": (2.0**-24, torch.finfo(torch.float16).max),
    "bf16": (torch.finfo(torch.bfloat16).tiny, torch.finfo(torch.bfloat16).max),
    "e4m3": (2.0**-9, E4M3_MAX),
    "e8m0": (2.0**-127, 2.0**127),
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
        global_scale: Multiplier of E4M3 scales, and of those only.

    Returns:
        Scales in float32, exactly as stored and still to be multiplied by ``global_scale``.

    Raises:
        SchemeError: E4M3 without a global scale, or a global scale without E4M3.
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
        global_scale: Multiplier of E4M3 scales, and of those only; what is stored is ``scale / global_scale``.

    Returns:
        Scales in float32, exactly as stored: of a magnitude that the format has, and 1 where ``scale`` is 0.

    Raises:
        SchemeError: E4M3 without a global scale, or a global scale without E4M3.
    """
    if (scale_format == "e4m3") != (global_scale is not None):
        raise SchemeError(
            f"`{scale_format}` scales {'need a' if global_scale is None else 'have no'} global scale",
            hint="pass what the format's `global_scale` returns for the largest magnitude of the tensor",
        )
    relative = scale.float() if global_scale is None else scale.float() / global_scale
    stored = decode_scale(encode_scale(relative.abs().clamp(*_LIMITS[scale_format]), scale_format), scale_format)
    return stored.copysign(relative).masked_fill(scale == 0, 1.0)


def encode_scale(scale: Float[Tensor, "*rows"], scale_format: ScaleFormat) -> Shaped[Tensor, "*rows"]:
    """Return scales in their storage dtype; E8M0 as uint8 exponents, which every reader of safetensors knows."""
    if scale_format == "e8m0":
        return encode_e8m0(scale)
    if scale_format == "e4m3":
        return encode_e4m3(scale).view(torch.float8_e4m3fn)
    return scale.to(_FLOATS[scale_format])


def decode_scale(stored: Shaped[Tensor, "*rows"], scale_format: ScaleFormat) -> Float[Tensor, "*rows"]:
    """Return the float32 values of stored scales."""
    if scale_format == "e8m0":
        return decode_e8m0(stored)
    if scale_format == "e4m3":
        return decode_e4m3(stored.view(torch.uint8))
    return stored.float()


def fp4_global_scale(amax: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return ``amax / (6 * 448)``: the multiplier at which the block with ``amax`` has the largest E4M3 scale.

    Args:
        amax: Largest magnitude of the tensor. Not modified.

    Returns:
        The multiplier in float32, 1 for a tensor of zeros. Some readers store its reciprocal.
    """
    multiplier = (amax.float() / (E2M1_MAX * E4M3_MAX)).clamp(min=_LEAST_GLOBAL_SCALE)
    return multiplier.masked_fill(amax == 0, 1.0)
