"""What every format refuses: parts of a scheme that it would have to ignore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qtool.errors import SchemeError
from qtool.scheme import RangeRule, TensorScheme
from qtool.scheme_parts import one_level

LEAST_CLIP = 0.01
"""The least fraction of a range that can be kept: less has never helped, and is mostly a percentage by mistake."""

MOST_ROWS = 256
"""The most rows whose scales share a range; the published number is 16."""

_FLOAT_SCALES = ("fp32", "fp16", "bf16")


def refuse_unless_empty(scheme: TensorScheme, reasons: Sequence[str], nearest: TensorScheme) -> None:
    """Refuse a scheme for the first of the reasons, if there are any.

    Args:
        scheme: What was asked for.
        reasons: Why it cannot be.
        nearest: The nearest scheme that works.

    Raises:
        SchemeError: There is a reason.
    """
    if reasons:
        raise SchemeError(reasons[0], facts=(("scheme", scheme),), hint=f"nearest that works: {nearest}")


def nearest_scheme(
    scheme: TensorScheme,
    defaults: TensorScheme,
    *,
    scales: Sequence[str],
    zero_points: bool,
    range_rules: Sequence[RangeRule],
    blocks: bool = False,
    real_zero_points: bool = False,
    scale_codes: bool = False,
) -> tuple[TensorScheme, list[str]]:
    """Find the parts of a scheme that its format does not have.

    Args:
        scheme: What was asked for.
        defaults: The format's defaults.
        scales: Scale formats that the format takes.
        zero_points: Whether it can be asymmetric.
        range_rules: What it has besides ``tight``.
        blocks: Whether rows can share scales.
        real_zero_points: Whether it has them, or offsets in their place, where a scheme asks for them.
        scale_codes: Whether its scales can be codes, likewise.

    Returns:
        The scheme with those parts put right, and what is wrong with each: nothing for a scheme that works.
    """
    nearest, reasons = scheme, []
    if nearest.scale not in scales:
        reasons.append(f"`{scheme.format}` has no {scheme.scale} scales, only {', '.join(scales)}")
        nearest = replace(nearest, scale=defaults.scale)
    if nearest.strategy == "block" and not blocks:
        reasons.append(f"`{scheme.format}` has no scales of several rows: FP8 weights have")
        nearest = replace(nearest, strategy="group")
    sized = nearest.strategy in ("group", "block")
    if sized != (nearest.group_size is not None) and nearest.strategy != "channel":
        reasons.append("the strategy `group` and a group size go together")
        nearest = replace(nearest, strategy="group", group_size=nearest.group_size or defaults.group_size or 128)
    if not nearest.symmetric and not zero_points:
        reasons.append(f"`{scheme.format}` has no zero point")
        nearest = replace(nearest, symmetric=True)
    if not nearest.symmetric and nearest.scale not in _FLOAT_SCALES:
        reasons.append(f"{nearest.scale} scales come without zero points")
        nearest = replace(nearest, symmetric=True)
    nearest, found = _nearest_zeros(nearest, real_zero_points=real_zero_points)
    reasons += found
    nearest, found = _nearest_codes(nearest, defaults, scale_codes=scale_codes)
    reasons += found
    if nearest.exponent_rule != "even" and nearest.scale != "e8m0":
        reasons.append(f"`{nearest.exponent_rule}` rounds e8m0 scales, and these are {nearest.scale}")
        nearest = replace(nearest, exponent_rule="even")
    if nearest.range_rule != "tight" and not (nearest.range_rule in range_rules and _has_rules(nearest)):
        what = "FP4 with e4m3 scales" if nearest.range_rule == "four_over_six" else "symmetric integers"
        reasons.append(f"`{nearest.range_rule}` is a rule for {what}")
        nearest = replace(nearest, range_rule="tight")
    if not LEAST_CLIP <= nearest.clip <= 1:
        reasons.append(f"the fraction of the range that is kept is from {LEAST_CLIP} to 1, not {nearest.clip:g}")
        nearest = replace(nearest, clip=1.0)
    if nearest.outlier_threshold is not None and not 1e-3 <= nearest.outlier_threshold <= 1e6:
        reasons.append(f"outliers are of a magnitude from 0.001 to 1000000 on, not {nearest.outlier_threshold:g}")
        nearest = replace(nearest, outlier_threshold=6.0)
    return _static(nearest, reasons)


def _static(scheme: TensorScheme, reasons: list[str]) -> tuple[TensorScheme, list[str]]:
    """Put right what static scales do not go with."""
    nearest = scheme
    if not nearest.static:
        return nearest, reasons
    if scheme.strategy not in ("tensor", "head"):
        reasons.append("static scales are of whole tensors, or of heads")
        nearest = replace(nearest, strategy="tensor", group_size=None)
    if not scheme.symmetric and (scheme.real or scheme.offset):
        reasons.append("static zero points are whole numbers")
        nearest = replace(nearest, real=False, offset=False)
    if scheme.outlier_threshold is not None:
        reasons.append("static scales are of all columns, and outliers are found as they come")
        nearest = replace(nearest, outlier_threshold=None)
    if scheme.range_rule == "signed_full":
        reasons.append("static scales have no sign, which `signed_full` gives them")
        nearest = replace(nearest, range_rule="full")
    if scheme.exponent_rule == "search":
        reasons.append("static scales are searched by what they do to the outputs")
        nearest = replace(nearest, exponent_rule="even")
    if scheme.scale not in (*_FLOAT_SCALES, "e8m0"):
        reasons.append(f"static scales have no multiplier above them, which {scheme.scale} ones have")
        nearest = replace(nearest, scale="fp32", range_rule="tight")
    return nearest, reasons


def _nearest_zeros(scheme: TensorScheme, *, real_zero_points: bool) -> tuple[TensorScheme, list[str]]:
    """Return the nearest scheme with zero points that it can have, and what is wrong with this one."""
    nearest, reasons = scheme, []
    if nearest.offset and (nearest.symmetric or not real_zero_points):
        reasons.append("`offset` is for asymmetric integers, in place of their zero points")
        nearest = replace(nearest, offset=False)
    if nearest.offset and nearest.real:
        reasons.append("`offset` stands in place of a zero point, so there is none to be `real`")
        nearest = replace(nearest, real=False)
    if nearest.real and (nearest.symmetric or not real_zero_points):
        reasons.append("`real` is for the zero points of asymmetric integers")
        nearest = replace(nearest, real=False)
    return nearest, reasons


def _nearest_codes(
    scheme: TensorScheme, defaults: TensorScheme, *, scale_codes: bool
) -> tuple[TensorScheme, list[str]]:
    """Return the nearest scheme whose scales can be codes, if they are to be, and what is wrong with this one."""
    if scheme.scale_bits is None:
        return scheme, []
    if not scale_codes or scheme.strategy == "tensor":
        what = "one scale of a tensor is no code" if scale_codes else f"scales of `{scheme.format}` are no codes"
        return one_level(scheme), [f"the {what}: those of rows of integers may be"]
    nearest, reasons = scheme, []
    if nearest.scale not in _FLOAT_SCALES:
        reasons.append(f"scales that are codes have float ranges, not {nearest.scale}")
        nearest = replace(nearest, scale=defaults.scale)
    if nearest.range_rule == "signed_full":
        reasons.append("scales that are codes have no sign")
        nearest = replace(nearest, range_rule="tight")
    if nearest.real:
        reasons.append("`real` says nothing beside `scales`: zero points that are codes are real numbers")
        nearest = replace(nearest, real=False)
    if nearest.offset:
        reasons.append("scales that are codes come with zero points that are codes, not with an offset")
        nearest = replace(nearest, offset=False)
    if not 1 <= scheme.scale_bits <= 8:
        reasons.append(f"scales are codes of 1 to 8 bits, not {scheme.scale_bits}")
        nearest = replace(nearest, scale_bits=3)
    if not 2 <= (scheme.scale_rows or 0) <= MOST_ROWS:
        reasons.append(f"2 to {MOST_ROWS} rows share a range of scales, not {scheme.scale_rows}")
        nearest = replace(nearest, scale_rows=16)
    return nearest, reasons


def _has_rules(scheme: TensorScheme) -> bool:
    """Say whether a rule for the range means something, given symmetry and scales."""
    return scheme.symmetric and (scheme.range_rule != "four_over_six" or scheme.scale == "e4m3")
