"""Quantized outputs in compressed-tensors checkpoints: what transformers executes, and what is read again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, fake_quantize
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.artifacts.store import Artifact
from qtool.builtin.exporters.awq import AWQ
from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.gptq import GPTQ
from qtool.builtin.exporters.hf import HuggingFace
from qtool.builtin.exporters.modelopt import ModelOpt
from qtool.builtin.exporters.packed_source import open_packed
from qtool.consumers.checkpoint import read_checkpoint
from qtool.engine.execute import BlockExecutable
from qtool.engine.exporter import Exporter
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, SchemeError
from qtool.steps.calibrate import CalibrateRequest, calibrate
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.testing import TinyModel, tiny_model
from tests.builtin.packed import written

CPU = torch.device("cpu")
ROWS, STATIC, ZERO = "int8-sym-channel-sbf16", "int8-tensor-static", "int8-asym-tensor-static"
FOUR = "int4-sym-g16-sbf16"
HELD = [
    (ROWS, "int8-sym-token-sfp32-half", "int8-sym-token-sfp32-half"),
    (ROWS, STATIC, STATIC),
    (FOUR, STATIC, STATIC),
    (FOUR, "none", ZERO),
    (FOUR, "none", "int8-asym-token-sfp32"),
    (FOUR, "none", "int4-asym-g16-sfp32"),
    (FOUR, "none", "int8-sym-tensor-sfp32-half"),
    (FOUR, "none", "fp4-g16-sfp32"),
    (FOUR, "none", "nvfp4"),
    ("fp8-channel-sbf16", "fp8-token", "fp8-tensor-static"),
    ("fp8-channel-sbf16", "fp8-token", "fp8-g16"),
]
"""Weights, activations and outputs, of every kind of scales that the library fits or reads."""


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("qwen2", hidden_size=32, intermediate_size=48) as model:  # with biases, in front of the rounding
        yield model


@pytest.fixture(scope="module")
def statistics(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Of the model stored in 16 bits, so that a checkpoint rounds nothing else."""
    root = tmp_path_factory.mktemp("half")
    folder, text = root / "half", root / "text.txt"
    shutil.copytree(tiny.path, folder)
    AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.bfloat16).save_pretrained(folder)
    text.write_text("seven boxes of liquor jugs " * 40)
    asked = CalibrateRequest(str(folder), data=str(text), num_samples=6, seq_len=32, dtype="float32")
    return calibrate(asked, tiny.workspace)[0]


Made = Callable[..., Subject]


@pytest.fixture(scope="module")
def made(tiny: TinyModel, statistics: Artifact) -> Made:
    def found(weights: str, activations: str, outputs: str) -> Subject:
        parts = {"weights": weights, "activations": activations, "outputs": outputs}
        scheme = read_scheme("", parts, tiny.workspace.plugins)
        artifact, _ = mitigate(MitigateRequest(str(statistics.path), "rtn", scheme, dtype="float32"), tiny.workspace)
        return open_subject(str(artifact.path), tiny.workspace).subject

    return found


