"""Subjects for the tests of layouts: tiny random models quantized in any scheme, and checkpoints made wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2Config

from qtool.artifacts.manifest import Manifest, Step
from qtool.artifacts.store import ArtifactWriter
from qtool.engine.subject import Subject
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": (LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=True), torch.bfloat16),
    "qwen2": (Qwen2Config(**SIZES, tie_word_embeddings=False), torch.float16),
    "narrow": (LlamaConfig(**{**SIZES, "intermediate_size": 72}), torch.bfloat16),
    "block": (LlamaConfig(**{**SIZES, "intermediate_size": 128, "num_hidden_layers": 1}), torch.bfloat16),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=2), torch.bfloat16),
}
NAME = "model.layers.1.self_attn.v_proj"
Make = Callable[..., Subject]


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return Plugins.discover()


@pytest.fixture(scope="session")
def make(plugins: Plugins, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Make:
    """Make a subject quantized by rounding to nearest (or by another method); the same one is made once."""
    workspace = Workspace(plugins, tmp_path_factory.mktemp("home"), cache)

    @lru_cache
    def model(name: str) -> Path:
        torch.manual_seed(3)
        config, dtype = CONFIGS[name]
        module = AutoModelForCausalLM.from_config(config)
        for key, parameter in module.named_parameters():
            if "norm" in key or "bias" in key:
                parameter.data = torch.rand_like(parameter) + 0.5
        folder = tmp_path_factory.mktemp(name)
        module.to(dtype).save_pretrained(folder)
        return folder

    @lru_cache
    def made(weights: str, activations: str = "", kv: str = "", *, name: str = "llama", method: str = "rtn") -> Subject:
        texts = {"weights": weights, "activations": activations, "kv": kv}
        request = MitigateRequest(str(model(name)), method, read_scheme("", texts, plugins), {}, dtype="float32")
        artifact, _ = mitigate(request, workspace)
        return open_subject(str(artifact.path), workspace).subject

    return made


def changed(subject: Subject, folder: Path, scheme: ModelScheme | None = None, **tensors: Tensor) -> Subject:
    """Return the subject with some tensors of its artifact replaced or added, and perhaps another scheme."""
    assert subject.quantized is not None
    held = {name: subject.quantized.tensor(name) for name in subject.quantized.names()} | tensors
    scheme = scheme or subject.scheme
    manifest = Manifest("quantized", Step("test", "", 1, "test"), {}, subject.model.id, "llama", scheme.to_json())
    folder.mkdir(exist_ok=True)
    writer = ArtifactWriter(folder / "changed.safetensors", manifest)
    writer.begin()
    writer.add("all", held)
    return replace(subject, scheme=scheme, quantized=writer.finish(manifest))


def calibrated(subject: Subject, plugins: Plugins, folder: Path) -> Subject:
    """Return the subject with NVFP4 inputs whose multipliers differ from site to site."""
    scheme = replace(subject.scheme, activations=parse_tensor_scheme("nvfp4", plugins.format))
    sites = sorted({linear.reads for linear in subject.model.graph.linears})
    scales = {f"{site}.input_global_scale": torch.tensor(0.0011 + 0.0001 * i) for i, site in enumerate(sites)}
    return changed(subject, folder, scheme, **scales)


def altered(directory: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def flipped(tensor: Tensor) -> Tensor:
    """Change the lowest bit of the last element."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    flat[-tensor.element_size()] ^= 1
    return tensor
