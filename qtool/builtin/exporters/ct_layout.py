"""Which layout of compressed-tensors holds a scheme, and the refusal of what none holds.

The layout is always named explicitly: left to itself the library infers ``int-quantized`` for every integer weight
with quantized activations, which stores INT4 in bytes and which vLLM does not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, TypeAlias

import torch

from qtool.errors import SchemeError
from qtool.model.graph import Dimensions
from qtool.scheme import ExponentRule, ModelScheme, TensorScheme
from qtool.scheme_parts import KeysAndValues

Layout: TypeAlias = Literal[
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
]
Element: TypeAlias = Literal["int", "float"]

ELEMENTS: Mapping[str, tuple[Element, int]] = {
    **{f"int{bits}": ("int", bits) for bits in range(2, 9)},
    **dict.fromkeys(("fp4", "nvfp4", "mxfp4"), ("float", 4)),
    **dict.fromkeys(("fp6_e2m3", "mxfp6_e2m3"), ("float", 6)),
    **dict.fromkeys(("fp8", "mxfp8"), ("float", 8)),
}
"""Element type and bits of each of qtool's formats, as compressed-tensors names them."""

BLOCKS: Mapping[tuple[int, int | None, str], tuple[str, Layout]] = {
    (4, 16, "e4m3"): ("nvfp4", "nvfp4-pack-quantized"),
    (4, 32, "e8m0"): ("mxfp4", "mxfp4-pack-quantized"),
    (6, 32, "e8m0"): ("mxfp6_e2m3", "mxfp6-pack-quantized"),
    (8, 32, "e8m0"): ("mxfp8", "mxfp8-quantized"),
}
"""The blocks of floats that have a layout of their own, by bits, values to a scale, and scale."""
_INPUTS: Mapping[Layout, tuple[str, ...]] = {
    "nvfp4-pack-quantized": ("nvfp4",),
    "mxfp4-pack-quantized": ("mxfp4",),
    "mxfp6-pack-quantized": ("mxfp6_e2m3", "mxfp8-rceil"),
    "mxfp8-quantized": ("mxfp8-rceil",),
}
"""Inputs beside blocks; of FP8 the library rounds exponents up from 448 on, as ``rceil`` does but for 448 itself."""
_FP8_INPUTS: tuple[Layout, ...] = (
    "pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
)
"""Layouts that have FP8 inputs beside them, with a scale a tensor, a token or, but for MXFP8, a group of any size."""
_FLOAT_SCALES = ("bf16", "fp16", "fp32")
_WHOLE = "consumers keep the whole range of what they quantize as they run"
_SIXTEEN_BIT = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_layout(scheme: ModelScheme) -> Layout:
    """Return the layout that holds the weights and says how activations are quantized.

    INT8 weights with one scale a row and INT8 activations are ``int-quantized``; all other integers are
    ``pack-quantized``, whatever the activations.

    Raises:
        SchemeError: No layout does; the hint names what fits, and is empty where the whole scheme is another.
    """
    weights, activations = scheme.weights, scheme.activations
    if weights is None:
        raise SchemeError("the scheme leaves the weights as they are", hint="--weights int4-sym-g128")
    layout = _weight_layout(weights, activations)
    if activations is not None:
        both = layout == "pack-quantized" and _is_static_int8(activations) and _is_static_int8(scheme.outputs)
        _check_static(layout, activations, fits=both)
        _check_activations(layout, activations, weights.group_size if weights.strategy == "block" else None)
    _check_cache(scheme.kv)
    _check_outputs(scheme.outputs)
    return layout


def checkpoint_dtype(weights: TensorScheme, stored: torch.dtype) -> torch.dtype:
    """Return what a checkpoint's other tensors are stored in, and what its consumers compute in.

    16-bit scales decide it, because loaders cast scales to the dtype of the model. FP4 is decoded to bfloat16 by the
    library. Otherwise the model keeps its 16-bit dtype; a float32 model becomes bfloat16.

    Args:
        weights: Scheme of the weights.
        stored: What the model is stored in.

    Raises:
        SchemeError: float16 scales on a bfloat16 model, whose activations may not fit float16.
    """
    if weights.scale == "fp16" and stored == torch.bfloat16:
        raise SchemeError(
            "float16 scales would make a bfloat16 model compute in float16",
            facts=(("weights", weights),),
            hint=f"nearest that fits: --weights {replace(weights, scale='bf16')}",
        )
    if weights.scale in ("e4m3", "e8m0"):
        return torch.bfloat16
    return _SIXTEEN_BIT.get(weights.scale, stored if stored in _SIXTEEN_BIT.values() else torch.bfloat16)


