"""Integer codes: ``value = scale * (code - zero_point)`` with codes in ``[0, 2^b - 1]``.

``value = scale * code + offset`` has an offset in place of a zero point. Where a product ``scale * zero_point`` would
have to be rounded to be stored, as in GGUF's Q4_1, it is the offset that is stored, and codes are chosen against it.

Symmetric integers have ``z = 2^(b-1)``, that is the signed range ``[-qmax - 1, qmax]`` with ``qmax = 2^(b-1) - 1``. The
lowest code is legal under every range rule but ``narrow``, whether or not a fit reaches it: values may lie outside the
fitted range (clipping, error feedback). Checkpoints for kernels that cannot take -128 are made under ``narrow``.

``tight`` uses both ends and clips neither. ``signed_full`` turns the grid, by the sign of the scale, so that the longer
end is at the largest value: measured, it is the best rule for few bits (``recipes/README.md``). Under ``half`` both
ends lie on a tie, which the last bit of a rounded scale decides, and the top code decodes inside the range, so that a
second fit on decoded values would shrink it. Scales are fitted once and stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qtool.numerics.groups import largest_magnitude
from qtool.numerics.scales import LIMITS, decode_scale, encode_scale, fit_scale, store_scale
from qtool.scheme import ExponentRule, RangeRule, ScaleFormat

_COUNTED: Mapping[str, float] = {"fp32": 2.0**24, "bf16": 2.0**8, "fp16": 2.0**11}
"""The number up to which each format of scales has every whole one."""


def fit_symmetric(
    groups: Float[Tensor, "*rows group"],
    *,
    num_bits: int,
    range_rule: RangeRule,
    scale_format: ScaleFormat,
    exponent_rule: ExponentRule = "even",
    clip: float = 1.0,
) -> Float[Tensor, "*rows"]:
    """Fit scales ``max(max / qmax, -min / (qmax + 1))``, ``amax / qmax``, ``amax / (qmax + ½)`` or ``-v / (qmax + 1)``.

    ``v`` is the value of the largest magnitude, of two the positive one.

    Args:
        groups: Values; the last axis shares a scale. Not modified.
        num_bits: Bits of a code, 2 to 8.
        range_rule: ``tight``, ``full``, ``half`` or ``signed_full``, in this order; ``narrow`` as ``full``. Powers of
            two follow ``exponent_rule`` instead.
        scale_format: How the scale is stored.
        exponent_rule: Rounding of power-of-two scales; see ``shared_exponents``.
        clip: Fraction of the range that is kept, above 0; beyond 1 steps are wider than the range asks for.

    Returns:
        Scales in float32, exactly as stored; under ``signed_full`` they have a sign.
    """
    qmax = 2 ** (num_bits - 1) - 1
    amax = largest_magnitude(groups) * clip
    if scale_format == "e8m0":
        return fit_scale(amax, max_value=float(qmax), scale_format=scale_format, exponent_rule=exponent_rule)
    high, low = groups.amax(-1).float() * clip, groups.amin(-1).float() * clip
    if range_rule == "tight":
        return store_scale(torch.maximum(high / qmax, -low / (qmax + 1)), scale_format)
    if range_rule == "signed_full":
        return store_scale(torch.where(high >= -low, high, low) / -(qmax + 1), scale_format)
    return store_scale(amax / (qmax + 0.5 if range_rule == "half" else qmax), scale_format)


def fit_asymmetric(
    groups: Float[Tensor, "*rows group"], *, num_bits: int, scale_format: ScaleFormat, clip: float = 1.0
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Fit ``scale = (max - min) / (2^b - 1)`` and ``zero_point = round(-min / scale)``.

    The range is widened to hold 0, which then has a code of its own; the scale is rounded to its storage format
    before the zero point is derived from it.

    Args:
        groups: Values; the last axis shares a scale. Not modified.
        num_bits: Bits of a code, 2 to 8.
        scale_format: How the scale is stored.
        clip: Fraction of both ends of the range that is kept, above 0.

    Returns:
        Scales, exactly as stored, and zero points, integers in ``[0, 2^b - 1]``; both in float32.
    """
    top_code = 2**num_bits - 1
    low = groups.amin(-1).float().clamp(max=0.0) * clip
    high = groups.amax(-1).float().clamp(min=0.0) * clip
    scale = store_scale((high - low) / top_code, scale_format)
    return scale, (-low / scale).round_().clamp_(0, top_code)


