"""The two configs of a ModelOpt checkpoint, which say the same: readers look for either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from qtool import __version__

HF_QUANT_CONFIG = "hf_quant_config.json"
Algorithm: TypeAlias = Literal["NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN"]
"""What ModelOpt calls a scheme."""

_FP4: Mapping[str, Any] = {"num_bits": 4, "type": "float", "dynamic": False, "group_size": 16}
_GROUPS: Mapping[Algorithm, Mapping[str, Any]] = {
    "NVFP4": {"weights": _FP4, "input_activations": _FP4},
    "W4A16_NVFP4": {"weights": _FP4, "input_activations": None},
    "FP8": {
        "weights": {"num_bits": 8, "type": "float", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
    },
    "FP8_PER_CHANNEL_PER_TOKEN": {
        "weights": {"num_bits": 8, "type": "float", "dynamic": False, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"},
    },
}
FP8_CACHE: Mapping[str, Any] = {"num_bits": 8, "type": "float", "dynamic": False}
"""What config.json says of a cache that the other config calls ``FP8``."""


MIXED = "MIXED_PRECISION"
"""What ModelOpt calls a checkpoint whose linears have several algorithms."""


def quantization_config(
    layers: Mapping[Algorithm, Sequence[str]], ignored: Sequence[str], *, static: bool = False, cached: bool = False
) -> dict[str, Any]:
    """Return the ``quantization_config`` of config.json.

    Args:
        layers: The linears of each algorithm, as files call them.
        ignored: Linears that are not quantized.
        static: Whether the inputs of ``FP8`` are calibrated.
        cached: Whether the KV cache is in FP8, with calibrated scales.
    """
    several = len(layers) > 1
    groups = {
        f"group_{index}": {"targets": list(names) if several else ["Linear"], **_GROUPS[algorithm]}
        for index, (algorithm, names) in enumerate(layers.items())
    }
    for group, algorithm in zip(groups.values(), layers, strict=True):
        if static and algorithm == "FP8":
            group["input_activations"] = {**group["input_activations"], "dynamic": False}
    about = {"quant_method": "modelopt", "quant_algo": MIXED if several else next(iter(layers))}
    told: dict[str, Any] = {"config_groups": groups, "ignore": list(ignored)}
    told |= {"kv_cache_scheme": FP8_CACHE} if cached else {}
    return about | {"producer": _producer()} | told | ({"quantized_layers": _layers(layers)} if several else {})


def hf_quant_config(
    layers: Mapping[Algorithm, Sequence[str]], ignored: Sequence[str], *, cached: bool = False
) -> dict[str, Any]:
    """Return what ``hf_quant_config.json`` says; arguments as for ``quantization_config``."""
    first, *others = layers
    own: dict[str, Any] = {"quantized_layers": _layers(layers)} if others else _group_size(first)
    algorithm = MIXED if others else first
    cache = "FP8" if cached else None
    about = {"quant_algo": algorithm, "kv_cache_quant_algo": cache, "exclude_modules": list(ignored)}
    return {"producer": _producer(), "quantization": about | own}


def algorithm_of(config: Mapping[str, Any], name: str) -> str:
    """Return the algorithm that either config says of a linear.

    Raises:
        KeyError: It says nothing of this linear.
    """
    algorithm = str(config["quant_algo"]).upper()
    return str(config["quantized_layers"][name]["quant_algo"]).upper() if algorithm == MIXED else algorithm


def _layers(layers: Mapping[Algorithm, Sequence[str]]) -> dict[str, Any]:
    each = {
        name: {"quant_algo": algorithm} | _group_size(algorithm) for algorithm in layers for name in layers[algorithm]
    }
    return dict(sorted(each.items()))


def _group_size(algorithm: Algorithm) -> dict[str, Any]:
    return {"group_size": 16} if "NVFP4" in algorithm else {}


def _producer() -> dict[str, str]:
    return {"name": "qtool", "version": __version__}
