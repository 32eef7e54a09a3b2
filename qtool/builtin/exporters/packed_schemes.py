"""The scheme that the config of a packed checkpoint says of its linears, whoever wrote it.

compressed-tensors has groups that name their linears by class, name or pattern, ModelOpt an algorithm for all or for
each. The scheme of most linears is the model's, and others are exceptions by name. Linears without scales are in 16
bits.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compressed_tensors.utils import match_targets
from torch import nn

from qtool.builtin.exporters.ct_layout import BLOCKS
from qtool.builtin.exporters.modelopt_config import FP8_CACHE, HF_QUANT_CONFIG, algorithm_of
from qtool.consumers.config import is_of_attentions
from qtool.consumers.presets import with_presets
from qtool.engine.cache import KEYS, QUERIES, VALUES
from qtool.errors import SchemeError
from qtool.model.files import CONFIG
from qtool.scheme import Format, ModelScheme, ScaleFormat, Strategy, TensorScheme
from qtool.scheme_parts import KeysAndValues, Rule, in_block

METHODS = ("compressed-tensors", "modelopt")
Lookup = Callable[[str], Format]


class Seen(NamedTuple):
    """What the files say of a linear, and no config does.

    Attributes:
        names: What they call it, and what the family's files do.
        scale: What its scales are stored in.
        calibrated: Whether a scale of its inputs is stored.
        looked_up: Whether it is the embedding.
    """

    names: tuple[str, str]
    scale: torch.dtype
    calibrated: bool
    looked_up: bool = False


FLOATS: Mapping[torch.dtype, ScaleFormat] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
_BLOCK_SCALES: Mapping[torch.dtype, ScaleFormat] = {torch.float8_e4m3fn: "e4m3", torch.uint8: "e8m0"}
_MODELOPT = {
    "NVFP4": ("nvfp4", "nvfp4"),
    "W4A16_NVFP4": ("nvfp4", None),
    "FP8": ("fp8-tensor", "fp8-tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8-channel", "fp8-token"),
}
_STRATEGIES: tuple[Strategy, ...] = ("tensor", "channel", "token", "group", "block")
_ONE_INPUT_SCALE = ("fp8", "int8")
_SHORT_FLOATS = {4: "fp4", 6: "fp6_e2m3"}
_STATIC_CACHES: Mapping[str, Strategy] = {"tensor": "tensor", "attn_head": "head"}
_STATIC_OUTPUTS: Mapping[str, Strategy] = {"tensor": "tensor"}
"""Of outputs the library makes no room for scales of channels, and applies those of groups along the tokens."""


def packed_method(directory: Path) -> str | None:
    """Return how a folder is packed, by its config: one of ``METHODS``, or None."""
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    entry = config.get("quantization_config") if isinstance(config, dict) else None
    if not entry and (directory / HF_QUANT_CONFIG).is_file():
        return "modelopt"
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    return method if method in METHODS else None


def read_scheme(
    directory: Path, seen: Mapping[str, Seen], plain: Collection[str], lookup: Lookup, *, cached: Collection[str] = ()
) -> ModelScheme:
    """Return the scheme that a packed checkpoint says of its linears.

    Args:
        directory: The checkpoint.
        seen: What no config says of each linear that has scales, by the name that the graph knows.
        plain: The linears that have none.
        lookup: Finds a format by name.
        cached: Of keys, values and queries those of which scales are stored for each block.

    Raises:
        SchemeError: It has more than codes and scales, or a scheme that is not read back; names it.
    """
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8")).get("quantization_config") or {}
    read = _modelopt_schemes if packed_method(directory) == "modelopt" else _compressed_schemes
    found, cache, rounds_queries = read(directory, config, seen, lookup)
    main = scheme_of(found, plain)
    one = _cache_scheme(cache, lookup)
    lacking = {KEYS, VALUES, *((QUERIES,) if rounds_queries else ())} - set(cached)
    if one is not None and (one.static or one.scale == "e4m3") and lacking:
        raise unread("a quantized KV cache without a stored scale for keys and one for values", cache)
    kv = KeysAndValues(one, one, one) if rounds_queries else one
    return replace(main, kv=kv)


def scheme_of(found: Mapping[str, ModelScheme], plain: Collection[str]) -> ModelScheme:
    """Return the scheme of most linears, with exceptions by name for the others, and for those in 16 bits.

    Args:
        found: The scheme of each linear that has one.
        plain: The linears that have none.
    """
    in_blocks = [own for name, own in found.items() if in_block(name)] or list(found.values())
    ((main, _), *_) = Counter(in_blocks).most_common(1)
    of_rest = ModelScheme()  # what linears outside of the blocks have without rules
    others = {name: (own, main if in_block(name) else of_rest) for name, own in found.items()}
    rules = [Rule("weights", name, None) for name in plain]
    rules += [Rule("weights", name, own.weights) for name, (own, of) in others.items() if own.weights != of.weights]
    rules += [
        Rule("activations", name, own.activations)
        for name, (own, of) in others.items()
        if own.activations != of.activations
    ]
    rules += [Rule("outputs", name, own.outputs) for name, (own, of) in others.items() if own.outputs != of.outputs]
    return replace(main, rules=tuple(rules))


def _cache_scheme(said: Mapping[str, Any] | None, lookup: Lookup) -> TensorScheme | None:
    """Return the scheme of a cache, with static scales or such as are fitted as the model runs, or None."""
    if not said:
        return None
    found = _fitted_scheme(said, lookup, _STATIC_CACHES, "a quantized KV cache")
    return replace(found, strategy="head") if found.strategy == "token" else found  # as ``ct_config`` says it


def _fitted_scheme(said: Mapping[str, Any], lookup: Lookup, static: Mapping[str, Strategy], what: str) -> TensorScheme:
    """Return the scheme of what is rounded beside weights and inputs, whatever the layout.

    Args:
        said: What ``QuantizationArgs`` say of it.
        lookup: Finds a format by name.
        static: What the strategies of calibrated scales are here.
        what: A cache or outputs, in words.
    """
    strategy = str(said.get("strategy") or ("group" if said.get("group_size") else "tensor"))
    short = _SHORT_FLOATS.get(said.get("num_bits", 8)) if said.get("type") == "float" else None
    if short is not None and not said.get("scale_dtype"):  # with floats for scales all floats are read alike
        return replace(_fitted_scheme({**said, "num_bits": 8}, lookup, static, what), format=short)
    if said.get("dynamic") is True and strategy in ("tensor", "token", "group"):
        return _input_scheme(said, lookup)
    if (said.get("dynamic"), strategy) == ("local", "tensor_group"):
        return _tensor_scheme(said, lookup, None)
    if strategy not in static or said.get("dynamic"):
        raise unread(f"{what} with scales that qtool does not have there", said)
    scheme = _tensor_scheme({**said, "strategy": "tensor"}, lookup, None)
    return replace(scheme, strategy=static[strategy], static=True)


def _compressed_schemes(
    directory: Path, config: Mapping[str, Any], seen: Mapping[str, Seen], lookup: Lookup
) -> tuple[dict[str, ModelScheme], Mapping[str, Any] | None, bool]:
    """Return what compressed-tensors' groups say of each linear, of the cache, and whether queries are as the cache."""
    del directory
    if config.get("sparsity_config"):
        raise unread("a `sparsity_config`", config["sparsity_config"])
    every = with_presets(config).get("config_groups", {})
    groups = {name: group for name, group in every.items() if group.get("weights")}
    cache = config.get("kv_cache_scheme")
    attentions = [group for name, group in every.items() if name not in groups]
    for group in attentions:
        inputs = group.get("input_activations")
        alike = inputs and cache and _cache_scheme(inputs, lookup) == _cache_scheme(cache, lookup)
        if not (alike and is_of_attentions(group)):
            raise unread("a group without weights", group)
    targets = {target: name for name, group in groups.items() for target in group.get("targets", ())}
    schemes: dict[tuple[str, Seen], ModelScheme] = {}
    found = {}
    for name, one in seen.items():
        module = (nn.Embedding if one.looked_up else nn.Linear)(1, 1, device="meta")
        matched = next(filter(None, (match_targets(own, module, targets) for own in (*one.names, name))), None)
        if not matched:
            raise unread(f"codes of `{one.names[0]}`, which no group names", list(targets))
        outputs = groups[targets[matched[0]]].get("output_activations")
        if outputs and not in_block(name):
            raise unread(f"quantized outputs of `{one.names[0]}`", outputs)
        key = (targets[matched[0]], one._replace(names=("", "")))
        if key not in schemes:
            schemes[key] = _group_scheme(groups[key[0]], one, lookup)
        found[name] = schemes[key]
    return found, cache, bool(attentions)


