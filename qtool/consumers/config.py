"""Reads a ``quantization_config``, whoever wrote it: the kinds of linears that it describes, as rules look at them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from qtool.consumers.case import CT, DENSE, EMBEDDINGS, HEADS, Calibrated, Case
from qtool.errors import ArtifactError

UNREAD_KEYS: Mapping[str, frozenset[str]] = {
    CT: frozenset({"sparsity_config"}),
    "gptq": frozenset({"modules_in_block_to_quantize"}),
}
"""Keys of a config that change what linears are, and that no rule speaks of."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that engines make one of, by the ends of their names."""
_FUSED_NAMES = ("qkv_proj", "gate_up_proj")
_OVERRIDES = frozenset({"bits", "group_size", "sym", "desc_act"})
ONLINE = ("hadamard", "random-hadamard")
"""Rotations that rules speak of, as configs call them."""
_PRECISION = re.compile(r"W(\d+)A(\d+)")


def cases_of(config: Mapping[str, Any] | None, **about: Any) -> tuple[Case, ...]:  # noqa: ANN401 - fields of Case
    """Return the kinds of linears that a ``quantization_config`` describes.

    Args:
        config: The config; None for a checkpoint that is not quantized.
        about: Fields of ``Case`` that a config does not say.

    Raises:
        ArtifactError: The config cannot be understood.
    """
    if not config:
        return (Case(DENSE, DENSE, **about),)
    method = str(config.get("quant_method", ""))
    keys = UNREAD_KEYS.get(method, frozenset())
    unread = ", ".join(sorted(key for key in keys if config.get(key)))
    readers = {CT: _compressed, "gptq": _gptq, "awq": _awq, "modelopt": _modelopt, "fp8": _fp8}
    try:
        if method not in readers:
            bits = int(config.get("bits") or 16)
            return (Case(method or "unknown", str(config.get("format", "")), bits=bits, **about),)
        return tuple(Case(method, **{"unread": unread, **about, **fields}) for fields in readers[method](config))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ArtifactError(
            "cannot understand the `quantization_config`",
            facts=(("quant_method", method), ("reason", reason)),
            hint="pack again, or report it with the config",
        ) from error


