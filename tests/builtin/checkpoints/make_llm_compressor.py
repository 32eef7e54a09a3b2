"""Makes checkpoints with llm-compressor, where that is installed: python make_llm_compressor.py FOLDER [NAME ...].

What is expected of each is what compressed-tensors decodes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_targets
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from model import loaded_llama, random_tokens, tensors_of, write_expected
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaForCausalLM

TINY = Path(__file__).parents[3] / "qtool" / "builtin" / "models" / "tiny"
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


Scheme = dict[str, object]


def grouped(weights: Scheme, inputs: Scheme | None = None) -> Scheme:
    """Return one group for all linears."""
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}}


def preset(name: str, ignore: tuple[str, ...] = ("lm_head",)) -> QuantizationModifier:
    """Return the modifier of a preset."""
    return QuantizationModifier(targets="Linear", scheme=name, ignore=list(ignore))


def own(weights: Scheme, inputs: Scheme | None = None, cache: Scheme | None = None) -> QuantizationModifier:
    """Return the modifier of a scheme of our own."""
    return QuantizationModifier(ignore=["lm_head"], kv_cache_scheme=cache, **grouped(weights, inputs))


def solved(order: str) -> GPTQModifier:
    """Return GPTQ with an order of columns."""
    return GPTQModifier(ignore=["lm_head"], block_size=32, **grouped(INT4 | {"actorder": order}))


MIXED = {
    "config_groups": {
        "ints": {"targets": ["re:.*self_attn.*"], "weights": INT4},
        "floats": {
            "targets": ["re:.*(gate|up)_proj$"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        },
    }
}
TENSOR = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
ROWS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
RECIPES: dict[str, tuple[int, Callable[[], Modifier]]] = {
    "w4a16-g32": (1, lambda: own(INT4)),
    "w4a16-asym-g32": (2, lambda: own(INT4 | {"symmetric": False})),
    "w4a16-channel": (1, lambda: own(INT4 | {"strategy": "channel", "group_size": None})),
    "w3a16-asym-g32": (1, lambda: own(INT4 | {"num_bits": 3, "symmetric": False})),
    "w4a16-gptq-weight": (1, lambda: solved("weight")),
    "w4a16-gptq-static": (1, lambda: solved("static")),
    "w4a16-gptq-group": (1, lambda: solved("group")),
    "w4a16-some": (
        1,
        lambda: QuantizationModifier(ignore=["lm_head", "re:.*layers.0.*down_proj"], **grouped(INT4)),
    ),
    "w8a16": (1, lambda: own(ROWS)),
    "w4a8": (1, lambda: own(INT4, TOKENS)),
    "w8a8": (1, lambda: preset("W8A8")),
    "w8a8-asym": (1, lambda: own(ROWS | {"symmetric": False}, TOKENS)),
    "w8a8-static": (1, lambda: own(ROWS, TENSOR)),
    "w8a8-static-asym": (1, lambda: own(ROWS, TENSOR | {"symmetric": False})),
    "fp8": (1, lambda: preset("FP8")),
    "fp8-dynamic": (1, lambda: preset("FP8_DYNAMIC")),
    "fp8-block": (1, lambda: preset("FP8_BLOCK")),
    "fp8-small-block": (
        1,
        lambda: own(
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
            {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
        ),
    ),
    "fp8-weights": (1, lambda: own({"num_bits": 8, "type": "float", "strategy": "channel"})),
    "nvfp4": (1, lambda: preset("NVFP4")),
    "nvfp4a16": (1, lambda: preset("NVFP4A16")),
    "mxfp4": (1, lambda: preset("MXFP4")),
    "mxfp4a16": (1, lambda: preset("MXFP4A16")),
    "mxfp8": (1, lambda: preset("MXFP8")),
    "mixed": (1, lambda: QuantizationModifier(ignore=["lm_head"], **MIXED)),
    "mixed-apart": (
        1,
        lambda: QuantizationModifier(
            ignore=["lm_head"],
            config_groups={
                "few": {"targets": ["re:.*(k|v)_proj$"], "weights": ROWS},
                "most": {"targets": ["re:.*(q|o|gate|up|down)_proj$"], "weights": INT4},
            },
        ),
    ),
    "kv-fp8": (1, lambda: own(INT4, cache=KV)),
    "kv-alone": (1, lambda: QuantizationModifier(kv_cache_scheme=KV)),
    "head": (1, lambda: preset("FP8_DYNAMIC", ignore=())),
}
"""Blocks, and what makes the recipe."""


def decoded(folder: Path) -> dict[str, Tensor]:
    """Decode every linear of a checkpoint with compressed-tensors, as its config says."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    targets = {target: group for group in groups for target in group.targets}
    tensors, found = tensors_of(folder), {}
    for name in tensors:
        linear, _, leaf = name.rpartition(".")
        if leaf != "weight_scale":
            continue
        scheme = targets[match_targets(linear, nn.Linear(1, 1, device="meta"), targets)[0]]
        own = {key.removeprefix(f"{linear}."): one for key, one in tensors.items() if key.startswith(f"{linear}.")}
        compressor = BaseCompressor.get_value_from_registry(scheme.format or config["format"])
        found[linear] = compressor.decompress(own, scheme)["weight"]
    return found


def make(model: LlamaForCausalLM, folder: Path, recipe: Modifier) -> None:
    """Quantize a model on random tokens, and save it."""
    words = AutoTokenizer.from_pretrained(TINY)  # asked for, and not used
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in random_tokens()]
    oneshot(model=model, processor=words, dataset=DataLoader(rows), recipe=recipe, max_seq_length=32)
    model.save_pretrained(folder, save_compressed=True, max_shard_size="20KB" if folder.name == "nvfp4a16" else "1GB")


def main() -> None:
    """Make the checkpoints that are named, or all."""
    home, *names = sys.argv[1:]
    for name in names or RECIPES:
        folder, (layers, recipe) = Path(home) / name, RECIPES[name]
        try:
            with TemporaryDirectory() as plain:
                make(loaded_llama(layers, plain), folder, recipe())
            write_expected(folder, decoded(folder), ("llmcompressor", "compressed-tensors", "transformers", "torch"))
            sys.stderr.write(f"{name}: made\n")
        except Exception as error:  # such as a recipe that this version does not have
            sys.stderr.write(f"{name}: {type(error).__name__}: {error}\n")


if __name__ == "__main__":
    main()
