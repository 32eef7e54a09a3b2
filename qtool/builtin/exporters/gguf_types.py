"""Which type of GGUF holds a scheme without rounding anything, and the refusal of what none holds.

Scales of a block are stored once for each 32 values (16 of NVFP4), so a scale that more values share is repeated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NoReturn, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.packed import PackedLinear
from qtool.errors import SchemeError
from qtool.scheme import GroupParameters, TensorScheme
from qtool.scheme_parts import one_level

Kind: TypeAlias = Literal["Q4_0", "Q4_1", "Q8_0", "MXFP4", "NVFP4"]

SCALED = {"Q4_0": 32, "Q4_1": 32, "Q8_0": 32, "MXFP4": 32, "NVFP4": 16}
"""Neighbours that share a scale in each type."""
BLOCKS = SCALED | {"NVFP4": 64}
"""Values to a block of each type; a block of NVFP4 has four scales."""

_FP4 = {"e8m0": "MXFP4", "e4m3": "NVFP4"}


def choose_type(weights: TensorScheme) -> Kind:
    """Return the type that holds codes and scales of a scheme as they are.

    Raises:
        SchemeError: None does; the hint names the nearest scheme, and is empty where the format is another.
    """
    kind: Kind
    if weights.format == "int4":
        kind = "Q4_0" if weights.symmetric else "Q4_1"
    elif weights.format == "int8":
        kind = "Q8_0"
    elif weights.format in ("fp4", "mxfp4", "nvfp4") and weights.scale in _FP4:
        kind = "MXFP4" if weights.scale == "e8m0" else "NVFP4"
    elif weights.format in ("fp4", "nvfp4", "mxfp4"):
        raise SchemeError("FP4 is held as MXFP4 or NVFP4 only", facts=(("weights", weights),))
    else:
        raise SchemeError(f"GGUF has no type for `{weights.format}`", facts=(("weights", weights),))
    nearest = _with_offset(weights) if kind == "Q4_1" else _without_zero_points(one_level(weights))
    divides = weights.strategy != "group" or (weights.group_size or 1) % SCALED[kind] == 0
    nearest = nearest if divides else replace(nearest, group_size=SCALED[kind])
    if not weights.symmetric and kind != "Q4_1":
        _refuse(f"{kind} has no zero points", weights, nearest)
    if weights.scale_bits is not None:
        _refuse("no type's scales are codes in these groups; --to hf decodes them", weights, nearest)
    if weights.real:
        _refuse(f"{kind} has an offset in place of a real zero point", weights, nearest)
    if not divides:
        _refuse(f"{kind} has a scale for {SCALED[kind]} values", weights, nearest)
    return kind


def check_values(name: str, found: PackedLinear, weights: TensorScheme, kind: Kind) -> None:
    """Refuse scales and offsets that the type would round.

    Args:
        name: Name of the linear, for the message.
        found: Codes, scales, zero points.
        weights: Scheme of the weights.
        kind: What ``choose_type`` gives for the scheme.

    Raises:
        SchemeError: Names the nearest scheme that is held.
    """
    parameters, n_in = found.parameters, found.n_in
    if n_in % BLOCKS[kind]:
        raise SchemeError(
            f"blocks of {BLOCKS[kind]} values do not divide the input of `{name}`",
            facts=(("input size", n_in), ("type", kind)),
            hint="qtool pack SOURCE --to gguf-f16",
        )
    if kind == "NVFP4":
        if not bool(parameters.scale.amin() > 0):
            _refuse("NVFP4 of GGUF has scales above 0 only", weights, "nvfp4", name)
        return
    if kind == "MXFP4":
        return
    if not exact_in_half(parameters.scale):
        _refuse(f"{kind} has float16 scales, and these have more digits", weights, replace(weights, scale="fp16"), name)
    if kind == "Q4_1" and not exact_in_half(offset_of(parameters)):
        what = "offsets" if weights.offset else "`-scale * zero_point`"
        _refuse(f"Q4_1 has {what} in float16, and these have more digits", weights, _with_offset(weights), name)


def offset_of(parameters: GroupParameters) -> Float[Tensor, "*rows"]:
    """Return in float64 what code 0 stands for: the offset, or minus the scale times the zero point."""
    if parameters.offset is not None:
        return parameters.offset.double()
    zero_point = torch.zeros_like(parameters.scale) if parameters.zero_point is None else parameters.zero_point
    return -parameters.scale.double() * zero_point.double()


def _with_offset(weights: TensorScheme) -> TensorScheme:
    """Return the nearest scheme whose numbers Q4_1 holds as they are."""
    return replace(one_level(weights), real=False, offset=True, scale="fp16")


def _without_zero_points(weights: TensorScheme) -> TensorScheme:
    return replace(weights, symmetric=True, real=False, offset=False)


def exact_in_half(values: Float[Tensor, "*any"]) -> bool:
    """Say whether float16 has every value."""
    return torch.equal(values.half().to(values.dtype), values)


def _refuse(reason: str, weights: TensorScheme, nearest: TensorScheme | str, first: str = "") -> NoReturn:
    facts: tuple[tuple[str, object], ...] = (("weights", weights),)
    if first:
        facts += (("first", first),)
    raise SchemeError(reason, facts=facts, hint=f"nearest that fits: --weights {nearest}")
