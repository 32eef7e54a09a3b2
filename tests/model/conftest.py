"""Tiny random models of several layouts, saved as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.model.source import Model, open_model
from qtool.plugins import Plugins

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 20,
}
LATENT: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 2,
    "head_dim": 4,
}
VISION: dict[str, Any] = {"depth": 1, "num_heads": 2, "hidden_size": 24, "embed_dim": 16, "mlp_ratio": 2}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gpt_oss": EXPERTS,
    "deepseek_v3": LATENT,
    "gpt_neox": {},
    "qwen2_vl": {
        "text_config": {
            **SIZES,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]},
        },
        "vision_config": VISION,
    },
}


@dataclass(frozen=True)
class Saved:
    """A model's folder, and its weights as transformers' modules hold them."""

    folder: Path
    state: dict[str, Tensor]

    def open(self) -> Model:
        plugins = Plugins.discover()
        families = {name: plugins.load("families", name) for name in plugins.offers["families"]}
        return open_model(self.folder, families, cache=self.folder.parent / "digests")

    def change(self, edit: Callable[[dict[str, Tensor]], object]) -> None:
        """Rewrite the weights."""
        tensors = load_file(self.folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, self.folder / WEIGHTS, {"format": "pt"})

    def configure(self, **changes: object) -> None:
        """Rewrite the config."""
        config = json.loads((self.folder / CONFIG).read_text())
        (self.folder / CONFIG).write_text(json.dumps(config | changes))


Save = Callable[..., Saved]


def save_model(folder: Path, model_type: str, **changes: object) -> Saved:
    """Save a random model in bfloat16."""
    towers = model_type == "qwen2_vl"
    sizes = {} if towers else SIZES
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **CHANGES[model_type], **changes})
    loader = "AutoModelForImageTextToText" if towers else "AutoModelForCausalLM"
    torch.manual_seed(1)
    model = getattr(transformers, loader).from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = torch.rand_like(parameter) - 0.5
    model.save_pretrained(folder)
    return Saved(folder, dict(model.state_dict()))


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Save a random model of a type in a folder of the test's."""
    return lambda model_type, **changes: save_model(tmp_path / model_type, model_type, **changes)
