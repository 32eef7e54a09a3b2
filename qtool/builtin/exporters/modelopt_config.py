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


def quantization_config(algorithm: Algorithm, ignored: Sequence[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of config.json.

    Args:
        algorithm: Of all linears.
        ignored: Linears that are not quantized.
    """
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "producer": _producer(),
        "config_groups": {"group_0": {"targets": ["Linear"], **_GROUPS[algorithm]}},
        "ignore": list(ignored),
    }


def hf_quant_config(algorithm: Algorithm, ignored: Sequence[str]) -> dict[str, Any]:
    """Return what ``hf_quant_config.json`` says; arguments as for ``quantization_config``."""
    group = {"group_size": 16} if "NVFP4" in algorithm else {}
    about = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": list(ignored)}
    return {"producer": _producer(), "quantization": about | group}


def _producer() -> dict[str, str]:
    return {"name": "qtool", "version": __version__}
