"""Write a random Llama of any depth, a decoder block at a time. Usage: synthetic.py FOLDER WIDTH LAYERS.

A model of its own rather than a fetched one, so that its size can be chosen; its tokens are bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast


def main(folder: Path, width: int, layers: int) -> None:
    alphabet = {letter: code for code, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens = Tokenizer(models.BPE(vocab={**alphabet, "th": len(alphabet)}, merges=[("t", "h")]))  # GGUF asks for one
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder)  # type: ignore[no-untyped-call]
    config = LlamaConfig(
        vocab_size=tokens.get_vocab_size(),
        hidden_size=width,
        intermediate_size=8 * width // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    places: dict[str, str] = {}
    for part, shapes in (("ends", ends(config)), *((f"block-{n}", block(config, n)) for n in range(layers))):
        save_file({name: random_tensor(*shape) for name, shape in shapes.items()}, folder / f"{part}.safetensors")
        places |= dict.fromkeys(shapes, f"{part}.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_tensor(*shape: int) -> Tensor:
    """Return weights that keep activations of about the size that they have: ones for a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, dtype=torch.bfloat16).mul_(shape[1] ** -0.5)


def ends(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what is no block's."""
    outer = (config.vocab_size, config.hidden_size)
    return {"model.embed_tokens.weight": outer, "lm_head.weight": outer, "model.norm.weight": outer[1:]}


def block(config: LlamaConfig, number: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a decoder block."""
    n, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (n, n) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, n), "mlp.up_proj": (inner, n), "mlp.down_proj": (n, inner)}
    shapes |= {"input_layernorm": (n,), "post_attention_layernorm": (n,)}
    return {f"model.layers.{number}.{name}.weight": shape for name, shape in shapes.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
