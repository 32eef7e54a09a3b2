"""INT8 inputs with one calibrated scale and zero point, from statistics to compressed-tensors and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, fake_quantize
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.builtin.exporters.awq import AWQ
from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.gptq import GPTQ
from qtool.builtin.exporters.modelopt import ModelOpt
from qtool.builtin.exporters.packed_source import open_packed
from qtool.consumers.checkpoint import read_checkpoint
from qtool.consumers.table import answer
from qtool.engine.execute import BlockExecutable
from qtool.engine.exporter import Exporter
from qtool.engine.static_scales import biases_tried
from qtool.engine.storage import stored_bytes
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, SchemeError, UsageError
from qtool.steps.calibrate import CalibrateRequest, calibrate
from qtool.steps.demand import demand_of
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.testing import TinyModel, tiny_model
from tests.builtin.packed import written

ROWS, STATIC = "int8-sym-channel-sbf16", "int8-asym-tensor-static"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model(hidden_size=32, intermediate_size=48) as model:
        yield model


def rounded(tiny: TinyModel, activations: str = STATIC, weights: str = ROWS, source: Path | None = None) -> Subject:
    scheme = read_scheme("", {"weights": weights, "activations": activations}, tiny.workspace.plugins)
    request = MitigateRequest(str(source or tiny.statistics.path), "rtn", scheme, dtype="float32")
    artifact, _ = mitigate(request, tiny.workspace)
    return open_subject(str(artifact.path), tiny.workspace).subject


@pytest.fixture(scope="module")
def subject(tiny: TinyModel) -> Subject:
    return rounded(tiny)


@pytest.fixture
def half(tiny: TinyModel, tmp_path: Path) -> Subject:
    """The same of a model that is stored in 16 bits, so that a checkpoint rounds nothing else."""
    folder, text = tmp_path / "half", tmp_path / "text.txt"
    shutil.copytree(tiny.path, folder)
    AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.bfloat16).save_pretrained(folder)
    text.write_text("seven boxes of liquor jugs " * 40)
    asked = CalibrateRequest(str(folder), data=str(text), num_samples=6, seq_len=32, dtype="float32")
    statistics, _ = calibrate(asked, tiny.workspace)
    return rounded(tiny, source=statistics.path)


@pytest.fixture
def checkpoint(subject: Subject, tmp_path: Path) -> Path:
    written(CompressedTensors(), subject, tmp_path / "out")
    return tmp_path / "out"


def altered(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_scale_and_zero_point_are_of_the_range_that_was_gathered(tiny: TinyModel, subject: Subject) -> None:
    assert subject.quantized is not None
    held = {name.replace("/", "."): tensor for name, tensor in load_file(tiny.statistics.path).items()}
    site = subject.linears[0].reads  # what stands behind rounded linears is seen again behind them
    low, high = float(held[f"{site}.min"].min()), float(held[f"{site}.max"].max())
    assert low < 0 < high
    assert abs(low) != abs(high)
    scale, zero = (subject.quantized.tensor(f"{site}.input_{leaf}") for leaf in ("global_scale", "zero_point"))
    assert (zero.dtype, zero.shape, scale.shape) == (torch.uint8, (), ())
    assert float(scale.bfloat16()) == float(scale)
    tried = [(ratio * (high - low) / 255, ratio) for ratio in (1.0, *(2.0**-bias for bias in biases_tried()))]
    ratio = next(ratio for step, ratio in tried if abs(step / float(scale) - 1) < 2**-8)
    assert int(zero) == min(max(round(-low * ratio / float(scale)), 0), 255)


def test_without_the_ends_of_the_range_there_is_nothing_to_take_them_from(tiny: TinyModel) -> None:
    with pytest.raises(UsageError, match=r"needs statistics(.|\n)*min, max, sample"):
        rounded(tiny, source=tiny.path)


def test_transformers_computes_with_what_was_calibrated(half: Subject, tmp_path: Path) -> None:
    checkpoint = tmp_path / "out"
    exported = written(CompressedTensors(), half, checkpoint)
    assert exported.consumers["transformers"].startswith("W8A8: static INT8 activations per tensor, asymmetric")
    assert "W8A8: static INT8 activations per tensor, asymmetric" in exported.consumers["vllm"]
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    said = {key: group["input_activations"][key] for key in ("dynamic", "symmetric", "strategy", "num_bits")}
    assert said == {"dynamic": False, "symmetric": False, "strategy": "tensor", "num_bits": 8}
    assert "dequantize" not in config
    window = torch.randint(97, 123, (1, 12), generator=torch.Generator().manual_seed(1))
    executable = BlockExecutable(half, device=CPU, dtype=torch.float32, batch=1)
    ((_, ours),) = executable.forward_windows(window)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(window).logits, ours, rtol=0, atol=1e-6)
        for module in model.modules():
            if hasattr(module, "input_zero_point"):
                module.input_zero_point.data += 9
        assert (model(window).logits - ours).abs().mean() > 1e-3


def test_the_library_rounds_inputs_as_qtool_does(subject: Subject, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    arguments = QuantizationScheme(**{key: group[key] for key in ("targets", "input_activations")}).input_activations
    stored = load_file(checkpoint / "model.safetensors")
    for linear in subject.linears:
        scale, zero = (stored[f"{linear.name}.input_{leaf}"] for leaf in ("scale", "zero_point"))
        assert (scale.dtype, scale.shape, zero.dtype, zero.shape) == (torch.float32, (1,), torch.int8, (1,))
        width = subject.model.graph.width(linear.spec.reads)
        x = torch.randn(64, width, generator=torch.Generator().manual_seed(2)) * float(scale) * 99
        rounding = subject.rounding(linear.layer, linear.spec.reads, CPU)
        assert rounding is not None
        ours = rounding(x)
        assert torch.equal(fake_quantize(x, scale, zero, arguments), ours)
        middle = float(zero) + 128
        assert float(ours.min() / scale) == -middle  # some are clipped at both ends
        assert float(ours.max() / scale) == 255 - middle


def test_it_is_read_again(subject: Subject, checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    packed = open_packed(checkpoint, subject.plugins, cache=cache)
    assert packed.quantized is not None
    assert subject.quantized is not None
    assert str(packed.scheme.activations) == "int8-asym-tensor-sfp32-static"
    for linear in subject.linears:
        for leaf in ("input_global_scale", "input_zero_point"):
            name = f"{linear.reads}.{leaf}"
            assert torch.equal(packed.quantized.tensor(name), subject.quantized.tensor(name))
    written(CompressedTensors(), packed, tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("change", [lambda zero: zero + 1, lambda zero: zero.to(torch.int32)])
def test_another_zero_point_is_noticed(subject: Subject, checkpoint: Path, change: Callable[[Tensor], Tensor]) -> None:
    name = f"{subject.linears[-1].name}.input_zero_point"
    altered(checkpoint, lambda held: held.update({name: change(held[name])}))
    with pytest.raises(ArtifactError, match="input zero point"):
        CompressedTensors().verify(subject, checkpoint)


def test_a_zero_point_that_lacks_or_that_no_config_speaks_of_is_refused(
    subject: Subject, checkpoint: Path, cache: Path
) -> None:
    name = f"{subject.linears[3].name}.input_zero_point"
    altered(checkpoint, lambda held: held.update({name: held[name] + 1}))
    one = open_packed(checkpoint, subject.plugins, cache=cache)
    siblings = [linear for linear in subject.linears if linear.reads == subject.linears[3].reads]
    if len(siblings) > 1:
        assert one.quantized is not None
        with pytest.raises(UsageError, match="different input zero points"):
            one.quantized.tensor(f"{subject.linears[3].reads}.input_zero_point")
    altered(checkpoint, lambda held: held.pop(name))
    with pytest.raises(ArtifactError, match="the checkpoint lacks one") as refused:
        open_packed(checkpoint, subject.plugins, cache=cache)
    assert name in str(refused.value.facts)
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["symmetric"] = True
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="inputs with zero points") as refused:
        open_packed(checkpoint, subject.plugins, cache=cache)
    assert refused.value.hint.endswith("--activations fp8-tensor-static")
    zeros = lambda held: held.update({n: one * 0 for n, one in held.items() if n.endswith("zero_point")})  # noqa: E731
    altered(checkpoint, zeros)
    plain = open_packed(checkpoint, subject.plugins, cache=cache)
    assert str(plain.scheme.activations) == "int8-sym-tensor-sfp32-static"
    assert plain.quantized is not None
    assert not any(name.endswith("input_zero_point") for name in plain.quantized.header.slots)


@pytest.mark.parametrize(
    ("exporter", "weights", "nearest"),
    [
        (ModelOpt(), ROWS, "--weights fp8-channel-sbf16 --activations fp8-token"),
        (GPTQ(), ROWS, f"--weights {ROWS}"),
        (AWQ(), ROWS, "--weights int4-sym-channel-sfp16"),
        (CompressedTensors(), "int4-sym-g8-sbf16", "--activations int8-asym-tensor-sbf16"),
    ],
)
def test_layouts_without_it_name_what_they_carry(
    tiny: TinyModel, exporter: Exporter, weights: str, nearest: str
) -> None:
    with pytest.raises(SchemeError) as refused:
        exporter.check(rounded(tiny, weights=weights))
    assert nearest in refused.value.hint


def test_what_consumers_make_of_it_is_told(checkpoint: Path) -> None:
    (case,) = read_checkpoint(checkpoint, lambda _: 8)
    assert (case.inputs, case.input_symmetric, case.input_strategy) == ("static", False, "tensor")
    for device in ("sm80", "sm90"):
        found = answer([case], "vllm", device)
        assert (found.verdict, found.says.partition(" (")[0]) == (
            "loads",
            "W8A8: static INT8 activations per tensor, asymmetric",
        )


def test_uncalibrated_inputs_name_what_is_gathered(subject: Subject, tiny: TinyModel) -> None:
    other = rounded(tiny, activations="int8-sym-tensor-static")
    with pytest.raises(UsageError, match="a scale and a zero point for each input") as refused:
        CompressedTensors().check(replace(other, scheme=subject.scheme))
    assert "--gather hessian,min,max,sample" in refused.value.hint


def test_the_bytes_of_an_artifact_are_foreseen(tiny: TinyModel, subject: Subject) -> None:
    symmetric = rounded(tiny, activations="int8-sym-tensor-static")
    sizes = []
    for one in (subject, symmetric):
        assert one.quantized is not None
        manifest = one.quantized.manifest
        demand = demand_of(manifest, one.model, one.plugins, tiny.statistics.manifest)
        assert demand is not None
        assert demand.disk == sum(slot.nbytes for slot in one.quantized.header.slots.values())
        sizes.append(stored_bytes(one.quantized.header.slots)["inputs"])
    sites = len({linear.reads for linear in subject.linears})
    assert sizes == [5 * sites, 4 * sites]
