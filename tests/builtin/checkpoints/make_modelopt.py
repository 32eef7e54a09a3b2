"""Makes checkpoints with NVIDIA ModelOpt; run it where that is installed: python make_modelopt.py FOLDER [NAME ...].

What is expected of each is what ModelOpt's own tensors decode.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from model import loaded_llama, random_tokens, tensors_of, write_expected
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from torch import Tensor


def named(name: str) -> Callable[[], dict[str, Any]]:
    """Return what makes one of ModelOpt's own configs."""
    return lambda: copy.deepcopy(getattr(mtq, name))


def with_cache(name: str, cache: str) -> Callable[[], dict[str, Any]]:
    """Return what makes a config with a quantized cache."""

    def made() -> dict[str, Any]:
        config, held = named(name)()["quant_cfg"], named(cache)()["quant_cfg"]
        return {"quant_cfg": config + held if isinstance(config, list) else config | held, "algorithm": "max"}

    return made


def mixed() -> dict[str, Any]:
    """Return NVFP4 with attention in FP8."""
    fours, eights = named("NVFP4_DEFAULT_CFG")()["quant_cfg"], named("FP8_DEFAULT_CFG")()["quant_cfg"]
    if isinstance(fours, list):
        own = [
            one | {"quantizer_name": f"*self_attn{name}"} for one in eights if (name := one["quantizer_name"]) in BOTH
        ]
        return {"quant_cfg": fours + own, "algorithm": "max"}
    return {"quant_cfg": fours | {f"*self_attn{name}": eights[name] for name in BOTH}, "algorithm": "max"}


BOTH = ("*weight_quantizer", "*input_quantizer")
RECIPES: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {
    "nvfp4": (1, named("NVFP4_DEFAULT_CFG")),
    "fp8": (1, named("FP8_DEFAULT_CFG")),
    "fp8-rows": (1, named("FP8_PER_CHANNEL_PER_TOKEN_CFG")),
    "fp8-kv": (1, with_cache("FP8_DEFAULT_CFG", "FP8_KV_CFG")),
    "nvfp4-mlp": (1, named("NVFP4_MLP_ONLY_CFG")),
    "nvfp4-w4a16": (1, named("W4A16_NVFP4_CFG")),
    "nvfp4-four-over-six": (1, named("NVFP4_FOUR_OVER_SIX_CFG")),
    "mixed": (1, mixed),
    "nvfp4-awq": (1, named("NVFP4_AWQ_LITE_CFG")),
    "int4-awq": (1, named("INT4_AWQ_CFG")),
    "w4a8-awq": (1, named("W4A8_AWQ_BETA_CFG")),
    "w4a8-nvfp4": (1, named("W4A8_NVFP4_FP8_CFG")),
    "int8-sq": (1, named("INT8_SMOOTHQUANT_CFG")),
    "mxfp4": (1, named("MXFP4_DEFAULT_CFG")),
    "mxfp8": (1, named("MXFP8_DEFAULT_CFG")),
    "fp8-blocks": (1, named("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG")),
}
"""Blocks, and what makes the config."""


def decoded(folder: Path) -> dict[str, Tensor]:
    """Decode every linear of a checkpoint with ModelOpt's tensors."""
    tensors, found = tensors_of(folder), {}
    for name in (one for one in tensors if one.endswith(".weight_scale")):
        linear = name.removesuffix(".weight_scale")
        raw, scale = tensors[f"{linear}.weight"], tensors[name]
        if raw.dtype == torch.float8_e4m3fn and scale.ndim < 2:
            own = FP8QTensor(raw.shape, torch.float32, raw)
            found[linear] = own.dequantize(torch.float32, scale=scale if scale.ndim == 0 else scale.unsqueeze(-1))
        elif scale.dtype == torch.float8_e4m3fn:
            own = NVFP4QTensor(torch.Size((raw.shape[0], raw.shape[1] * 2)), torch.float32, raw)
            double = tensors[f"{linear}.weight_scale_2"]
            found[linear] = own.dequantize(torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16})
    return found


def main() -> None:
    """Make the checkpoints that are named, or all."""
    home, *names = sys.argv[1:]
    for name in names or RECIPES:
        folder, (layers, config) = Path(home) / name, RECIPES[name]
        try:
            with TemporaryDirectory() as plain:
                model = loaded_llama(layers, plain)
            mtq.quantize(model, config(), lambda one: one(random_tokens()))
            with torch.inference_mode():
                export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=folder)
            write_expected(folder, decoded(folder), ("nvidia-modelopt", "transformers", "torch"))
            sys.stderr.write(f"{name}: made\n")
        except Exception as error:  # such as a config that this version does not have
            sys.stderr.write(f"{name}: {type(error).__name__}: {error}\n")


if __name__ == "__main__":
    main()
