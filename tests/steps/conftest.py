"""Tiny models and texts to run steps on, and ways to watch a step at work."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qtool.artifacts.store import Artifact
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.calibrate import CalibrateRequest, calibrate
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.workspace import Workspace
from qtool.testing import save_tiny_model, tiny_config

Quantize = Callable[..., str]
"""``quantize(weights, activations="", method="rtn", **settings)`` returns the path of what ``source`` became."""


@dataclass
class Watch:
    """A step's progress: what it went over, under which labels, and after how many items it is interrupted."""

    stop_after: int = -1
    seen: list[Any] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def __call__(self, items: Iterable[Any], *, total: int, label: str) -> Iterable[Any]:
        for item in items:
            if len(self.seen) == self.stop_after:
                raise KeyboardInterrupt
            self.seen.append(item)
            self.labels.append(label)
            yield item


@dataclass(frozen=True)
class Desk:
    """A workspace of a test's own, a tiny random model of 2 blocks and 24 channels, and a text for it."""

    workspace: Workspace
    model: Path
    text: Path
    told: list[str]

    def request(self, **changes: Any) -> CalibrateRequest:  # noqa: ANN401 - fields of the request
        plain = CalibrateRequest(str(self.model), data=str(self.text), num_samples=3, seq_len=32)
        return replace(plain, **changes)

    def calibrate(self, **changes: Any) -> Artifact:  # noqa: ANN401 - as above
        return calibrate(self.request(**changes), self.workspace)[0]

    def watched(self, stop_after: int = -1) -> tuple[Workspace, Watch]:
        watch = Watch(stop_after)
        return replace(self.workspace, progress=watch), watch

    def copied(self, folder: Path, change: Callable[[dict[str, Tensor]], None] | None = None) -> Path:
        """Copy the model, perhaps with other weights."""
        shutil.copytree(self.model, folder)
        if change is not None:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder


@pytest.fixture(scope="session")
def found_plugins() -> Plugins:
    return Plugins.discover()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder / "model", tiny_config("llama", num_attention_heads=3, num_key_value_heads=1))
    letters = torch.randint(97, 123, (4000,), generator=torch.Generator().manual_seed(5))
    (folder / "text.txt").write_bytes(bytes(letters.tolist()))
    return folder


@pytest.fixture
def desk(tiny_folder: Path, found_plugins: Plugins, tmp_path: Path, cache: Path) -> Desk:
    home, told = tmp_path / "desk", list[str]()
    home.mkdir()
    workspace = Workspace(found_plugins, home, cache, warn=told.append)
    return Desk(workspace, tiny_folder / "model", tiny_folder / "text.txt", told)


@pytest.fixture(scope="session")
def library(found_plugins: Plugins, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace that the tests of the shipped model share; what is made there once is found again by its key."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "home").mkdir()
    return Workspace(found_plugins, folder / "home", folder / "cache")


@pytest.fixture(scope="session")
def speeches(library: Workspace) -> Artifact:
    """Everything about the shipped model ``tiny`` on 16 windows of its own text."""
    request = CalibrateRequest("tiny", data="speeches", num_samples=16, seq_len=256)
    return calibrate(request, library)[0]


def save_llama(folder: Path, *, hidden: int, inner: int) -> Path:
    """Write a random Llama of 2 blocks in bfloat16, without a tokenizer, whose norms are no ones."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2, "vocab_size": 24}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    for key, parameter in model.named_parameters():
        if "norm" in key:
            parameter.data = torch.rand_like(parameter) + 0.5
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def workspace(found_plugins: Plugins, tmp_path: Path, cache: Path) -> Workspace:
    (tmp_path / "home").mkdir()
    return Workspace(found_plugins, tmp_path / "home", cache)


@pytest.fixture
def quantize(source: Path, workspace: Workspace) -> Quantize:
    """Quantize the model that a test calls its ``source``."""

    def made(weights: str, activations: str = "", method: str = "rtn", **settings: str) -> str:
        lookup = workspace.plugins.format
        parts = (parse_tensor_scheme(text, lookup) if text else None for text in (weights, activations))
        request = MitigateRequest(str(source), method, ModelScheme(*parts), settings)
        return str(mitigate(request, workspace)[0].path)

    return made
