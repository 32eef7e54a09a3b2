"""llm-compressor's GPTQ as one process; runs in that tool's own environment and imports nothing of qtool.

Usage: peer.py MODEL STATISTICS OUTPUT BATCH. Takes the windows of tokens from qtool's statistics, so that both
calibrate on the same ones. Prints one JSON object: versions, and the seconds that saving took.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

VERSIONS = ("llmcompressor", "torch", "transformers")


def main(model_path: str, statistics: str, output: str, batch: str) -> None:
    with safe_open(statistics, framework="pt") as file:
        windows = file.get_tensor("windows").tolist()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    weights = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=64)
    recipe = GPTQModifier(
        ignore=["lm_head"],
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)},
        dampening_frac=0.01,
        block_size=128,
        actorder="static",
    )
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(model_path),
        dataset=Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(row) for row in windows]}),
        recipe=recipe,
        num_calibration_samples=len(windows),
        max_seq_length=len(windows[0]),
        batch_size=int(batch),
        shuffle_calibration_samples=False,
    )
    start = time.perf_counter()
    model.save_pretrained(output, save_compressed=True)
    saving = time.perf_counter() - start
    sys.stdout.write("\n" + json.dumps({"saving": saving, "versions": {n: version(n) for n in VERSIONS}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
