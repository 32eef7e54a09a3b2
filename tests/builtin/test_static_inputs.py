"""FP8 inputs with one calibrated scale: the values by hand, what is calibrated, and what checkpoints say of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, fake_quantize
from safetensors.torch import load_file
from torch import Tensor

from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.modelopt import ModelOpt
from qtool.builtin.exporters.packed_source import open_packed
from qtool.consumers.checkpoint import read_checkpoint
from qtool.consumers.table import answer
from qtool.engine.execute import BlockExecutable
from qtool.engine.exporter import Exporter
from qtool.engine.grid import Grid
from qtool.engine.static_scales import biases_tried
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, SchemeError, UsageError
from qtool.plugins import Plugins
from qtool.scheme import parse_tensor_scheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.testing import TinyModel, tiny_model
from tests.builtin.packed import written

STATIC = "fp8-tensor-static"


@pytest.fixture(scope="module")
def tiny() -> TinyModel:
    with tiny_model(hidden_size=32, intermediate_size=48) as model:
        yield model


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover()


def rounded(tiny: TinyModel, weights: str = "fp8-tensor", activations: str = STATIC) -> Subject:
    scheme = read_scheme("", {"weights": weights, "activations": activations}, tiny.workspace.plugins)
    artifact, _ = mitigate(MitigateRequest(str(tiny.statistics.path), "rtn", scheme), tiny.workspace)
    return open_subject(str(artifact.path), tiny.workspace).subject


@pytest.mark.parametrize("text", [STATIC, f"{STATIC}-c0.5"])
def test_values_by_hand(text: str, plugins: Plugins) -> None:
    scheme = parse_tensor_scheme(text, plugins.format, vector="token")
    assert parse_tensor_scheme(str(scheme), plugins.format, vector="token") == scheme
    (part,) = Grid.of(scheme, plugins.format("fp8")).parts
    scale = part.global_scale(torch.tensor(7.0))
    assert scale is not None
    assert float(scale) == pytest.approx(7.0 * scheme.clip / 448, rel=1e-7)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * 9  # beyond what was seen
    ours = part.format.round(part.groups(x), part.fit(part.groups(x), global_scale=scale)).reshape(5, 16)
    steps = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(ours, steps * scale)


def test_weights_have_none(plugins: Plugins) -> None:
    with pytest.raises(
        SchemeError, match="no static scales: those are of activations, of outputs and of kv"
    ) as refused:
        read_scheme("", {"weights": STATIC}, plugins)
    assert refused.value.hint == "nearest that works: --weights fp8-sym-tensor-sfp32"


def test_scales_are_calibrated_and_do_not_look_at_what_runs(tiny: TinyModel) -> None:
    subject = rounded(tiny)
    assert subject.quantized is not None
    seen = open_statistics(tiny)
    for linear in subject.linears:
        scale = subject.quantized.tensor(f"{linear.reads}.input_global_scale")
        if linear.reads == subject.linears[0].reads:  # what stands behind rounded linears is seen again behind them
            bias = -math.log2(float(scale) / (float(seen[f"{linear.reads}.absmax"].max()) / 448))
            assert min(abs(bias - tried) for tried in biases_tried()) < 1e-4
    window = torch.randint(97, 123, (1, 12), generator=torch.Generator().manual_seed(1))

    def logits(tokens: Tensor) -> Tensor:
        executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float64, batch=1)
        return torch.cat([found for _, found in executable.forward_windows(tokens)])

    short = logits(window[:, :5])
    torch.testing.assert_close(logits(window)[:, :5], short, rtol=0, atol=1e-9)


def open_statistics(tiny: TinyModel) -> dict[str, Tensor]:
    held = load_file(tiny.statistics.path)
    return {name.replace("/", "."): tensor for name, tensor in held.items()}


def test_without_statistics_there_is_nothing_to_take_them_from(tiny: TinyModel) -> None:
    scheme = read_scheme("", {"weights": "fp8-tensor", "activations": STATIC}, tiny.workspace.plugins)
    with pytest.raises(UsageError, match=r"needs statistics(.|\n)*absmax"):
        mitigate(MitigateRequest(str(tiny.path), "rtn", scheme), tiny.workspace)


@pytest.mark.parametrize("exporter", [ModelOpt(), CompressedTensors()])
def test_checkpoints_hold_and_say_it_and_are_read_again(
    tiny: TinyModel, tmp_path: Path, cache: Path, exporter: Exporter
) -> None:
    subject = rounded(tiny)
    assert subject.quantized is not None
    exported = written(exporter, subject, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert group["input_activations"]["dynamic"] is False
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for linear in subject.linears:
        scale = stored[f"{linear.name}.input_scale"]
        assert scale.dtype == torch.float32
        assert float(scale) == float(subject.quantized.tensor(f"{linear.reads}.input_global_scale"))
    assert "static FP8 activations per tensor" in exported.consumers["vllm"]
    (case,) = read_checkpoint(tmp_path / "out", lambda _: 8)
    assert case.inputs == "static"
    assert answer([case], "vllm", "sm90").verdict == "loads"
    packed = open_packed(tmp_path / "out", subject.plugins, cache=cache)
    assert packed.scheme.activations == subject.scheme.activations
    for place in ("one", "two"):
        other: Exporter = CompressedTensors() if isinstance(exporter, ModelOpt) else ModelOpt()
        written(other, packed if place == "one" else subject, tmp_path / place)
    first, second = (load_file(tmp_path / place / "model.safetensors") for place in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].float(), second[name].float()) for name in first)


def test_compressed_tensors_rounds_inputs_as_qtool_does(tiny: TinyModel, tmp_path: Path) -> None:
    subject = rounded(tiny)
    written(CompressedTensors(), subject, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    arguments = QuantizationScheme(**{key: group[key] for key in ("targets", "input_activations")}).input_activations
    linear = subject.linears[0]
    scale = load_file(tmp_path / "out" / "model.safetensors")[f"{linear.name}.input_scale"]
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2)) * float(scale) * 300
    theirs = fake_quantize(x, scale, torch.zeros(1), arguments)
    grid = subject.input_grid(linear)
    assert grid is not None
    (part,) = grid.parts
    groups = part.groups(x)
    ours = part.format.round(groups, part.fit(groups, global_scale=scale.reshape(()))).reshape(4, 32)
    assert torch.equal(theirs, ours)


def test_some_calibrated_and_some_not_are_refused_by_modelopt(tiny: TinyModel) -> None:
    subject = rounded(tiny, activations=f"{STATIC},down_proj=fp8-tensor")
    with pytest.raises(SchemeError, match="whether their inputs are calibrated") as refused:
        ModelOpt().check(subject)
    assert "fp8-tensor-static for all" in refused.value.hint


def test_a_scale_that_reads_back_as_another_is_found(tiny: TinyModel, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    subject = rounded(tiny)
    written(ModelOpt(), subject, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = f"{subject.linears[-1].name}.input_scale"
    save_file(tensors | {name: tensors[name] * 2}, path, {"format": "pt"})
    with pytest.raises(ArtifactError, match="input scale"):
        ModelOpt().verify(subject, tmp_path / "out")
