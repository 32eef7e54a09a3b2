"""The ``quantization_config`` of a compressed-tensors checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qtool.builtin.exporters.ct_layout import ELEMENTS, Layout
from qtool.errors import SchemeError
from qtool.scheme import ModelScheme, TensorScheme

LAYOUT_VERSION = "0.20.0"
"""Release of compressed-tensors whose layouts these are; from here on it packs 3, 5, 6 and 7 bits across words."""

_SCALE_DTYPES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}


MIXED = "mixed-precision"
"""The format of a whole checkpoint whose groups have several."""


def quantization_config(
    scheme: ModelScheme,
    layout: Layout,
    ignore: Iterable[str],
    others: Sequence[tuple[ModelScheme, Layout, Sequence[str]]] = (),
    targets: Sequence[str] = ("Linear",),
    attentions: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the config of a checkpoint.

    transformers 5.23 cannot load packed zero points into a compressed model (it makes room for unpacked ones), only
    decode them on loading; ``dequantize`` tells it to. Other consumers do not know the key.

    Args:
        scheme: Weights, activations, KV cache, outputs.
        layout: Written for the whole and for the group, so that no reader has to infer it.
        ignore: Linears that are not quantized.
        others: Other schemes with their layouts and their linears.
        targets: The linears of the first scheme; all by their class where there are no others.
        attentions: What the attentions whose queries are quantized are called, which have the scheme of the cache. The
            group is named by their class, since vLLM leaves out such a group and takes the scales that are stored.

    Raises:
        SchemeError: The scheme has no weights.
    """
    groups = [_group(*one) for one in ((scheme, layout, targets), *others)]
    symmetric = all(group["weights"]["symmetric"] for group in groups)
    layouts = {group["format"] for group in groups}
    cache = None if scheme.keys is None else _activations(scheme.keys)
    parts = dict.fromkeys(("weights", "output_activations", "format"))
    groups += [{"targets": list(attentions), "input_activations": cache, **parts}] if attentions else []
    return ({} if symmetric else {"dequantize": True}) | {
        "quant_method": "compressed-tensors",
        "version": LAYOUT_VERSION,
        "format": layout if layouts == {layout} else MIXED,
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": sorted(ignore),
        "kv_cache_scheme": cache,
        "global_compression_ratio": None,
    }


def _group(scheme: ModelScheme, layout: Layout, targets: Sequence[str]) -> dict[str, Any]:
    if scheme.weights is None:
        raise SchemeError("the scheme leaves the weights as they are", hint="--weights int4-sym-g128")
    return {
        "targets": list(targets),
        "weights": _arguments(scheme.weights, dynamic=False),
        "input_activations": None if scheme.activations is None else _activations(scheme.activations),
        "output_activations": None if scheme.outputs is None else _activations(scheme.outputs),
        "format": layout,
    }


def _activations(scheme: TensorScheme) -> dict[str, Any]:
    """Return arguments of inputs, outputs or a cache; dynamic ones with a calibrated multiplier are so within it."""
    return _arguments(scheme, dynamic="local" if scheme.scale == "e4m3" else not scheme.static)


def _arguments(scheme: TensorScheme, *, dynamic: bool | str) -> dict[str, Any]:
    """Return a tensor scheme as ``QuantizationArgs``; rows and tokens, which qtool takes as one, by their own names."""
    element, bits = ELEMENTS[scheme.format]
    strategy: str = scheme.strategy
    if strategy in ("channel", "token"):
        strategy = "token" if dynamic else "channel"
    elif strategy == "head":  # a token of the library's is one of `[batch, heads, tokens, dim]`: a head
        strategy = "token" if dynamic else "attn_head"
    elif strategy == "group" and scheme.scale == "e4m3":
        strategy = "tensor_group"
    arguments: dict[str, Any] = {
        "num_bits": bits,
        "type": element,
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": None if strategy == "block" else scheme.group_size,
        "dynamic": dynamic,
    }
    if strategy == "block":
        arguments["block_structure"] = [scheme.block_rows or scheme.group_size, scheme.group_size]
    if scheme.scale in _SCALE_DTYPES:
        arguments["scale_dtype"] = _SCALE_DTYPES[scheme.scale]
    return arguments
