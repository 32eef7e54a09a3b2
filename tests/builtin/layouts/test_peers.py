"""AutoRound and AutoAWQ unpack GPTQ and AWQ checkpoints to the values that qtool decodes.

Both are installed without what they depend on into a folder of their own, which only the subprocess sees: their
unpackers need torch, which is there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtool.builtin.exporters.awq import AWQ
from qtool.builtin.exporters.gptq import GPTQ, GPTQv2
from qtool.engine.exporter import Exporter
from tests.builtin.layouts.conftest import Make
from tests.builtin.packed import written

pytestmark = [pytest.mark.slow, pytest.mark.network]
PEERS = ("auto-round==0.16.1", "py-cpuinfo==9.0.0", "autoawq==0.2.9")
# Their linears multiply an identity matrix, with scales in float32 so that nothing is rounded.
GPTQ_READER = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
directory = Path(sys.argv[1])
said = json.loads((directory / "config.json").read_text())["quantization_config"]
if said["checkpoint_format"] == "gptq":
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
else:
    from auto_round_extension.torch.qlinear_torch import QuantLinear
stored, read = load_file(directory / "model.safetensors"), {}
for name in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
    n_in, n_out = stored[name + ".g_idx"].numel(), stored[name + ".scales"].shape[1]
    linear = QuantLinear(said["bits"], said["group_size"], n_in, n_out, bias=False)
    linear.load_state_dict({leaf: stored[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales")})
    linear.post_init()
    linear.scales = linear.scales.float()
    read[name] = linear(torch.eye(n_in)).T.contiguous()
save_file(read, sys.argv[2])
"""
AWQ_READER = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from awq.utils.packing_utils import dequantize_gemm
directory = Path(sys.argv[1])
said = json.loads((directory / "config.json").read_text())["quantization_config"]
assert said["version"] == "gemm"
stored, read = load_file(directory / "model.safetensors"), {}
for name in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
    weight, zeros, scales = (stored[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales"))
    size = len(weight) if said["group_size"] == -1 else said["group_size"]
    read[name] = dequantize_gemm(weight, zeros, scales.float(), said["bits"], size).T.contiguous()
save_file(read, sys.argv[2])
"""


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *PEERS)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("exporter", "weights", "reader"),
    [
        *((GPTQ(), f"int{bits}-sym-g32-signed_full", GPTQ_READER) for bits in (2, 3, 4, 8)),
        *((GPTQv2(), f"int{bits}-asym-g32", GPTQ_READER) for bits in (2, 3, 4, 8)),
        (GPTQv2(), "int4-sym-channel", GPTQ_READER),
        (AWQ(), "int4-asym-g32", AWQ_READER),
        (AWQ(), "int4-sym-channel", AWQ_READER),
        (AWQ(), "int4-sym-g32-signed_full", AWQ_READER),
    ],
)
def test_another_library_reads_our_values(
    make: Make, peers: Path, tmp_path: Path, exporter: Exporter, weights: str, reader: str
) -> None:
    subject = make(weights)
    written(exporter, subject, tmp_path / "out")
    environment = {**os.environ, "PYTHONPATH": str(peers)}
    command = (sys.executable, "-c", reader, tmp_path / "out", tmp_path / "read.safetensors")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    read = load_file(tmp_path / "read.safetensors")
    linears = subject.model.graph.linears
    assert read.keys() == {linear.name for linear in linears}
    for linear in linears:
        assert torch.equal(read[linear.name], subject.linear(linear).weight(subject.weight_grid(linear))), linear.name
