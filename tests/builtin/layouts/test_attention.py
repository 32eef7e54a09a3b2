"""Caches in a compressed-tensors checkpoint: what the library rounds is what qtool measures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.packed_source import open_packed
from qtool.engine.execute import BlockExecutable
from qtool.engine.subject import Subject
from qtool.scheme import parse_tensor_scheme
from tests.builtin.layouts.conftest import SIZES, Make
from tests.builtin.packed import written

WEIGHTS = "int8-sym-channel"


def tokens(windows: int = 3) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (windows, 12), generator=torch.Generator().manual_seed(5))


def measured(subject: Subject) -> Tensor:
    executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float32, batch=2)
    return torch.cat([logits for _, logits in executable.forward_windows(tokens())])


def loaded(directory: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model


@torch.no_grad()
def executed(model: nn.Module) -> Tensor:
    return torch.cat([model(window[None]).logits for window in tokens()])


def said_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config


def without_cache(subject: Subject) -> Subject:
    return replace(subject, scheme=replace(subject.scheme, kv=None))


@pytest.mark.parametrize("kv", ["fp8-head", "int8-asym-head-sfp32", "int4-sym-head-sfp32-half"])
def test_a_dynamic_scale_per_head_is_a_token_of_the_library(make: Make, tmp_path: Path, kv: str) -> None:
    """Of a cache's ``[batch, heads, tokens, dim]`` it keeps the first two axes, as of an input's ``[batch, tokens]``."""
    subject = make(WEIGHTS, kv=kv)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    cache = said_of(tmp_path / "out")["kv_cache_scheme"]
    assert (cache["strategy"], cache["group_size"], cache["dynamic"]) == ("token", None, True)
    ours, theirs, plain = measured(subject), executed(loaded(tmp_path / "out")), measured(without_cache(subject))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6)
    for other in (kv.replace("head", "token-head"), kv.replace("head", "tensor")):
        scheme = parse_tensor_scheme(other, subject.plugins.format, vector="token-head")
        unlike = measured(replace(subject, scheme=replace(subject.scheme, kv=scheme)))
        assert (unlike - ours).abs().mean() > 0.05 * (plain - ours).abs().mean() > 0
    assert " with a dynamic scale per head" in exported.consumers["transformers"]
    assert "refused: a KV cache is FP8" in exported.consumers["vllm"]
    assert "the KV cache is NOT quantized" in exported.consumers["sglang"]
    assert open_packed(tmp_path / "out", subject.plugins, cache=tmp_path).scheme.kv == subject.scheme.kv
