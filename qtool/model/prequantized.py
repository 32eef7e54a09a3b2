"""Models whose files are quantized: float8 with a scale for each block is dequantised on reading, all else refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.errors import ModelError

BlockShape: TypeAlias = tuple[int, int]

# Where the config may say it, beside `quantization_config`; and files of tools that do not write into the config.
_ENTRIES = ("quantization_config", "compression_config")
_FILES: Mapping[str, str] = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
_ENDINGS: Mapping[str, str] = {
    ".qweight": "gptq or awq",
    ".weight_packed": "compressed-tensors",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    "_blocks": "mxfp4",
}
_SIZES = (("bits", "{} bits"), ("w_bit", "{} bits"), ("group_size", "groups of {}"), ("format", "{}"))
_DECODE = "start from the original model in 16 bits, or decode the weights: qtool pack {path} --to hf"
_HINTS: Mapping[str, str] = {
    **dict.fromkeys(("compressed-tensors", "modelopt", "gptq", "awq"), _DECODE),
    "mxfp4": "dequantise it once: AutoModelForCausalLM.from_pretrained(MODEL, "
    "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(FOLDER)",
}


def float8_blocks(config: Any, path: Path) -> BlockShape | None:  # noqa: ANN401 - each family has its own config class
    """Return the shape of the blocks that share a scale, if the weights are float8, and None if they are not quantized.

    Args:
        config: The model's transformers config.
        path: Its folder.

    Raises:
        ModelError: The model is quantized in another way.
    """
    entry = _entry(config)
    if not entry:
        other = next((method for file, method in _FILES.items() if (path / file).is_file()), "")
        if other:
            raise _refused(path, other, {}, hint=hint_of_file(path))
        return None
    method = str(entry.get("quant_method", "an unnamed method"))
    block = tuple(entry.get("weight_block_size") or ())
    if method != "fp8" or len(block) != len(("out", "in")) or entry.get("activation_scheme", "dynamic") != "dynamic":
        raise _refused(path, method, entry)
    return int(block[0]), int(block[1])


def require_plain_names(path: Path, names: Iterable[str]) -> None:
    """Refuse tensors whose names say that they are codes, where no config said so.

    Raises:
        ModelError: There are such.
    """
    for name in names:
        method = next((method for ending, method in _ENDINGS.items() if name.endswith(ending)), "")
        if method:
            raise _refused(path, method, {}, tensor=name)


def dequantize_blocks(
    weight: Float[Tensor, "out in"], scale: Float[Tensor, "rows columns"], block: BlockShape
) -> Float[Tensor, "out in"]:
    """Return ``weight[i, j] * scale[i // block[0], j // block[1]]`` in float32.

    Args:
        weight: float8 values. Not modified.
        scale: One for each block; those at the lower and right edge may be smaller.
        block: Rows and columns of a block.
    """
    rows = torch.arange(weight.shape[0], device=weight.device) // block[0]
    columns = torch.arange(weight.shape[1], device=weight.device) // block[1]
    return weight.float() * scale.float()[rows][:, columns]


def _entry(config: Any) -> Mapping[str, Any]:  # noqa: ANN401 - as above
    """Return what a config (or its text model's) says of quantization, empty if nothing."""
    for owner in (config, config.get_text_config()):
        for name in _ENTRIES:
            found = getattr(owner, name, None)
            if found:
                return dict(found if isinstance(found, Mapping) else found.to_dict())
    return {}


def hint_of_file(path: Path) -> str:
    """Return how a config gets what a file beside it says of codes, if that is one that transformers does not read."""
    name = next((name for name in ("quantize_config.json", "quant_config.json") if (path / name).is_file()), "")
    return f"put what {name} says into config.json, as `quantization_config` with its `quant_method`" if name else ""


def _refused(path: Path, method: str, entry: Mapping[str, Any], *, tensor: str = "", hint: str = "") -> ModelError:
    sizes = [text.format(entry[name]) for name, text in _SIZES if entry.get(name)]
    facts: tuple[tuple[str, object], ...] = (("quantized with", ", ".join([method, *sizes])),)
    return ModelError(
        f"`{path}` is quantized already",
        facts=(*facts, ("tensor", tensor)) if tensor else facts,
        hint=hint or _HINTS.get(method, f"start from the original model in 16 bits, before {method}").format(path=path),
    )
