"""Where a consumer's package is installed its own code reads a checkpoint back, in a process of its own."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.builtin.exporters import consumer_process, modelopt
from qtool.builtin.exporters.awq import AWQ
from qtool.builtin.exporters.gptq import GPTQ
from qtool.builtin.exporters.hf import HuggingFace
from qtool.builtin.exporters.modelopt import ModelOpt
from qtool.builtin.exporters.peft import PEFT
from qtool.builtin.exporters.read_back import telling_rows
from qtool.engine.exporter import Exporter
from qtool.errors import ArtifactError
from tests.builtin.layouts.conftest import NAME, Make, altered
from tests.builtin.packed import written

FP8 = """
import os, sys
print("a banner")
print("a warning", file=sys.stderr)
os.environ["LOUD"] = "1"


class FP8QTensor:
    def __init__(self, shape, dtype, weight):
        self.weight = weight

    def dequantize(self, dtype, scale):
        {body}


NVFP4QTensor = None
"""
DECODE = "return self.weight.to(dtype) * scale"


def install(folder: Path, body: str) -> None:
    """Lay out what is called nvidia-modelopt and decodes FP8 as told."""
    module = folder / "modelopt" / "torch" / "quantization" / "qtensor.py"
    module.parent.mkdir(parents=True)
    module.write_text(FP8.format(body=body))
    about = folder / "nvidia_modelopt-9.8.7.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: nvidia-modelopt\nVersion: 9.8.7\n")


@pytest.mark.parametrize(
    ("exporter", "weights", "inputs", "package"),
    [
        (GPTQ(), "int4-sym-g32", "", "gptqmodel"),
        (AWQ(), "int4-asym-g32", "", "gptqmodel"),
        (ModelOpt(), "fp8-channel", "fp8-token", "nvidia-modelopt"),
    ],
)
def test_who_reads_where_nothing_is_installed_is_said(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    exporter: Exporter,
    weights: str,
    inputs: str,
    package: str,
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(consumer_process, "version", missing)
    monkeypatch.setattr(consumer_process.subprocess, "Popen", None)  # nothing is started
    subject = make(weights, inputs)
    written(exporter, subject, tmp_path / "out")
    assert exporter.verify(subject, tmp_path / "out") == f"qtool's own reader: {package} is not installed"


def test_a_package_decodes_what_is_on_disk_and_nothing_of_it_reaches_this_process(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path / "site", DECODE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    subject = make("fp8-channel", "fp8-token")
    written(ModelOpt(), subject, tmp_path / "out")
    capfd.readouterr()
    monkeypatch.setattr(modelopt, "_compare", lambda *_: None)  # not our own reader
    assert ModelOpt().verify(subject, tmp_path / "out") == "nvidia-modelopt 9.8.7"
    assert capfd.readouterr() == ("", "")
    assert "LOUD" not in os.environ
    assert "modelopt.torch" not in sys.modules
    row = telling_rows(subject.packed(subject.model.graph.linear(NAME)), 1)[-1].start

    def change(tensor: Tensor) -> Tensor:
        tensor.view(torch.uint8)[row, 5] ^= 1
        return tensor

    altered(tmp_path / "out", f"{NAME}.weight", change)
    with pytest.raises(ArtifactError, match=f"`{NAME}` that was written is not"):
        ModelOpt().verify(subject, tmp_path / "out")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise TypeError('scale is\\nnot its name')", "(?m)TypeError: scale is$"),
        ("os._exit(3)", "(?m)its process ended$"),
        ("return (self.weight.to(dtype) * scale).T", "read back +"),
    ],
)
def test_a_package_that_cannot_read_it_is_an_error(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, reason: str
) -> None:
    subject = make("fp8-channel", "fp8-token")
    written(ModelOpt(), subject, tmp_path / "out")
    install(tmp_path / "site", body)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(ArtifactError, match=reason) as refused:
        ModelOpt().verify(subject, tmp_path / "out")
    assert "`model.layers.0.self_attn.q_proj`" in refused.value.message
    assert refused.value.hint.startswith("pack again; ")


def test_a_package_that_does_not_start_leaves_it_to_our_reader(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    subject = make("fp8-channel", "fp8-token")
    written(ModelOpt(), subject, tmp_path / "out")
    install(tmp_path / "site", "return")
    (tmp_path / "site" / "modelopt" / "torch" / "quantization" / "qtensor.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert ModelOpt().verify(subject, tmp_path / "out") == (
        "qtool's own reader: nvidia-modelopt 9.8.7 did not open it"
        " (ModuleNotFoundError: No module named 'nowhere_to_be_found')"
    )


def test_a_package_that_hangs_leaves_it_to_our_reader(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    subject = make("fp8-channel", "fp8-token")
    written(ModelOpt(), subject, tmp_path / "out")
    install(tmp_path / "site", "return")
    (tmp_path / "site" / "modelopt" / "torch" / "quantization" / "qtensor.py").write_text("import time; time.sleep(99)")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(consumer_process, "_PATIENCE", 0.5)
    assert ModelOpt().verify(subject, tmp_path / "out").endswith(" did not open it (it did not answer for 0.5 s)")


@pytest.mark.slow
def test_the_scale_of_an_adapter_is_what_peft_loads(make: Make, tmp_path: Path) -> None:
    subject = make("int3-sym-g32", method="rtn+lorc")
    pytest.importorskip("peft")
    written(PEFT(), subject, tmp_path / "out")
    assert PEFT().verify(subject, tmp_path / "out").endswith(f"; the adapter with peft {version('peft')}")
    file = tmp_path / "out" / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    with pytest.raises(ArtifactError, match="scale, as PEFT loads it"):
        PEFT().verify(subject, tmp_path / "out")


def test_transformers_says_what_it_loads_of_a_plain_checkpoint(make: Make, tmp_path: Path) -> None:
    subject = make("int4-sym-g32")
    written(HuggingFace(), subject, tmp_path / "out")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("transformers", "safetensors"))
    assert HuggingFace().verify(subject, tmp_path / "out") == libraries
    file = tmp_path / "out" / "config.json"
    text = file.read_text()
    config = json.loads(text)
    file.write_text(json.dumps(config | {"torch_dtype": "float32", "dtype": "float32"}))
    with pytest.raises(ArtifactError, match="in another dtype"):
        HuggingFace().verify(subject, tmp_path / "out")
    file.write_text(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"intermediate_size": 80}, "mismatched keys"), ({"num_hidden_layers": 3}, "missing keys")],
)
def test_transformers_misses_what_its_model_has(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, int], said: str
) -> None:
    subject = make("int4-sym-g32")
    written(HuggingFace(), subject, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    monkeypatch.setattr("qtool.builtin.exporters.read_back.CheckpointReader.compare", lambda *_, **__: None)
    with pytest.raises(ArtifactError, match=said):
        HuggingFace().verify(subject, tmp_path / "out")
