"""The random model that the checkpoints here are of, and what is said of the versions that made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 24


def random_llama(layers: int) -> LlamaForCausalLM:
    """Return a Llama of few weights in bfloat16 whose inputs have outliers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) * 3)
            else:
                parameter.copy_(torch.randn_like(parameter) * torch.rand(parameter.shape[-1]) * 0.1)
    return model.to(torch.bfloat16).eval()


def loaded_llama(layers: int, folder: str) -> LlamaForCausalLM:
    """Return the model as it is loaded from a folder, whose name and architecture tools look at."""
    random_llama(layers).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype="auto")


def random_tokens(windows: int = 8, length: int = 32) -> Tensor:
    """Return windows of tokens."""
    return torch.randint(2, VOCAB, (windows, length), generator=torch.Generator().manual_seed(1))


def write_expected(folder: Path, decoded: Mapping[str, Tensor], packages: tuple[str, ...]) -> None:
    """Write what the tool's own library decodes: dtype, a digest of all values, the first values.

    Args:
        folder: The checkpoint.
        decoded: Weights by the name of their linear.
        packages: Whose versions are noted.
    """
    weights = {
        name: {
            "dtype": str(weight.dtype).removeprefix("torch."),
            "sha256": digest(weight),
            "first": weight[0, :8].tolist(),
        }
        for name, weight in decoded.items()
    }
    made = {"made_with": {name: version(name) for name in packages}, "weights": weights}
    (folder / "expected.json").write_text(json.dumps(made) + "\n", encoding="utf-8")


def digest(weight: Tensor) -> str:
    """Return SHA-256 of the values in float32, whose zeros have no sign."""
    return hashlib.sha256((weight.float() + 0.0).contiguous().numpy().tobytes()).hexdigest()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, sharded or not."""
    return {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}
