"""Loads checkpoints with vLLM, one after the other, and says what came of each: run by vLLM's own Python.

A line of input is JSON: a prompt and folders. The line that answers is a list: the log-probabilities of a folder (none
where it was refused), the names of the kernels of its linears, and the message of a refusal.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import torch
from vllm import LLM, SamplingParams


def kernels(model: torch.nn.Module) -> list[str]:
    """Return the classes of the kernels that linears hold, or the schemes of linears."""
    holders = [getattr(module, name, None) for module in model.modules() for name in ("quant_method", "scheme")]
    held = {type(value).__name__ for holder in holders if holder is not None for value in vars(holder).values()}
    return sorted(name for name in held if name.endswith("Kernel"))


def executed(folder: str, prompt: list[int]) -> tuple[list[float], list[str]]:
    """Return the log-probability of each token of the prompt after its first, and the kernels."""
    sizes: dict[str, Any] = {"max_model_len": 64, "num_gpu_blocks_override": 16}  # all blocks are filled with zeros
    llm = LLM(folder, enforce_eager=True, dtype="bfloat16", skip_tokenizer_init=True, **sizes)
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (made,) = llm.generate([{"prompt_token_ids": prompt}], wanted)
    values = [found[token].logprob for found, token in zip(made.prompt_logprobs[1:], prompt[1:], strict=True)]
    return values, llm.apply_model(kernels)[0]


def read(folder: str, prompt: list[int]) -> tuple[list[float], list[str], str]:
    """Return what was executed and by what, or the message of a refusal."""
    values, names, message = [], [], ""
    try:
        values, names = executed(folder, prompt)
    except Exception as error:  # what refuses is a result too
        message = f"{type(error).__name__}: {error}"
    gc.collect()
    return values, names, message


def main() -> None:
    gc.collect()
    gc.freeze()  # what is imported stays, and vLLM looks through all of it five times a checkpoint
    gc.freeze = gc.unfreeze = lambda: None
    for line in sys.stdin:
        prompt, folders = json.loads(line)
        print("\nANSWER", json.dumps([read(folder, prompt) for folder in folders]), flush=True)  # noqa: T201


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