def said(checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    return config


def rewritten(checkpoint: Path, **changes: object) -> None:
    """Change what the first group says of outputs."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["output_activations"].update(changes)
    path.write_text(json.dumps(config))


def altered(checkpoint: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name].float(), other[name].float()) for name in one)


@pytest.mark.parametrize(("weights", "activations", "outputs"), HELD)
def test_transformers_rounds_them_as_qtool_does_and_they_are_read_again(
    made: Made, cache: Path, tmp_path: Path, weights: str, activations: str, outputs: str
) -> None:
    subject, checkpoint = made(weights, activations, outputs), tmp_path / "out"
    exported = written(CompressedTensors(), subject, checkpoint)
    assert " outputs per " in exported.consumers["transformers"]
    window = torch.randint(97, 123, (1, 12), generator=torch.Generator().manual_seed(1))
    ((_, ours),) = BlockExecutable(subject, device=CPU, dtype=torch.float32, batch=1).forward_windows(window)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(window).logits, ours, rtol=0, atol=2e-6)
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                module.quantization_scheme.output_activations = None
        assert (model(window).logits - ours).abs().max() > 1e-2
    read = open_packed(checkpoint, subject.plugins, cache=cache)
    own = read.scheme.outputs
    assert own is not None
    assert subject.scheme.outputs is not None
    assert own.format.removeprefix("nv") == subject.scheme.outputs.format.removeprefix("nv")
    written(CompressedTensors(), read, tmp_path / "again")
    assert same(*(load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "again")))
    assert said(checkpoint) == said(tmp_path / "again")


@pytest.mark.parametrize("outputs", [STATIC, ZERO, "fp8-tensor-static", "int4-asym-tensor-static"])
def test_what_is_calibrated_is_stored_as_the_library_reads_it(made: Made, tmp_path: Path, outputs: str) -> None:
    subject, checkpoint = made(FOUR, "none", outputs), tmp_path / "out"
    written(CompressedTensors(), subject, checkpoint)
    (group,) = said(checkpoint)["config_groups"].values()
    assert group["output_activations"]["dynamic"] is False
    assert group["output_activations"]["strategy"] == "tensor"
    arguments = QuantizationScheme(targets=["Linear"], output_activations=group["output_activations"])
    stored = load_file(checkpoint / "model.safetensors")
    assert subject.quantized is not None
    assert arguments.output_activations is not None
    for linear in subject.linears:
        scale, zero = stored[f"{linear.name}.output_scale"], stored.get(f"{linear.name}.output_zero_point")
        assert (scale.dtype, scale.shape) == (torch.float32, (1,))
        assert (zero is None) == ("asym" not in outputs)
        x = torch.randn(64, subject.shape(linear)[0], generator=torch.Generator().manual_seed(2)) * float(scale) * 99
        rounding = subject.rounding(linear.layer, f"out.{linear.spec.module}", CPU)
        assert rounding is not None
        assert torch.equal(fake_quantize(x, scale, zero, arguments.output_activations), rounding(x))


def test_bytes_of_scales_count_but_not_as_the_linears(made: Made, tmp_path: Path) -> None:
    sizes = {}
    for outputs in ("none", STATIC, ZERO):
        exported = written(CompressedTensors(), made(FOUR, "none", outputs), tmp_path / outputs)
        sizes[outputs] = exported.details["bytes"]
    linears = len(made(FOUR, "none", "none").linears)
    for outputs, each in ((STATIC, 4), (ZERO, 5)):
        assert sizes[outputs]["parts"]["inputs"] == each * linears
        assert sizes[outputs]["linears"] == sizes["none"]["linears"]
        assert sizes[outputs]["model"] == sizes["none"]["model"] + each * linears


@pytest.mark.parametrize("leaf", ["output_scale", "output_zero_point"])
def test_another_value_is_noticed(made: Made, tmp_path: Path, leaf: str) -> None:
    subject, checkpoint = made(FOUR, "none", ZERO), tmp_path / "out"
    written(CompressedTensors(), subject, checkpoint)
    name = f"{subject.linears[-1].name}.{leaf}"
    altered(checkpoint, lambda held: held.update({name: held[name] + 1}))
    with pytest.raises(ArtifactError, match=leaf.replace("_", " ")):
        CompressedTensors().verify(subject, checkpoint)


def test_another_divisor_is_noticed(made: Made, tmp_path: Path) -> None:
    subject, checkpoint = made(FOUR, "none", "nvfp4"), tmp_path / "out"
    written(CompressedTensors(), subject, checkpoint)
    name = f"{subject.linears[0].name}.output_global_scale"
    altered(checkpoint, lambda held: held.update({name: held[name] * 2}))
    with pytest.raises(ArtifactError, match="output global scale"):
        CompressedTensors().verify(subject, checkpoint)


class TestReading:
    @pytest.fixture
    def checkpoint(self, made: Made, tmp_path: Path) -> Path:
        written(CompressedTensors(), made(FOUR, "none", STATIC), tmp_path / "out")
        return tmp_path / "out"

    @pytest.mark.parametrize(
        "changes",
        [
            {"strategy": "channel"},
            {"strategy": "group", "group_size": 16},
            {"strategy": "block", "block_structure": [16, 16]},
        ],
    )
    def test_static_scales_that_the_library_does_not_apply(
        self, tiny: TinyModel, checkpoint: Path, cache: Path, changes: dict[str, object]
    ) -> None:
        rewritten(checkpoint, **changes)
        with pytest.raises(SchemeError, match="quantized outputs with scales that qtool does not have there"):
            open_packed(checkpoint, tiny.workspace.plugins, cache=cache)

    def test_scales_that_no_config_speaks_of(self, tiny: TinyModel, checkpoint: Path, cache: Path) -> None:
        path = checkpoint / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"]["config_groups"]["group_0"]["output_activations"] = None
        path.write_text(json.dumps(config))
        with pytest.raises(ArtifactError, match="more than codes and scales") as refused:
            open_packed(checkpoint, tiny.workspace.plugins, cache=cache)
        assert "output_scale" in str(refused.value.facts)

    def test_scales_of_one_linear_each_stay_its_own(self, tiny: TinyModel, checkpoint: Path, cache: Path) -> None:
        """qtool's share theirs where engines fuse, and other tools' need not."""
        altered(
            checkpoint, lambda held: held.update({n: held[n] * 3 for n in held if n.endswith("k_proj.output_scale")})
        )
        read = open_packed(checkpoint, tiny.workspace.plugins, cache=cache)
        assert read.quantized is not None
        query, key = (f"layers.0.out.self_attn.{one}_proj.input_global_scale" for one in "qk")
        assert float(read.quantized.tensor(key)) == 3 * float(read.quantized.tensor(query))

    def test_zero_points_of_symmetric_ones(self, tiny: TinyModel, checkpoint: Path, cache: Path) -> None:
        def zeros(value: int) -> Callable[[dict[str, Tensor]], None]:
            def change(held: dict[str, Tensor]) -> None:
                names = [name for name in held if name.endswith(".output_scale")]
                zero = torch.full((1,), value, dtype=torch.int8)
                held.update({name.replace("_scale", "_zero_point"): zero.clone() for name in names})

            return change

        altered(checkpoint, zeros(0))
        read = open_packed(checkpoint, tiny.workspace.plugins, cache=cache)
        assert str(read.scheme.outputs) == "int8-sym-tensor-sfp32-static"
        altered(checkpoint, zeros(1))
        with pytest.raises(ArtifactError, match="outputs with zero points") as refused:
            open_packed(checkpoint, tiny.workspace.plugins, cache=cache)
        assert refused.value.hint.endswith("--outputs fp8-tensor-static")

    def test_zero_points_that_lack(self, tiny: TinyModel, checkpoint: Path, cache: Path) -> None:
        rewritten(checkpoint, symmetric=False)
        with pytest.raises(ArtifactError, match="outputs have calibrated zero points"):
            open_packed(checkpoint, tiny.workspace.plugins, cache=cache)

    def test_scales_that_lack(self, tiny: TinyModel, checkpoint: Path, cache: Path) -> None:
        altered(checkpoint, lambda held: held.pop(next(name for name in held if name.endswith(".output_scale"))))
        read = open_packed(checkpoint, tiny.workspace.plugins, cache=cache)
        with pytest.raises(Exception, match="the outputs were not calibrated"):
            CompressedTensors().check(read)

    def test_what_a_doctor_sees(self, checkpoint: Path) -> None:
        (case,) = read_checkpoint(checkpoint, lambda _: 8)
        found = (case.outputs, case.output_bits, case.output_type, case.output_symmetric, case.output_strategy)
        assert found == ("static", 8, "int", True, "tensor")


@pytest.mark.parametrize(
    ("outputs", "nearest"),
    [
        ("int8-token", "int8-sym-token-sfp32-half"),
        ("int8-token-sfp32", "int8-sym-token-sfp32-half"),
        ("int8-asym-token-sfp32-real", "int8-asym-token-sfp32"),
        ("nf4-g16", "fp8-tensor-static"),
        ("int8-token-sfp32-half-c0.9", "int8-sym-token-sfp32-half"),
        ("int8-token-c0.9", "int8-sym-token-sfp32-half"),
        ("int8-tensor-static-narrow", "int8-sym-tensor-sbf16-full-static"),
    ],
)
def test_what_the_library_does_not_fit_names_the_nearest(made: Made, outputs: str, nearest: str) -> None:
    with pytest.raises(SchemeError) as refused:
        CompressedTensors().check(made(FOUR, "none", outputs))
    assert refused.value.hint == f"nearest that fits: --outputs {nearest}"
    CompressedTensors().check(made(FOUR, "none", nearest))


@pytest.mark.parametrize(
    ("exporter", "weights", "activations"),
    [(ModelOpt(), "fp8-channel-sbf16", "fp8-token"), (GPTQ(), FOUR, "none"), (AWQ(), "int4-asym-g16-sbf16", "none")],
)
def test_layouts_without_them_name_what_they_carry(
    made: Made, exporter: Exporter, weights: str, activations: str
) -> None:
    subject = made(weights, activations, "fp8-token")
    with pytest.raises(SchemeError) as refused:
        exporter.check(subject)
    assert "outputs" in str(refused.value.facts)
    assert refused.value.hint.startswith(f"nearest that fits: --weights {weights}")
    assert "--outputs" not in refused.value.hint
    assert "--to compressed-tensors, which keeps these numbers" in refused.value.hint


def test_decoded_checkpoints_say_what_is_lost(made: Made, tmp_path: Path) -> None:
    exported = written(HuggingFace(), made(FOUR, "none", "fp8-token"), tmp_path / "out")
    assert "(without the fp8 outputs of the artifact)" in exported.consumers["transformers"]
