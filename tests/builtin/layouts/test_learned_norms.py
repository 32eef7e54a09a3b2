"""Norms that a mitigator changed are those that checkpoints hold, in every layout, and count once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.builtin.exporters.awq import AWQ
from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.gptq import GPTQ
from qtool.builtin.exporters.hf import HuggingFace
from qtool.builtin.exporters.modelopt import ModelOpt
from qtool.engine.execute import BlockExecutable
from qtool.engine.exporter import Exporter
from qtool.engine.stored import NORMS
from qtool.engine.subject import Subject
from tests.builtin.layouts.conftest import SIZES, Make, changed
from tests.builtin.packed import written

NAMES = [
    f"model.layers.{i}.{norm}.weight" for i in range(2) for norm in ("input_layernorm", "post_attention_layernorm")
]
NAMES.append("model.norm.weight")
CASES: list[tuple[Exporter, str]] = [
    (HuggingFace(), "int4-g32"),
    (CompressedTensors(), "int4-sym-g32"),
    (CompressedTensors(), "nvfp4"),
    (GPTQ(), "int4-g32-sfp16"),
    (AWQ(), "int4-asym-g32-sfp16"),
    (ModelOpt(), "nvfp4"),
]


def learned(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {f"{NORMS}{name}": (0.5 + torch.rand(64, generator=generator)).to(dtype) for name in NAMES}


def tokens() -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(5))


def measured(subject: Subject, dtype: torch.dtype) -> Tensor:
    executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=dtype, batch=2)
    return torch.cat([logits for _, logits in executable.forward_windows(tokens())]).double()


def executed(directory: Path, dtype: torch.dtype) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.no_grad():
        return torch.cat([model(window[None]).logits for window in tokens()]).double()


@pytest.mark.parametrize(("exporter", "weights"), CASES)
@pytest.mark.parametrize(("name", "kept"), [("llama", torch.bfloat16), ("qwen2", torch.float32)])
def test_they_are_in_the_file(
    make: Make, tmp_path: Path, name: str, exporter: Exporter, weights: str, kept: torch.dtype
) -> None:
    plain, norms = make(weights, name=name), learned(kept)
    subject = changed(plain, tmp_path / "artifact", **norms)
    exported = written(exporter, subject, tmp_path / "out")
    before = written(exporter, plain, tmp_path / "before")
    found, was = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "before"))
    assert found.keys() == was.keys()
    for key, tensor in was.items():
        own = norms.get(f"{NORMS}{key}")
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor if own is None else own.to(tensor.dtype)), key
    assert sum(f"{NORMS}{key}" in norms for key in was) == len(norms) == 5
    sizes = exported.details["bytes"]
    assert sizes == before.details["bytes"]
    assert sizes["model"] == sum(tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize(("exporter", "dtype"), [(CompressedTensors(), torch.float32), (HuggingFace(), torch.bfloat16)])
def test_transformers_computes_with_them(make: Make, tmp_path: Path, exporter: Exporter, dtype: torch.dtype) -> None:
    plain = make("int4-sym-g32")
    subject = changed(plain, tmp_path / "artifact", **learned(torch.bfloat16))
    written(exporter, subject, tmp_path / "out")
    theirs, ours, alone = executed(tmp_path / "out", dtype), measured(subject, dtype), measured(plain, dtype)
    assert (theirs - alone).abs().mean() > 0.1 * alone.abs().mean()
    assert (theirs - ours).abs().mean() < (1e-6 if dtype == torch.float32 else 1e-3) * ours.abs().mean()