def _compressed(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = [
        {
            "layout": str(group.get("format") or config.get("format") or ""),
            **_weights(group["weights"]),
            "block": _block(group["weights"].get("block_structure")),
            **_inputs(group.get("input_activations")),
            **_inputs(group.get("output_activations"), end="output"),
            **_ends(group.get("targets", ()), config.get("ignore", ())),
        }
        for group in config["config_groups"].values()
        if group.get("weights")
    ]
    if not groups and config.get("kv_cache_scheme"):
        groups = [{"layout": str(config.get("format", ""))}]
    if not groups:
        raise ValueError("no group of `config_groups` has weights")
    decoded = bool(config.get("dequantize"))
    about: dict[str, Any] = {"apart": _apart(config), "decoded": decoded, "beside": decoded and len(groups) > 1}
    cache = config.get("kv_cache_scheme")
    about |= _online(config.get("transform_config")) | _cache(cache)
    for group in (one for one in config["config_groups"].values() if not one.get("weights")):
        alike = cache and _cache(group.get("input_activations")) == _cache(cache)
        about |= {"queries": True} if alike and is_of_attentions(group) else {"unread": "config_groups"}
    return [{**about, **group} for group in groups]


def is_of_attentions(group: Mapping[str, Any]) -> bool:
    """Say whether a group without weights is of all attentions, named by their class, as vLLM wants it."""
    targets = list(group.get("targets", ()))
    named = len(targets) == 1 and not targets[0].startswith("re:") and targets[0].endswith("Attention")
    return named and not group.get("weights") and not group.get("output_activations")


def _ends(targets: Iterable[str], ignored: Iterable[str]) -> dict[str, Any]:
    """Return whether head and embedding are among the targets of a group."""
    named = {name.rpartition(".")[2] for name in targets} - {name.rpartition(".")[2] for name in ignored}
    found = {"head": "named"} if named & {*HEADS} else {}
    if named & {"Embedding", *EMBEDDINGS}:
        found["embedding"] = "class" if "Embedding" in named else "named"
    return found


def _apart(config: Mapping[str, Any]) -> bool:
    """Say whether linears that engines fuse are in several groups, or some of them in none."""
    targets = [group.get("targets", ()) for group in config["config_groups"].values()]
    of_all = next((index for index, names in enumerate(targets) if "Linear" in names), None)
    known: dict[str, int | None] = {name: index for index, names in enumerate(targets) for name in names}
    return _any_apart(known | dict.fromkeys(config.get("ignore", ()), None), of_all)


def _any_apart(known: Mapping[str, object], of_all: object) -> bool:
    """Say whether linears that engines fuse differ in what is known of them; ``of_all`` is of those not named."""
    for name in known:
        front, _, leaf = name.rpartition(".")
        fused = next((names for names in FUSED if leaf in names), ())
        if len({known.get(f"{front}.{sibling}", of_all) for sibling in fused}) > 1:
            return True
    return False


def _online(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a ``transform_config`` does to the inputs of linears, and to queries and keys."""
    groups = (config or {}).get("config_groups", {}).values()
    found: dict[str, str] = {}
    for group in groups:
        kind, places = str(group.get("type")), {str(apply.get("location")) for apply in group.get("apply", ())}
        field = {frozenset({"input"}): "online", frozenset({"q_attn", "k_cache"}): "turned"}.get(frozenset(places))
        if field is None or kind not in ONLINE:
            return {"unread": "transform_config"}
        found[field] = ONLINE[-1] if ONLINE[-1] in (kind, found.get(field)) else ONLINE[0]
    return found


def _gptq(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one kind of linears, and one for each rule of ``dynamic``; those with ``-:`` leave linears in 16 bits."""
    rules = config.get("dynamic") or {}
    changes = [dict(change) for pattern, change in rules.items() if not pattern.startswith("-:")]
    about: dict[str, Any] = {"beside": bool(rules)}
    if any(set(change) - _OVERRIDES for change in changes):
        about["unread"] = "dynamic"
    return [about | _gptq_linears({**config, **change}) for change in ({}, *changes)]


def _gptq_linears(config: Mapping[str, Any]) -> dict[str, Any]:
    size = int(config["group_size"])
    return {
        "layout": str(config.get("checkpoint_format", "gptq")),
        "bits": int(config["bits"]),
        "type": "int",
        "symmetric": bool(config.get("sym", True)),
        "strategy": "group" if size > 0 else "channel",
        "group_size": size,
        "act_order": bool(config.get("desc_act", False)) and size > 0,
    }


def dynamic_apart(config: Mapping[str, Any], linears: Iterable[str]) -> bool:
    """Say whether rules of ``dynamic`` treat linears that engines fuse unlike, or unlike what they are fused into.

    Args:
        config: A ``quantization_config`` of gptq.
        linears: Names of linears.
    """
    rules = config.get("dynamic") or {}

    def rule(name: str) -> str:
        return next((one for one in rules if re.match(one.removeprefix("-:").removeprefix("+:"), name)), "")

    for name in linears:
        front, _, leaf = name.rpartition(".")
        alike = next(({*names, whole} for names, whole in zip(FUSED, _FUSED_NAMES, strict=True) if leaf in names), ())
        if len({rule(f"{front}.{one}") and repr(rules[rule(f"{front}.{one}")]) for one in alike}) > 1:
            return True
    return False


def _fp8(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the linears of DeepSeek's FP8: weights in blocks, or with one scale each."""
    sizes = config.get("weight_block_size")
    shared: dict[str, Any] = {"strategy": "tensor"}
    if sizes:
        shared = {"strategy": "block", "group_size": int(sizes[-1]), "block": _block(sizes)}
    given = {"strategy": "group" if sizes else "tensor", "group_size": int(sizes[-1]) if sizes else None}
    dynamic = str(config.get("activation_scheme", "dynamic")).lower() == "dynamic"
    inputs = _inputs({"num_bits": 8, "type": "float", "dynamic": dynamic, **given})
    return [{"layout": str(config.get("fmt", "e4m3")), "bits": 8, "type": "float", **shared, **inputs}]


def _awq(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    size = int(config["group_size"] if "group_size" in config else config["q_group_size"])
    return [
        {
            "layout": str(config.get("version", "gemm")).lower(),
            "bits": int(config["bits"] if "bits" in config else config["w_bit"]),
            "type": "int",
            "symmetric": not config.get("zero_point", True),
            "strategy": "group" if size > 0 else "channel",
            "group_size": size,
        }
    ]


def _modelopt(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    algorithm = str(config["quant_algo"]).upper()
    if algorithm != "MIXED_PRECISION":
        return [_modelopt_linears(algorithm, config)]
    each = {name: str(one["quant_algo"]).upper() for name, one in config["quantized_layers"].items()}
    if not each:
        raise ValueError("`quantized_layers` names no linear")
    groups = dict.fromkeys(config.get("ignore") or config.get("exclude_modules") or (), None)
    about = {"apart": _any_apart({**groups, **each}, None), "beside": len(set(each.values())) > 1}
    return [about | _modelopt_linears(one, config) for one in dict.fromkeys(each.values())]


def _modelopt_linears(algorithm: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of linears of one algorithm."""
    named = _PRECISION.match(algorithm)
    four = "FP4" in algorithm if named is None else named[1] == "4"
    strategy = "tensor_group" if four else "tensor" if algorithm == "FP8" else "channel"
    static: Mapping[str, Any] = {"strategy": strategy, "type": "float", "symmetric": True}
    size = 32 if algorithm.startswith("MX") else 16 if four else -1
    found = {"layout": algorithm, "bits": 4 if four else 8, "group_size": size, **static}
    if algorithm == "NVFP4":
        found |= _inputs({"num_bits": 4, "type": "float", "dynamic": "local", "strategy": "tensor_group"})
    elif algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        found |= _inputs({"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"})
    elif algorithm == "FP8":
        found |= {"input_bits": 8, "input_type": "float", "input_strategy": "tensor"}
    elif named is not None and named[2] != "16":
        found |= {"inputs": "static", "input_bits": int(named[2])}
    elif named is not None:
        found["inputs"] = "none"
    algorithm_of_cache = config.get("kv_cache_quant_algo")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"} if algorithm_of_cache == "FP8" else None
    if algorithm_of_cache not in (None, "", "FP8"):
        found["unread"] = "kv_cache_quant_algo"
    return found | _cache(config.get("kv_cache_scheme") or scheme)


def _weights(arguments: Mapping[str, Any]) -> dict[str, Any]:
    size = int(arguments.get("group_size") or -1)
    return {
        "bits": int(arguments.get("num_bits", 8)),
        "type": str(arguments.get("type", "int")),
        "symmetric": bool(arguments.get("symmetric", True)),
        "strategy": str(arguments.get("strategy") or ("group" if size > 0 else "tensor")),
        "group_size": size,
    }


def _block(sizes: Sequence[int] | str | None) -> str:
    """Return rows and columns of a block; compressed-tensors takes ``128x128`` in place of a list too."""
    return sizes if isinstance(sizes, str) else "x".join(map(str, sizes or ()))


def _inputs(arguments: Mapping[str, Any] | None, end: Literal["input", "output"] = "input") -> dict[str, Any]:
    if not arguments:
        return {}
    return {f"{end}s": _calibrated(arguments), **{f"{end}_{name}": of for name, of in _weights(arguments).items()}}


def _cache(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    if not arguments:
        return {}
    found = _weights(arguments)
    element = {"int": "int", "float": "fp"}.get(found["type"], found["type"])
    mark = "" if found["symmetric"] else "-asym"
    fields = {"cache": _calibrated(arguments), "cache_group_size": found["group_size"]}
    return fields | {"cache_format": f"{element}{found['bits']}{mark}", "cache_strategy": found["strategy"]}


def _calibrated(arguments: Mapping[str, Any]) -> Calibrated:
    dynamic = arguments.get("dynamic", False)
    return "local" if dynamic == "local" else "dynamic" if dynamic else "static"