def _group_scheme(group: Mapping[str, Any], seen: Seen, lookup: Lookup) -> ModelScheme:
    """Return the scheme of linears of one group."""
    weights, inputs, outputs = group["weights"], group.get("input_activations"), group.get("output_activations")
    if weights.get("actorder") in ("group", "dynamic", True):
        raise unread("columns in an order of their own (`actorder: group`)", weights)
    return ModelScheme(
        _tensor_scheme(weights, lookup, seen.scale),
        None if not inputs else _input_scheme(inputs, lookup),
        outputs=_fitted_scheme(outputs, lookup, _STATIC_OUTPUTS, "quantized outputs") if outputs else None,
    )


def _modelopt_schemes(
    directory: Path, config: Mapping[str, Any], seen: Mapping[str, Seen], lookup: Lookup
) -> tuple[dict[str, ModelScheme], Mapping[str, Any] | None, bool]:
    """Return what ModelOpt's algorithms are, of each linear, and what it says of the cache; queries are in 16 bits."""
    said: Mapping[str, Any] = config
    if (directory / HF_QUANT_CONFIG).is_file():
        said = json.loads((directory / HF_QUANT_CONFIG).read_text(encoding="utf-8")).get("quantization", {})
    cache, algorithm = said.get("kv_cache_scheme"), said.get("kv_cache_quant_algo")
    if algorithm:
        cache = FP8_CACHE if algorithm == "FP8" else {"algorithm": algorithm}
    try:
        algorithms = {name: algorithm_of(said, one.names[0]) for name, one in seen.items()}
    except (KeyError, TypeError) as error:
        raise unread("linears whose algorithm it does not say", error) from error
    return {name: _modelopt_linear(algorithms[name], one, lookup) for name, one in seen.items()}, cache, False


