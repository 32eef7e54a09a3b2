"""Other libraries decode GPTQ, AWQ and ModelOpt checkpoints to the values that qtool decodes, every one of them.

GPTQModel, by which transformers loads them, and AutoRound unpack GPTQ; GPTQModel and AutoAWQ unpack AWQ; ModelOpt reads
its own. Each is installed without most of what it depends on into a folder of its own, which only its process sees:
their unpackers need torch, which is there. One process a library does all that it is asked for: it imports for long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.builtin.exporters import modelopt
from qtool.builtin.exporters.awq import AWQ
from qtool.builtin.exporters.gptq import GPTQ, GPTQv2
from qtool.builtin.exporters.modelopt import ModelOpt
from qtool.builtin.exporters.read_back import telling_rows
from qtool.builtin.exporters.words import IntegerWords
from qtool.engine.exporter import Exporter
from qtool.errors import ArtifactError
from tests.builtin.layouts.conftest import NAME, Make, altered
from tests.builtin.packed import written
from tests.builtin.reader_process import ReaderProcess

pytestmark = [pytest.mark.slow, pytest.mark.network]
PEERS = {
    "auto-round": ("auto-round==0.16.1", "py-cpuinfo==9.0.0"),
    "autoawq": ("autoawq==0.2.9",),
    "gptqmodel": (
        *("gptqmodel==7.7.0", "pypcre==0.6.4", "logbar==0.4.15"),
        *("device-smi==0.5.7", "tokenicer==0.0.14", "defuser==0.0.28"),
    ),
    "modelopt": (*("nvidia-modelopt==0.47.0", "omegaconf==2.4.0", "antlr4-python3-runtime==4.9.3", "pulp==3.3.2"),),
}
MODELOPT_READER = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
stored, read = load_file(Path(sys.argv[1]) / "model.safetensors"), {}
for name in [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]:
    weight, scale, second = (stored.get(f"{name}.{leaf}") for leaf in ("weight", "weight_scale", "weight_scale_2"))
    if second is None:
        scale = scale if scale.ndim == 0 else scale.unsqueeze(-1)
        read[name] = FP8QTensor(weight.shape, torch.float32, weight).dequantize(torch.float32, scale=scale)
    else:
        whole = NVFP4QTensor(torch.Size((len(weight), 2 * weight.shape[1])), torch.float32, weight)
        read[name] = whole.dequantize(torch.float32, scale=scale, double_scale=second, block_sizes={-1: 16})
save_file({name: weight.contiguous() for name, weight in read.items()}, sys.argv[2])
"""
GPTQMODEL_READER = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
directory = Path(sys.argv[1])
said = json.loads((directory / "config.json").read_text())["quantization_config"]
stored, read = load_file(directory / "model.safetensors"), {}
for name in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
    n_in, n_out = stored[name + ".g_idx"].numel(), stored[name + ".scales"].shape[1]
    linear = TorchLinear(said["bits"], said["group_size"], said["sym"], said["desc_act"], n_in, n_out).eval()
    linear.load_state_dict({leaf: stored[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")})
    if said["checkpoint_format"] == "gptq":
        convert_gptq_v1_to_v2_format_module(linear, said["bits"], torch.int32)
    linear.scales = linear.scales.float()
    read[name] = linear.dequantize_weight().T.contiguous()
save_file(read, sys.argv[2])
"""
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
from {package}.utils.packing_utils import dequantize_gemm
directory = Path(sys.argv[1])
said = json.loads((directory / "config.json").read_text())["quantization_config"]
assert said["version"] == "gemm"
stored, read = load_file(directory / "model.safetensors"), dict()
for name in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
    weight, zeros, scales = (stored[name + leaf] for leaf in (".qweight", ".qzeros", ".scales"))
    size = len(weight) if said["group_size"] == -1 else said["group_size"]
    read[name] = dequantize_gemm(weight, zeros, scales.float(), said["bits"], size).T.contiguous()
save_file(read, sys.argv[2])
"""

# What they pack of decoded weights, scales and zero points, given by name as ``weight``, ``scales`` and ``zeros``.
WRITER = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
given, said, made = load_file(sys.argv[1]), json.loads(sys.argv[3]), dict()
bits, size = said["bits"], said["group_size"]
{setup}
for name in [name.removesuffix(".weight") for name in given if name.endswith(".weight")]:
    weight, scales, zeros = (given[name + "." + leaf] for leaf in ("weight", "scales", "zeros"))
    n_out, n_in = weight.shape
    linear = torch.nn.Linear(n_in, n_out, bias=False)
    linear.weight.data = weight
    order = (torch.arange(n_in) // size).int()
    {pack}
    made |= {{name + "." + leaf: own.contiguous() for leaf, own in packed.state_dict().items()}}
save_file(made, sys.argv[2])
"""
WRITERS = {
    "auto-round": WRITER.format(
        setup="""if said["checkpoint_format"] == "gptq":
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
else:
    from auto_round_extension.torch.qlinear_torch import QuantLinear""",
        pack="""packed = QuantLinear(bits, size, n_in, n_out, bias=False)
    packed.device = "cpu"
    packed.pack(linear, scales, zeros, order, device="cpu")""",
    ),
    "gptqmodel": WRITER.format(
        setup="""from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module""",
        pack="""packed = TorchLinear(bits, size, said["sym"], False, n_in, n_out, bias=False)
    packed.pack_original(linear, scales, zeros, order)
    if said["checkpoint_format"] == "gptq":
        convert_gptq_v2_to_v1_format_module(packed, said)""",
    ),
    "autoawq": WRITER.format(
        setup="from awq.modules.linear.gemm import WQLinear_GEMM",
        pack="packed = WQLinear_GEMM.from_linear(linear, bits, size, scales=scales.T, zeros=zeros.T)",
    ),
}

# Runs what it is told to with the arguments that it is told, and says what went wrong.
PROCESS = """
import json, sys, traceback
for line in sys.stdin:
    script, *sys.argv[1:] = json.loads(line)
    wrong = ""
    try:
        exec(script, {"__name__": "__main__"})
    except BaseException:
        wrong = traceback.format_exc()
    print("\\nANSWER", json.dumps(wrong), flush=True)
"""


PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
Peer = Callable[[str], Path]
Told = Callable[..., None]
GPTQ_CASES = [
    *((GPTQ(), f"int{bits}-sym-g32-signed_full") for bits in (2, 3, 4, 8)),
    *((GPTQv2(), f"int{bits}-asym-g32") for bits in (2, 3, 4, 8)),
    (GPTQv2(), "int4-sym-channel"),
]
AWQ_CASES = [(AWQ(), weights) for weights in ("int4-asym-g32", "int4-sym-channel", "int4-sym-g32-signed_full")]
FP8_CASES = ["fp8-channel", "fp8-channel-sbf16", "fp8-tensor", "fp8-tensor-sbf16"]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    """Return what installs a library and says where."""

    @cache
    def installed(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        command = [*PIP, "--target", folder, *PEERS[name]]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr
        return folder

    return installed


@pytest.fixture(scope="module")
def told(peer: Peer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """Have a library's process run a script with arguments."""
    processes: dict[str, ReaderProcess] = {}

    def run(library: str, script: str, *arguments: str | Path) -> None:
        if library not in processes:
            environment = {**os.environ, "PYTHONPATH": str(peer(library))}
            log = tmp_path_factory.mktemp("log") / f"{library}.txt"
            processes[library] = ReaderProcess((sys.executable, "-c", PROCESS), environment, log)
        wrong = processes[library].ask([script, *map(str, arguments)], seconds=300)
        assert not wrong, wrong

    yield run
    for process in processes.values():
        process.close()


@pytest.mark.parametrize(
    ("library", "reader", "exporter", "weights"),
    [
        *(("auto-round", GPTQ_READER, *case) for case in GPTQ_CASES),
        *(("gptqmodel", GPTQMODEL_READER, *case) for case in GPTQ_CASES),
        *(("autoawq", AWQ_READER.format(package="awq"), *case) for case in AWQ_CASES),
        *(("gptqmodel", AWQ_READER.format(package="gptqmodel.quantization.awq"), *case) for case in AWQ_CASES),
        *(("modelopt", MODELOPT_READER, ModelOpt(), weights) for weights in ("nvfp4", "nvfp4-four_over_six")),
        *(("modelopt", MODELOPT_READER, ModelOpt(), weights) for weights in FP8_CASES),
    ],
)
def test_another_library_reads_our_values(
    make: Make, told: Told, tmp_path: Path, library: str, reader: str, exporter: Exporter, weights: str
) -> None:
    inputs = {"fp8-c": "fp8-token", "fp8-t": "fp8-tensor"}.get(weights[:5], "")
    subject = make(weights, inputs)
    written(exporter, subject, tmp_path / "out")
    told(library, reader, tmp_path / "out", tmp_path / "read.safetensors")
    read = load_file(tmp_path / "read.safetensors")
    linears = subject.model.graph.linears
    assert read.keys() == {linear.name for linear in linears}
    for linear in linears:
        assert torch.equal(read[linear.name], subject.linear(linear).weight(subject.weight_grid(linear))), linear.name


@pytest.mark.parametrize(
    ("library", "exporter", "weights"),
    [
        *(("auto-round", *case) for case in GPTQ_CASES if "channel" not in case[1]),
        *(("gptqmodel", *case) for case in GPTQ_CASES if "channel" not in case[1] and case[0].layout == "gptq_v2"),
        *(("autoawq", *case) for case in AWQ_CASES if "channel" not in case[1]),
    ],
)
def test_what_another_library_packs_is_read_code_for_code(
    make: Make, told: Told, tmp_path: Path, cache: Path, library: str, exporter: GPTQv2 | AWQ, weights: str
) -> None:
    subject = make(weights)
    written(exporter, subject, tmp_path / "out")
    given: dict[str, torch.Tensor] = {}
    for linear in subject.model.graph.linears:
        own = subject.packed(linear).parameters
        middle = torch.full_like(own.scale, 2 ** (subject.packed(linear).bits - 1))
        given[f"{linear.name}.weight"] = subject.linear(linear).weight(subject.weight_grid(linear))
        given[f"{linear.name}.scales"] = own.scale.clone()
        given[f"{linear.name}.zeros"] = middle if own.zero_point is None else own.zero_point
    save_file(given, tmp_path / "given.safetensors")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    files = (tmp_path / "given.safetensors", tmp_path / "made.safetensors")
    told(library, WRITERS[library], *files, json.dumps(said))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    theirs, parts = load_file(files[1]), (".qweight", ".qzeros", ".scales", ".g_idx")
    kept = {name: tensor for name, tensor in stored.items() if not name.endswith(parts)}
    save_file(kept | theirs, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    read = exporter.open(tmp_path / "out", subject.plugins, cache=cache)
    for linear in subject.model.graph.linears:
        ours, found = subject.packed(linear), read.packed(linear)
        assert torch.equal(ours.stream, found.stream), linear.name
        assert torch.equal(ours.parameters.scale, found.parameters.scale), linear.name
        zeros = ours.parameters.zero_point
        assert found.parameters.zero_point is None if zeros is None else torch.equal(zeros, found.parameters.zero_point)


@pytest.mark.parametrize(
    ("library", "exporter", "weights", "leaf"),
    [
        ("gptqmodel", GPTQ(), "int4-sym-g32-signed_full", "qweight"),
        ("gptqmodel", GPTQv2(), "int3-asym-g32", "scales"),
        ("gptqmodel", GPTQv2(), "int8-sym-channel", "qweight"),
        ("gptqmodel", AWQ(), "int4-asym-g32", "qzeros"),
        ("gptqmodel", AWQ(), "int4-sym-channel", "qweight"),
        ("modelopt", ModelOpt(), "nvfp4", "weight"),
        ("modelopt", ModelOpt(), "nvfp4", "weight_scale"),
        ("modelopt", ModelOpt(), "fp8-channel", "weight"),
        ("gptqmodel", GPTQv2(), "int4-sym-g32,*.down_proj=int8-sym-g32", "qweight"),
        ("modelopt", ModelOpt(), "fp8-tensor", "weight"),
    ],
)
def test_packing_has_it_read_back_and_a_wrong_byte_is_found_by_it(
    make: Make,
    peer: Peer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    library: str,
    exporter: Exporter,
    weights: str,
    leaf: str,
) -> None:
    subject = make(weights, {"fp8-c": "fp8-token", "fp8-t": "fp8-tensor"}.get(weights[:5], ""))
    written(exporter, subject, tmp_path / "out")
    monkeypatch.syspath_prepend(str(peer(library)))
    monkeypatch.setattr(IntegerWords, "_compare", lambda *_: None)  # not our own reader
    monkeypatch.setattr(modelopt, "_compare", lambda *_: None)
    name, _, release = PEERS[library][0].partition("==")
    assert exporter.verify(subject, tmp_path / "out") == f"{name} {release}"
    ours = subject.packed(subject.model.graph.linear(NAME))
    row, rows = telling_rows(ours, 1)[-1].start, len(ours.stream)

    def change(tensor: Tensor) -> Tensor:
        across = not isinstance(exporter, ModelOpt)
        along = tensor.T.contiguous() if across else tensor
        along[row * len(along) // rows].view(torch.uint8)[..., 0] ^= 3
        return along.T.contiguous() if across else along

    altered(tmp_path / "out", f"{NAME}.{leaf}", change)
    with pytest.raises(ArtifactError, match=f"`{NAME}` that was written is not"):
        exporter.verify(subject, tmp_path / "out")
