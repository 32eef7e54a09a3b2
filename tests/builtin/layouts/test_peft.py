"""What PEFT computes from a checkpoint and its adapter is what qtool measures with its corrections."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from qtool.builtin.exporters.peft import PEFT, factors
from qtool.engine.execute import BlockExecutable
from qtool.engine.exporter import UNREADABLE
from qtool.engine.planner import extend
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, UsageError
from qtool.model.plan import Plan, Proposal
from qtool.numerics.operators import Hadamard
from qtool.plugins import Plugins
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from tests.builtin.layouts.conftest import SIZES
from tests.builtin.packed import written

NAME = "model.layers.1.mlp.down_proj"
INT8 = "int8-sym-token-sfp32-half"
Corrected = Callable[..., Subject]


@pytest.fixture(scope="module")
def corrected(plugins: Plugins, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Corrected:
    workspace = Workspace(plugins, tmp_path_factory.mktemp("home"), cache)
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, head_dim=32)).to(torch.bfloat16).save_pretrained(folder)

    @lru_cache
    def made(weights: str, activations: str = "", *settings: str, method: str = "rtn+lorc") -> Subject:
        scheme = read_scheme("", {"weights": weights, "activations": activations}, plugins)
        options = dict(text.split("=") for text in settings)
        request = MitigateRequest(str(folder), method, scheme, options, dtype="float32")
        return open_subject(str(mitigate(request, workspace)[0].path), workspace).subject

    return made


def tokens() -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(5))


def measured(subject: Subject) -> Tensor:
    executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float32, batch=2)
    return torch.cat([logits for _, logits in executable.forward_windows(tokens())])


def loaded(directory: Path, *, adapter: bool) -> Any:  # noqa: ANN401 - a model, or PEFT's around it
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if adapter:
        model(tokens()[:1])  # decodes the weights, which PEFT looks for
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(model, str(directory / "adapter")).eval()
    return model


def executed(directory: Path, *, adapter: bool) -> Tensor:
    """Logits of the checkpoint, with PEFT's adapter around it or without."""
    model = loaded(directory, adapter=adapter)
    with torch.no_grad():
        return torch.cat([model(window[None]).logits for window in tokens()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "activations", "settings"),
    [
        ("int3-sym-g32", "", ("lorc.rank=5",)),
        ("int3-sym-g32", "", ("lorc.rank=8", "lorc.dtype=int8")),
        ("int4-sym-channel", INT8, ("lorc.rank=4", "lorc.reads=full")),
        ("int4-sym-g32,lm_head=int2-sym-channel", "", ("lorc.rank=8",)),
    ],
)
def test_peft_computes_our_logits(
    corrected: Corrected, tmp_path: Path, weights: str, activations: str, settings: tuple[str, ...]
) -> None:
    subject = corrected(weights, activations, *settings)
    exported = written(PEFT(), subject, tmp_path / "out")
    ours, theirs = measured(subject), executed(tmp_path / "out", adapter=True)
    alone = executed(tmp_path / "out", adapter=False)
    assert (alone - ours).abs().mean() > 1e-3
    if activations:  # now and then a value lies so near the middle of two codes that the last bit decides
        assert (theirs - ours).abs().mean() < 0.01 * (alone - ours).abs().mean()
    else:
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6)
    assert exported.consumers["transformers"].startswith(UNREADABLE)
    assert f"--max-lora-rank {settings[0][-1]}" in exported.consumers["vllm"]
    assert ("that of the head is not known" in exported.consumers["vllm"]) == ("lm_head" in weights)


@pytest.mark.parametrize("settings", [("lorc.rank=5",), ("lorc.rank=8", "lorc.dtype=int8")])
def test_every_weight_and_factor_that_peft_loads_is_ours(
    corrected: Corrected, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    subject = corrected("int3-sym-g32", "", *settings)
    written(PEFT(), subject, tmp_path / "out")
    model = loaded(tmp_path / "out", adapter=True)
    for linear in subject.model.graph.linears:
        theirs = model.get_submodule(f"base_model.model.{linear.name}")
        own = replace(subject.linear(linear), adapter=None).weight(subject.weight_grid(linear))
        assert torch.equal(theirs.get_base_layer().weight, own), linear.name
        down, up = factors(subject, linear)
        assert torch.equal(theirs.lora_A["default"].weight, down.float()), linear.name
        assert torch.equal(theirs.lora_B["default"].weight, up.float()), linear.name
        assert theirs.scaling == {"default": 1.0}


def test_the_adapter_is_laid_out_as_peft_has_it(corrected: Corrected, tmp_path: Path) -> None:
    subject = corrected("int3-sym-g32", "", "lorc.rank=5")
    exported = written(PEFT(), subject, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    stored = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 5, 5)
    assert config["target_modules"] == sorted(linear.name for linear in subject.model.graph.linears)
    assert {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in stored} == {
        *config["target_modules"]
    }
    down, up = (stored[f"base_model.model.{NAME}.lora_{side}.weight"] for side in "AB")
    adapter = subject.linear(subject.model.graph.linear(NAME)).adapter
    assert adapter is not None
    assert torch.equal(up.double() @ down.double(), adapter.product(torch.float64))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in weights if "lora" in name or "adapter" in name]
    size = sum(tensor.nbytes for tensor in (*weights.values(), *stored.values()))
    assert exported.details["bytes"]["model"] == size


def test_a_factor_that_was_written_wrong_is_found(corrected: Corrected, tmp_path: Path) -> None:
    subject = corrected("int3-sym-g32", "", "lorc.rank=5")
    written(PEFT(), subject, tmp_path / "out")
    file = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    stored = load_file(file)
    stored[f"base_model.model.{NAME}.lora_B.weight"][3, 1] *= 2
    save_file(stored, file)
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.down_proj"):
        PEFT().verify(subject, tmp_path / "out")


def test_what_peft_would_compute_otherwise_is_refused_with_the_nearest(corrected: Corrected) -> None:
    with pytest.raises(UsageError, match="reads the quantized one") as refused:
        PEFT().check(corrected("int4-sym-channel", INT8, "lorc.rank=4"))
    assert "reads=full" in refused.value.hint
    with pytest.raises(UsageError, match="no low-rank corrections") as refused:
        PEFT().check(corrected("int4-sym-channel", method="rtn"))
    assert refused.value.hint.endswith("--to compressed-tensors")
    subject = corrected("int3-sym-g32", "", "lorc.rank=5")
    operators = {"layers.0.up_down": [Hadamard(SIZES["intermediate_size"])]}
    plan = extend(Plan(), Proposal(operators), subject.model.graph, method="test")
    with pytest.raises(UsageError, match="in front of the operators"):
        PEFT().check(replace(subject, plan=plan))
    with pytest.raises(UsageError, match="NVFP4 or MXFP4 only"):
        PEFT().check(corrected("fp4-g16-sfp32", "", "lorc.rank=5"))