def _weight_layout(weights: TensorScheme, activations: TensorScheme | None) -> Layout:
    """Return the layout of the weights."""
    if weights.format not in ELEMENTS:
        raise SchemeError(
            f"compressed-tensors has no element type for `{weights.format}`",
            facts=(("weights", weights), ("holds", ", ".join(ELEMENTS))),
        )
    element, bits = ELEMENTS[weights.format]
    block = _block(weights)
    if block is not None:
        return block[1]
    if element == "float" and bits < 8:
        reason = "FP6 is held as MXFP6 only" if bits == 6 else "FP4 is held as NVFP4 or MXFP4 only"
        raise SchemeError(reason, facts=(("weights", weights),))
    if element == "float":
        if weights.scale not in _FLOAT_SCALES:
            reason = "scales of FP8 weights are floats of 16 or 32 bits, or those of MXFP8"
            raise SchemeError(reason, facts=(("weights", weights),))
        return "float-quantized"
    eight = activations is not None and activations.format == weights.format == "int8"
    rows = replace(weights, strategy="channel", group_size=None)
    if eight and weights.strategy != "group" and weights.symmetric:
        if weights.scale not in _FLOAT_SCALES:
            raise _refusal("`int-quantized` has no such scales", "weights", weights, replace(weights, scale="bf16"))
        return "int-quantized"
    if weights.strategy == "tensor":
        raise _refusal("`pack-quantized` has no scale for a whole tensor", "weights", weights, rows)
    if weights.scale not in _SIXTEEN_BIT:
        reason = f"`pack-quantized` has 16-bit scales; loaders would round {weights.scale} ones"
        raise _refusal(reason, "weights", weights, replace(weights, scale="bf16"))
    return "pack-quantized"


def _block(scheme: TensorScheme) -> tuple[str, Layout] | None:
    """Return the name and the layout of a block of floats, None for what is none."""
    element, bits = ELEMENTS.get(scheme.format, ("", 0))
    held = element == "float" and scheme.symmetric and scheme.strategy == "group"
    return BLOCKS.get((bits, scheme.group_size, scheme.scale)) if held else None


def _check_activations(layout: Layout, activations: TensorScheme, block: int | None) -> None:
    """Refuse activations that cannot be said beside a layout; ``block`` is the side of the weights' blocks, if any."""
    if activations.clip != 1 and not activations.static:
        raise _clipped("activations", activations)
    if activations.outlier_threshold is not None:
        nearest = replace(activations, outlier_threshold=None)
        raise _refusal("consumers quantize all columns of activations", "activations", activations, nearest)
    element, bits = ELEMENTS.get(activations.format, ("", 0))
    if _is_fitted_fp8(layout, activations):
        return
    if layout in _INPUTS:
        held, own = _INPUTS[layout], _block(activations)
        rule = "" if activations.exponent_rule == "even" else f"-{activations.exponent_rule}"
        if own is None or f"{own[0]}{rule}" not in held or activations.range_rule != "tight":
            reason = f"{layout.partition('-')[0].upper()} weights go with {' or '.join(held).upper()} activations"
            reason += ", or FP8 ones" if layout in _FP8_INPUTS else ""
            raise _refusal(reason, "activations", activations, held[-1] if bits == 8 else held[0])
    elif layout == "float-quantized":
        if block is not None:
            fits = (element, bits, activations.group_size) == ("float", 8, block) and activations.scale in _FLOAT_SCALES
            if not fits or activations.strategy != "group":
                reason = f"FP8 weights in blocks of {block} go with FP8 activations in groups of as many"
                raise _refusal(reason, "activations", activations, f"fp8-g{block}")
        elif (element, bits) != ("float", 8) or activations.strategy == "group":
            reason = "FP8 weights go with FP8 activations, one scale a token or a tensor"
            raise _refusal(reason, "activations", activations, "fp8-token")
    elif element != "int":
        reason = "integer weights go with integer activations, or FP8 ones"
        raise _refusal(reason, "activations", activations, "fp8-token" if bits == 8 else "int8-sym-token")


def _is_static_int8(scheme: TensorScheme | None) -> bool:
    return scheme is not None and (scheme.format, scheme.strategy, scheme.static) == ("int8", "tensor", True)


def _check_static(layout: Layout, activations: TensorScheme, *, fits: bool) -> None:
    """Refuse static scales of inputs beside weights where no consumer reads them, unless outputs make them fit."""
    if activations.static and layout not in ("int-quantized", "float-quantized") and not fits:
        nearest = replace(activations, static=False, clip=1.0)
        reason = "static scales are written for INT8 beside INT8 weights with a scale a row, and for FP8 beside FP8"
        reason += ", and for INT8 beside other integers where outputs have static ones of INT8 too"
        raise _refusal(reason, "activations", activations, nearest)


def _is_fitted_fp8(layout: Layout, activations: TensorScheme) -> bool:
    """Say whether inputs are FP8 beside other weights; of two sizes of FP8 groups the library warns."""
    if layout not in _FP8_INPUTS or (layout == "mxfp8-quantized" and activations.strategy == "group"):
        return False
    fp8 = ELEMENTS.get(activations.format) == ("float", 8) and activations.scale in _FLOAT_SCALES
    if fp8 and activations.scale != "fp32":
        reason = "consumers fit the scales of FP8 activations as they run, and do not round them"
        raise _refusal(reason, "activations", activations, replace(activations, scale="fp32"))
    return fp8