def _modelopt_linear(algorithm: str, seen: Seen, lookup: Lookup) -> ModelScheme:
    """Return the scheme of linears of one algorithm."""
    if algorithm not in _MODELOPT:
        raise unread(f"the algorithm `{algorithm}`", ", ".join(_MODELOPT), "read")
    weights, activations = (None if text is None else plain_scheme(text, lookup) for text in _MODELOPT[algorithm])
    if weights is not None and weights.format == "fp8":
        weights = replace(weights, scale=FLOATS[seen.scale])
    if activations is not None and activations.strategy == "tensor":
        activations = replace(activations, static=seen.calibrated)
    elif seen.calibrated and (activations is None or activations.format == "fp8"):
        raise unread("calibrated inputs beside the algorithm", algorithm)
    return ModelScheme(weights, activations)


def plain_scheme(text: str, lookup: Lookup) -> TensorScheme:
    """Return the defaults of a format, with a strategy behind a dash."""
    name, _, strategy = text.partition("-")
    scheme = replace(lookup(name).defaults, format=name)
    return replace(scheme, strategy=strategy, group_size=None) if strategy else scheme  # type: ignore[arg-type]


def _tensor_scheme(said: Mapping[str, Any], lookup: Lookup, scale: torch.dtype | None) -> TensorScheme:
    """Return what ``QuantizationArgs`` say of weights, or of inputs but for their rules.

    Args:
        said: The arguments.
        lookup: Finds a format by name.
        scale: What scales are stored in; None where they are fitted as the model runs.
    """
    bits, element, size = said.get("num_bits"), said.get("type", "int"), said.get("group_size") or -1
    if (element, said.get("symmetric", True)) == ("float", True):
        fitted: ScaleFormat = (
            "e4m3" if size == 16 else "e8m0" if bits == 4 or said.get("scale_dtype") == "torch.uint8" else "fp32"
        )
        block = BLOCKS.get((bits or 0, size, fitted if scale is None else _BLOCK_SCALES.get(scale, "fp32")))
        if block is not None:
            return plain_scheme(block[0], lookup)
    strategy = said.get("strategy") or ("group" if size > 0 else "channel" if said.get("group_size") else "tensor")
    name = f"int{bits}" if element == "int" else "fp8" if (element, bits) == ("float", 8) else ""
    stored, rows = "fp32" if scale is None else FLOATS.get(scale), 0
    if strategy == "block":
        rows, size = said.get("block_structure") or (0, 0)
        strategy = "block" if rows and size else ""
    if not name or strategy not in _STRATEGIES or stored is None:
        raise unread("a scheme that is not read back", said)
    scheme = TensorScheme(
        name,
        symmetric=bool(said.get("symmetric", True)),
        strategy=strategy,
        group_size=size if strategy in ("group", "block") else None,
        scale=stored,
        block_rows=rows if strategy == "block" and rows != size else None,
    )
    lookup(name).check(scheme)
    return scheme


def _input_scheme(said: Mapping[str, Any], lookup: Lookup) -> TensorScheme:
    """Return the scheme of inputs whose scales are fitted as the model runs, or one calibrated scale."""
    scheme = _tensor_scheme(said, lookup, None)
    if scheme.format == "mxfp8" and said.get("dynamic"):
        return replace(scheme, exponent_rule="rceil")  # as the library rounds them
    half = scheme.format.startswith("int") and scheme.symmetric
    if not said.get("dynamic"):
        if scheme.format not in _ONE_INPUT_SCALE or scheme.strategy != "tensor":
            raise unread("inputs with calibrated scales", said)
        return replace(scheme, static=True)
    return replace(scheme, range_rule="half") if half else scheme


def unread(what: str, said: object, label: str = "config") -> SchemeError:
    """Return the error that says what of a checkpoint is not read back."""
    return SchemeError(
        f"the checkpoint has {what}, and only codes, scales and Hadamard rotations are transcoded",
        facts=((label, said),),
        hint="pack it from the artifact that it came from, or quantize the original model: qtool mitigate MODEL",
    )