def fit_real(
    groups: Float[Tensor, "*rows group"], *, num_bits: int, scale_format: ScaleFormat, clip: float = 1.0
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Fit ``scale = (max - min) / (2^b - 1)`` and ``zero_point = -min / scale``, a real number in the scale's format.

    The range need not hold 0. Far from it a zero point would have more digits than its format: there the step is
    wider, so that none is above the number up to which the format counts by ones (256 for bfloat16). A group of one
    value keeps it.

    Args:
        groups: Values; the last axis shares a scale. Not modified.
        num_bits: Bits of a code, 2 to 8.
        scale_format: How scale and zero point are stored.
        clip: Fraction of the range that is kept, about its middle; above 0.

    Returns:
        Scales and zero points, exactly as stored, in float32.
    """
    top_code = 2**num_bits - 1
    low, high = _ends(groups, clip)
    furthest = torch.maximum(low.abs(), high.abs()) / _COUNTED[scale_format]
    width = torch.where(high > low, torch.maximum((high - low) / top_code, furthest), low.abs() / top_code)
    scale = store_scale(width, scale_format)
    return scale, decode_scale(encode_scale(-low / scale, scale_format), scale_format)


def fit_offset(
    groups: Float[Tensor, "*rows group"], *, num_bits: int, scale_format: ScaleFormat, clip: float = 1.0
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Fit ``offset = min``, rounded to the scale's format, and ``scale = (v - offset) / (2^b - 1)``.

    ``v`` is the end of the range that is farther from the rounded offset: the largest value, unless the range is so
    narrow that rounding puts the offset past its middle. Values that are ``scale * code + offset``, with a positive
    scale, of which some have the first code and some the last, are fitted by just these numbers where the offset is not
    so large beside the scale that float32 loses digits of their difference.

    Args:
        groups: Values; the last axis shares a scale. Not modified.
        num_bits: Bits of a code, 2 to 8.
        scale_format: How scale and offset are stored.
        clip: Fraction of the range that is kept, about its middle; above 0.

    Returns:
        Scales, negative where ``v`` is below the offset, and offsets, exactly as stored, in float32.
    """
    low, high = _ends(groups, clip)
    most = LIMITS[scale_format][1]
    offset = decode_scale(encode_scale(low.clamp(-most, most), scale_format), scale_format)
    above, below = high - offset, low - offset
    return store_scale(torch.where(above >= -below, above, below) / (2**num_bits - 1), scale_format), offset


def _ends(groups: Float[Tensor, "*rows group"], clip: float) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Return the least and the largest value, of the range's fraction about its middle."""
    least, most = groups.amin(-1).float(), groups.amax(-1).float()
    cut = (most - least) / 2 * (1 - clip)
    return least + cut, most - cut


def encode_integers(
    groups: Float[Tensor, "*rows group"],
    step: Float[Tensor, "*rows"],
    zero_point: Float[Tensor, "*rows"] | None,
    num_bits: int,
    *,
    narrow: bool = False,
) -> UInt8[Tensor, "*rows group"]:
    """Return ``clamp(round(x / step + zero_point), 0, 2^b - 1)``.

    Under whole zero points ties of ``x / step`` go to even.

    Args:
        groups: Values; the last axis shares a step. Not modified.
        step: Value of one code.
        zero_point: Where 0 is among the codes, whole or not; None for symmetric codes.
        num_bits: Bits of a code.
        narrow: Whether the lowest code stays unused.

    Returns:
        Codes.
    """
    codes = _nearest(groups.float() / step.unsqueeze(-1), zero_point, num_bits)
    return codes.clamp_(int(narrow), 2**num_bits - 1).to(torch.uint8)


def _nearest(
    steps: Float[Tensor, "*rows group"], zero_point: Float[Tensor, "*rows"] | None, num_bits: int
) -> Float[Tensor, "*rows group"]:
    """Round values in units of their step to codes, in place; they may lie outside the range.

    What a zero point has beyond a whole number is added before rounding: nothing, if it is whole.
    """
    if zero_point is None:
        return steps.round_().add_(2 ** (num_bits - 1))
    whole = zero_point.round()
    return steps.add_((zero_point - whole).unsqueeze(-1)).round_().add_(whole.unsqueeze(-1))


def decode_integers(
    codes: UInt8[Tensor, "*rows group"],
    step: Float[Tensor, "*rows"],
    zero_point: Float[Tensor, "*rows"] | None,
    num_bits: int,
) -> Float[Tensor, "*rows group"]:
    """Return ``step * (code - zero_point)`` in float32; arguments as for ``encode_integers``."""
    centered = codes.float().sub_(2 ** (num_bits - 1) if zero_point is None else zero_point.unsqueeze(-1))
    return centered.mul_(step.unsqueeze(-1))


def round_integers(
    groups: Float[Tensor, "*rows group"],
    step: Float[Tensor, "*rows"],
    zero_point: Float[Tensor, "*rows"] | None,
    num_bits: int,
    *,
    narrow: bool = False,
) -> Float[Tensor, "*rows group"]:
    """Return what decoding the codes of ``groups`` would, in their dtype; arguments as for ``encode_integers``."""
    steps = step.unsqueeze(-1)
    rounded = groups.float() / steps
    if zero_point is None:
        middle = 2 ** (num_bits - 1)
        rounded = rounded.round_().clamp_(int(narrow) - middle, middle - 1)
    else:
        rounded = (
            _nearest(rounded, zero_point, num_bits).clamp_(int(narrow), 2**num_bits - 1).sub_(zero_point.unsqueeze(-1))
        )
    return rounded.mul_(steps).to(groups.dtype)