def _check_cache(kv: TensorScheme | KeysAndValues | None) -> None:
    """Refuse a quantized cache of other elements than the library's, and queries that are not rounded as it is.

    Its scales are static, or in float32 and such as the library fits as it runs.
    """
    if kv is None:
        return
    each = (kv.keys, kv.values, kv.queries) if isinstance(kv, KeysAndValues) else (kv,)
    static = any(one is not None and one.static for one in each)
    heads = any(one is not None and one.strategy == "head" for one in each)
    nearest = f"fp8-{'head' if heads else 'tensor'}{'-static' if static else ''}"
    one, *others = each
    if one is None or one.strategy == "channel" or set(others) - {one}:
        reason = "a checkpoint's KV cache has one scheme, which queries may share, and scales of one token"
        raise _refusal(reason, "kv", kv, _alike(kv, nearest))
    reason, fits = _fault_of_fitted(one, "a KV cache")
    if len(each) > 2 and each[2] is not None and one.static and not one.symmetric:
        reason = "the library makes the scales of queries float16 where zero points are stored, and fails on them"
        fits = replace(one, symmetric=True)
    if reason:
        raise _refusal(reason, "kv", kv, _alike(kv, nearest if fits is None else fits))


def _check_outputs(outputs: TensorScheme | None) -> None:
    """Refuse quantized outputs of other elements than the library's, or such as it does not fit."""
    if outputs is not None:
        reason, fits = _fault_of_fitted(outputs, "outputs")
        if reason:
            raise _refusal(reason, "outputs", outputs, "fp8-tensor-static" if fits is None else fits)


def _fault_of_fitted(own: TensorScheme, what: str) -> tuple[str, TensorScheme | None]:
    """Return why what the library rounds beside weights and inputs cannot be said, empty if it can, and what can.

    Args:
        own: Of a cache or of outputs.
        what: Which, in words.
    """
    reason, fits = _first_fault(own, what)
    while fits is not None and (further := _first_fault(fits, what))[0]:
        fits = further[1]
    return reason, fits


def _first_fault(own: TensorScheme, what: str) -> tuple[str, TensorScheme | None]:
    """Return what ``_fault_of_fitted`` does, but what lacks that one fault only."""
    element, _ = ELEMENTS.get(own.format, ("", 0))
    if own.clip != 1 and not own.static:
        return _WHOLE, replace(own, clip=1.0)
    if not element:
        return f"what a checkpoint says of {what} is FP8, FP6 (E2M3), FP4 or integers, or 16 bits", None
    if own.static:
        narrow = f"consumers use all codes of {what}" if own.range_rule == "narrow" else ""
        return narrow, replace(own, range_rule="full")
    block = _block(own)
    if block is not None and own.scale == "e4m3":
        other = f"consumers put the largest value of each group of {what} at 6" if own.range_rule != "tight" else ""
        return other, replace(own, range_rule="tight")
    if block is not None and own.scale == "e8m0":
        rule: ExponentRule = "rceil" if block[0] == "mxfp8" else "even"
        other = f"consumers round the powers of two of {what} as `{rule}` does" if own.exponent_rule != rule else ""
        return other, replace(own, exponent_rule=rule)
    if own.scale != "fp32":
        plain = replace(own, scale="fp32", real=False, offset=False)
        return f"consumers fit the scales of {what} as they run, and do not round them", plain
    if own.real or own.offset:
        return f"consumers fit zero points of {what} that are codes", replace(own, real=False, offset=False)
    if element == "int" and own.symmetric and own.range_rule != "half":
        return f"consumers spread the range of {what} over all codes", replace(own, range_rule="half")
    return "", None


def _alike(kv: TensorScheme | KeysAndValues, one: TensorScheme | str) -> str:
    """Return how a scheme is written for a cache, and for the queries that read it if those are rounded."""
    if isinstance(kv, KeysAndValues) and kv.queries is not None:
        return f"queries={one},keys={one},values={one}"
    return str(one)


def with_groups_in_cache(scheme: ModelScheme, dims: Dimensions) -> ModelScheme:
    """Return a scheme whose cache has, for a scale a token and head, groups of a head's channels: the same scales.

    compressed-tensors' own scales per token are of a head's tokens all together there.

    Args:
        scheme: Weights, activations, KV cache.
        dims: Sizes of the model.

    Raises:
        SchemeError: The heads of keys and of values differ in size.
    """
    kv, one = scheme.kv, scheme.keys
    if kv is None or one is None or one.strategy != "token-head":
        return scheme
    if dims.head_dim != dims.value_dim:
        reason = "heads of keys and of values differ in size, so no group is a head"
        raise _refusal(reason, "kv", kv, _alike(kv, replace(one, strategy="tensor")))
    own = replace(one, strategy="group", group_size=dims.head_dim)
    return replace(scheme, kv=own if isinstance(kv, TensorScheme) else KeysAndValues(own, own, own))


def _clipped(part: str, scheme: TensorScheme) -> SchemeError:
    return _refusal(_WHOLE, part, scheme, replace(scheme, clip=1.0))


def _refusal(reason: str, part: str, scheme: TensorScheme | KeysAndValues, nearest: TensorScheme | str) -> SchemeError:
    return SchemeError(reason, facts=((part, scheme),), hint=f"nearest that fits: --{part} {nearest}")
