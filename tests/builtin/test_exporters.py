"""What a checkpoint's consumers read and execute is what qtool quantized and measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from qtool.artifacts.manifest import Manifest, Step
from qtool.artifacts.store import ArtifactWriter
from qtool.builtin.exporters import checkpoint, hf
from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.ct_config import quantization_config
from qtool.builtin.exporters.ct_layout import checkpoint_dtype, choose_layout
from qtool.builtin.exporters.ct_tensors import pack_words
from qtool.builtin.exporters.hf import HuggingFace, dense
from qtool.builtin.exporters.packed_source import open_packed
from qtool.builtin.exporters.shards import Shards
from qtool.builtin.formats.presets import PRESETS
from qtool.consumers.checkpoint import artifact_facts
from qtool.consumers.config import cases_of
from qtool.consumers.table import said
from qtool.engine.execute import BlockExecutable
from qtool.engine.exporter import Exporter
from qtool.engine.planner import extend
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, SchemeError, UsageError
from qtool.model.plan import Plan, Proposal
from qtool.numerics.hadamard import random_signs
from qtool.numerics.operators import Diag, Hadamard, Operator, Shift
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, TensorScheme, parse_tensor_scheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from tests.builtin.format_cases import read
from tests.builtin.packed import written

CPU = torch.device("cpu")
CODED = (("lorc.rank", "8"), ("lorc.dtype", "int8"), ("lorc.reads", "full"))
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
}
Make = Callable[..., Subject]


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return Plugins.discover()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models in bfloat16 with weights that spread, norms that are not ones and biases that are not zero."""
    folders = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        for key, parameter in model.named_parameters():
            plain = "norm" not in key and "bias" not in key
            parameter.data = parameter.data * 4 if plain else torch.rand_like(parameter) + 0.5
        folders[name] = tmp_path_factory.mktemp(name)
        model.to(torch.bfloat16).save_pretrained(folders[name])
        (folders[name] / "tokenizer.json").write_bytes(b'{"version": "1.0" }\r\n')
        (folders[name] / "LICENSE").write_text("as it is")
        (folders[name] / "training_args.bin").write_bytes(b"not for others")
    return folders


@pytest.fixture(scope="session")
def make(models: dict[str, Path], plugins: Plugins, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Make:
    """Make a subject quantized by rounding to nearest (or by another method); the same one is made once."""
    workspace = Workspace(plugins, tmp_path_factory.mktemp("home"), cache)

    @lru_cache
    def made(
        weights: str,
        activations: str = "",
        kv: str = "",
        *,
        model: str = "llama",
        method: str = "rtn",
        settings: tuple[tuple[str, str], ...] = (),
    ) -> Subject:
        scheme = ModelScheme(*(parsed(text, plugins) if text else None for text in (weights, activations, kv)))
        request = MitigateRequest(str(models[model]), method, scheme, dict(settings), dtype="float32")
        artifact, _ = mitigate(request, workspace)
        return open_subject(str(artifact.path), workspace).subject

    return made


def parsed(text: str, plugins: Plugins) -> TensorScheme:
    return parse_tensor_scheme(text, plugins.format)


def tokens() -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(5))


def measured(subject: Subject, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of qtool's own fake-quantized forward pass."""
    executable = BlockExecutable(subject, device=CPU, dtype=dtype, batch=2)
    return torch.cat([logits for _, logits in executable.forward_windows(tokens())]).double()


def executed(directory: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of the checkpoint as transformers loads it, window by window: a scale of all tokens is one of a window."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.no_grad():
        return torch.cat([model(window[None]).logits for window in tokens()]).double()


def without_activations(subject: Subject) -> Subject:
    return replace(subject, scheme=replace(subject.scheme, activations=None))


def with_input_scales(subject: Subject, scheme: TensorScheme, folder: Path, *, odd: str = "") -> Subject:
    """Return the subject with calibrated activations, as if statistics had been there.

    Args:
        subject: Quantized weights.
        scheme: Scheme of the activations.
        folder: For the artifact.
        odd: Name of a linear whose weight gets a global scale of its own.
    """
    assert subject.quantized is not None
    tensors = {name: subject.quantized.tensor(name) for name in subject.quantized.names()}
    sites = [linear.reads for linear in subject.model.graph.linears]
    tensors |= {f"{site}.input_global_scale": torch.tensor(0.0011 + 0.0001 * sites.index(site)) for site in set(sites)}
    if not scheme.symmetric:
        places = {site: sites.index(site) for site in set(sites)}
        tensors |= {f"{s}.input_zero_point": torch.tensor(90 + i, dtype=torch.uint8) for s, i in places.items()}
    if odd:
        tensors[f"{odd}.global_scale"] = tensors[f"{odd}.global_scale"] * 1.5
    new = replace(subject.scheme, activations=scheme)
    manifest = Manifest("quantized", Step("test", "", 1, "test"), {}, subject.model.id, "llama", new.to_json())
    folder.mkdir(exist_ok=True)
    writer = ArtifactWriter(folder / f"calibrated{odd}.safetensors", manifest)
    writer.begin()
    writer.add("all", tensors)
    return replace(subject, scheme=new, quantized=writer.finish(manifest))


WEIGHT_ONLY = (
    "int3-sym-g32",
    "int4-sym-g32",
    "int4-sym-channel-full",
    "int8-sym-channel",
    "fp8-channel-sbf16",
    "fp8-tensor",
    "fp8-b48-sbf16",
)


@pytest.mark.parametrize(("weights", "model"), [*zip(WEIGHT_ONLY, cycle(CONFIGS), strict=False)])
def test_transformers_computes_with_exactly_our_weights(make: Make, tmp_path: Path, weights: str, model: str) -> None:
    subject = make(weights, model=model)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    torch.testing.assert_close(executed(tmp_path / "out"), measured(subject), rtol=0, atol=1e-6)
    assert exported.consumers["transformers"].startswith(f"W{weights[3] if weights[0] == 'i' else 8}A16: ")


@pytest.mark.parametrize(
    ("weights", "model"),
    [
        *zip(("nvfp4", "mxfp4", "fp4-g16-se4m3", "int4-asym-g32", "int3-asym-channel"), cycle(CONFIGS), strict=False),
        *zip(("mxfp6_e2m3", "mxfp8", "fp6_e2m3-g32-se8m0-rceil", "fp8-g32-se8m0"), cycle(CONFIGS), strict=False),
    ],
)
def test_what_is_decoded_to_bfloat16_computes_the_same_in_bfloat16(
    make: Make, tmp_path: Path, weights: str, model: str
) -> None:
    subject = make(weights, model=model)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    ours = measured(subject, torch.bfloat16)
    assert (executed(tmp_path / "out", torch.bfloat16) - ours).abs().mean() < 0.001 * ours.abs().mean()
    assert exported.consumers["transformers"].startswith(f"W{read(weights)[0].bits}A16: activations are not")


@pytest.mark.parametrize(
    ("weights", "activations", "layout"),
    [
        ("int8-sym-channel", "int8-sym-token-sfp32-half", "int-quantized"),
        ("int4-sym-channel", "int4-asym-token-sfp32", "pack-quantized"),
        ("int4-sym-g32", "int8-asym-tensor-sfp32", "pack-quantized"),
        ("int8-sym-g32", "int8-sym-g32-sfp32-half", "pack-quantized"),
        *((f"int{bits}-sym-g32", "fp8-token", "pack-quantized") for bits in range(2, 9)),
        ("int4-sym-channel", "fp8-tensor", "pack-quantized"),
        ("int8-sym-channel", "fp8-g32", "pack-quantized"),
        ("fp8-channel-sbf16", "fp8-token", "float-quantized"),
        ("fp8-tensor", "fp8-tensor", "float-quantized"),
        ("fp8-b32-sbf16", "fp8-g32", "float-quantized"),
        ("fp8-b16x32-sbf16", "fp8-g32", "float-quantized"),
        ("fp8-b48x32", "fp8-g32", "float-quantized"),
    ],
)
def test_transformers_quantizes_activations_as_qtool_does(
    make: Make, tmp_path: Path, weights: str, activations: str, layout: str
) -> None:
    subject = make(weights, activations)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    ours, theirs, alone = measured(subject), executed(tmp_path / "out"), measured(without_activations(subject))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert (theirs - alone).abs().mean() > 1e-3
    assert exported.details["layout"] == layout
    assert exported.consumers["transformers"].startswith(f"W{weights[3] if weights[0] == 'i' else 8}A")
    assert f" {activations[:3].rstrip('8').upper()}" in exported.consumers["transformers"]
    fitted = "; scales of inputs are fitted in bfloat16, not float32" in exported.consumers["transformers"]
    assert fitted == activations.startswith("fp8")


@pytest.mark.parametrize(
    ("weights", "activations", "layout"),
    [
        ("int8-sym-channel", "int8-sym-tensor-sfp32-static", "int-quantized"),
        ("int8-sym-channel", "int8-sym-tensor-sfp32-full-c0.5-static", "int-quantized"),
        ("int8-sym-channel", "int8-asym-tensor-sfp32-static", "int-quantized"),
        ("int8-sym-tensor", "int8-asym-tensor-c0.5-static", "int-quantized"),
        ("fp8-channel-sbf16", "fp8-tensor-static", "float-quantized"),
        ("fp8-tensor", "fp8-tensor-static", "float-quantized"),
    ],
)
def test_transformers_quantizes_with_the_static_scales_that_were_found(
    make: Make, plugins: Plugins, tmp_path: Path, weights: str, activations: str, layout: str
) -> None:
    subject = with_input_scales(make(weights), parsed(activations, plugins), tmp_path)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    ours, theirs, alone = measured(subject), executed(tmp_path / "out"), measured(without_activations(subject))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert (theirs - alone).abs().mean() > 1e-3
    assert exported.details["layout"] == layout
    kind = "INT8" if layout == "int-quantized" else "FP8"
    assert exported.consumers["transformers"].startswith(f"W8A8: static {kind} activations per tensor")
    assert "W8A8" in exported.consumers["vllm"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    scales = {name: tensor for name, tensor in stored.items() if name.endswith(".input_scale")}
    assert len(scales) == 2 * 7
    for name, scale in scales.items():
        site = subject.model.graph.linear(name.removesuffix(".input_scale")).reads
        assert subject.quantized is not None
        assert scale.tolist() == [float(subject.quantized.tensor(f"{site}.input_global_scale"))]
        if "asym" in activations:
            zero = stored[name.replace("scale", "zero_point")]
            assert (zero.dtype, zero.tolist()) == (
                torch.int8,
                [int(subject.quantized.tensor(f"{site}.input_zero_point")) - 128],
            )


def test_a_static_scale_that_another_has_changed_is_noticed(make: Make, plugins: Plugins, tmp_path: Path) -> None:
    subject = with_input_scales(make("fp8-tensor"), parsed("fp8-tensor-static", plugins), tmp_path)
    written(CompressedTensors(), subject, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.input_scale"] *= 1.01
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"up_proj \(input scale\)"):
        CompressedTensors().verify(subject, tmp_path / "out")


@pytest.mark.parametrize(
    ("weights", "activations", "said"),
    [
        ("mxfp6_e2m3", "mxfp6_e2m3", "W6A6: dynamic FP6"),
        ("mxfp6_e2m3", "mxfp8-rceil", "W6A8: dynamic FP8"),
        ("mxfp8", "mxfp8-rceil", "W8A8: dynamic FP8"),
    ],
)
def test_transformers_quantizes_inputs_in_blocks_of_32(
    make: Make, tmp_path: Path, weights: str, activations: str, said: str
) -> None:
    subject = make(weights, activations)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    ours, theirs = measured(subject, torch.bfloat16), executed(tmp_path / "out", torch.bfloat16)
    alone = measured(without_activations(subject), torch.bfloat16)
    assert (theirs - ours).abs().mean() < 0.6 * (theirs - alone).abs().mean()
    assert exported.consumers["transformers"].startswith(f"{said} activations per group of 32")
    vllm = exported.consumers["vllm"]
    assert (
        "refused: floats of compressed-tensors have 4 or 8 bits there" in vllm if "fp6" in weights else "W8A16" in vllm
    )


FITTED = [("fp8-token", "token"), ("fp8-tensor", "tensor"), ("fp8-g16", "group of 16")]


@pytest.mark.parametrize(
    ("weights", "activations", "shared"),
    [
        *(("mxfp4", *one) for one in FITTED),
        *(("mxfp6_e2m3", *one) for one in FITTED),
        *(("mxfp8", *one) for one in FITTED[:2]),
    ],
)
def test_transformers_rounds_inputs_to_fp8_beside_blocks(
    make: Make, tmp_path: Path, weights: str, activations: str, shared: str
) -> None:
    """The library decodes blocks to bfloat16 as they first run; from then on all can be in float32, scales too."""
    subject = make(weights, activations)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        model(tokens()[:1])
        nn.Module.float(model)
        theirs = torch.cat([model(window[None]).logits for window in tokens()]).double()
    torch.testing.assert_close(theirs, measured(subject), rtol=0, atol=1e-6)
    assert (theirs - measured(without_activations(subject))).abs().mean() > 1e-3
    says = f"W{read(weights)[0].bits}A8: dynamic FP8 activations per {shared}, emulated in bfloat16; scales of inputs"
    assert exported.consumers["transformers"].startswith(says)


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_transformers_quantizes_fp4_activations(make: Make, plugins: Plugins, tmp_path: Path, fmt: str) -> None:
    subject = make(fmt, fmt) if fmt == "mxfp4" else with_input_scales(make(fmt), parsed(fmt, plugins), tmp_path)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    ours, theirs = measured(subject, torch.bfloat16), executed(tmp_path / "out", torch.bfloat16)
    alone = measured(without_activations(subject), torch.bfloat16)
    assert (theirs - ours).abs().mean() < 0.6 * (theirs - alone).abs().mean()
    assert exported.consumers["transformers"].startswith("W4A4: dynamic FP4 activations per group")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    weights = sum(tensor.nbytes for name, tensor in stored.items() if "_proj.weight" in name)
    assert exported.details["bytes"]["linears"] == weights
    assert exported.details["bytes"]["model"] == sum(t.nbytes for t in stored.values())


def test_transformers_does_not_quantize_activations_beside_asymmetric_weights(make: Make, tmp_path: Path) -> None:
    subject = make("int4-asym-g32", "int4-sym-token", "fp8-tensor")
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    alone = replace(subject, scheme=replace(subject.scheme, activations=None, kv=None))
    assert torch.equal(executed(tmp_path / "out", torch.bfloat16), measured(alone, torch.bfloat16))
    assert exported.consumers["transformers"].startswith("W4A16: activations are NOT quantized")
    assert "the KV cache is NOT quantized" in exported.consumers["transformers"]
    assert exported.consumers["vllm"].startswith("W4A16 on most kernels; W4A4 with")


@pytest.mark.parametrize(
    ("kv", "said", "group"),
    [
        ("fp8-tensor", "KV cache in FP8 with a dynamic scale", None),
        ("fp8-token-head", "KV cache in FP8 with a dynamic scale per group of 32", 32),
        ("int8-sym-tensor-sfp32-half", "KV cache in INT8 with a dynamic scale", None),
        ("int4-asym-token-head-sfp32", "KV cache in INT4 with a dynamic scale per group of 32, asymmetric", 32),
        ("int4-sym-g16-sfp32-half", "KV cache in INT4 with a dynamic scale per group of 16", 16),
    ],
)
def test_transformers_quantizes_the_cache_as_qtool_does(
    make: Make, tmp_path: Path, kv: str, said: str, group: int | None
) -> None:
    subject = make("int4-sym-g32", kv=kv)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    plain = measured(replace(subject, scheme=replace(subject.scheme, kv=None)))
    torch.testing.assert_close(executed(tmp_path / "out"), measured(subject), rtol=0, atol=1e-6)
    assert (executed(tmp_path / "out") - plain).abs().mean() > 1e-3
    assert f"; {said} (" in exported.consumers["transformers"]
    assert ("refused" in exported.consumers["vllm"]) == (kv != "fp8-tensor")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["group_size"] == group
    same = subject.scheme.keys if group is None else replace(subject.scheme.keys, strategy="group", group_size=group)
    assert open_packed(tmp_path / "out", subject.plugins, cache=tmp_path).scheme.kv == same


def test_float32_scales_are_said_to_be_rounded_and_are(make: Make, tmp_path: Path) -> None:
    subject = make("fp8-channel")
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    assert "fp32 scales are rounded to bfloat16" in exported.consumers["transformers"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    name = "model.layers.0.mlp.up_proj"
    stored = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight_scale"]
    assert stored.dtype == torch.float32
    assert torch.equal(loaded.get_submodule(name).weight_scale, stored.bfloat16())
    assert not torch.equal(stored.bfloat16().float(), stored)


SYMMETRIC = [f"int{bits}-sym-{'channel' if bits % 2 else 'g32'}" for bits in range(2, 9)]
ASYMMETRIC = ["int4-asym-g32", "int3-asym-channel", "int5-asym-g16", "int8-asym-channel"]


FLOATS = ["nvfp4", "mxfp4", "mxfp6_e2m3", "mxfp8", "fp8-tensor", "fp8-channel", "fp8-g32", "fp8-b48"]


@pytest.mark.parametrize("weights", [*SYMMETRIC, *ASYMMETRIC, *FLOATS])
def test_the_bytes_are_those_that_the_library_writes(
    make: Make, plugins: Plugins, tmp_path: Path, weights: str
) -> None:
    """The library compresses our decoded weights to the tensors that we wrote from codes."""
    subject = make(weights)
    written(CompressedTensors(), subject, tmp_path / "out")  # which decodes them with the library, too
    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    assert subject.scheme.weights is not None
    for linear in subject.model.graph.linears[:7]:
        found = subject.linear(linear)
        (parameters,) = found.parameters
        decoded = found.weight(subject.weight_grid(linear))
        given = {"weight": decoded, "weight_scale": parameters.scale[:: 48 if "b48" in weights else 1]}
        if parameters.zero_point is not None:
            given["weight_zero_point"] = (parameters.zero_point - 2 ** (int(weights[3]) - 1)).to(torch.int8)
        if parameters.global_scale is not None:
            given["weight_global_scale"] = 1 / parameters.global_scale.reshape(1)
        for leaf, tensor in compressor.compress(given, scheme).items():
            mine = stored[f"{linear.name}.{leaf}"]
            if leaf == "weight_scale" and mine.is_floating_point():
                assert torch.equal(mine.float(), tensor.float())
            elif leaf == "weight_packed" and "p4" in weights:
                assert torch.equal(without_negative_zeros(mine), without_negative_zeros(tensor)), leaf
            else:
                assert mine.dtype == tensor.dtype
                assert torch.equal(mine, tensor), leaf


def without_negative_zeros(packed: Tensor) -> Tensor:
    low, high = packed & 0xF, packed >> 4
    return torch.stack((low * (low != 8), high * (high != 8)))


@pytest.mark.parametrize(("rows", "n", "bits"), [(3, 10, 3), (1, 1, 8), (2, 33, 5), (4, 64, 4)])
def test_words_hold_codes_from_the_lowest_bit_on(rows: int, n: int, bits: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    words = pack_words(codes, bits)
    assert words.shape == (rows, -(-n * bits // 32))
    for row in range(rows):
        stream = int.from_bytes(words[row].numpy().tobytes(), "little")
        assert [stream >> (bits * i) & (2**bits - 1) for i in range(n)] == codes[row].tolist()
        assert stream >> (bits * n) == 0


W4A4_SYM = next(preset for preset in PRESETS if preset.name == "W4A4_SYM")


LIBRARY = [
    *((f"W{bits}A16", f"int{bits}-sym-g128", "") for bits in range(2, 9)),
    *((f"W{bits}A8", f"int{bits}-sym-g128", "int8-sym-token") for bits in range(2, 8)),
    *((f"W{bits}A4", f"int{bits}-sym-g128", "int4-sym-token") for bits in range(2, 5)),
    ("W4A16_ASYM", "int4-asym-g128", ""),
    ("W4AFP8", "int4-sym-g128", "fp8-token"),
    ("W8A8", "int8-sym-channel", "int8-sym-token"),
    ("INT8", "int8-sym-channel", "int8-sym-token"),
    ("W4A4", W4A4_SYM.weights, W4A4_SYM.activations),
    ("FP8", "fp8-tensor", "fp8-tensor-static"),
    ("FP8_DYNAMIC", "fp8-channel", "fp8-token"),
    ("NVFP4", "nvfp4", "nvfp4"),
    ("NVFP4A16", "nvfp4", ""),
    ("MXFP4", "mxfp4", "mxfp4"),
    ("MXFP4A16", "mxfp4", ""),
    ("MXFP4XFP8", "mxfp4", "fp8-g128"),
    ("MXFP6A16", "mxfp6_e2m3", ""),
    ("MXFP6A8", "mxfp6_e2m3", "mxfp8-rceil"),
    ("MXFP8", "mxfp8", "mxfp8-rceil"),
    ("MXFP8A16", "mxfp8", ""),
    ("FP8_BLOCK", "fp8-b128", "fp8-g128"),
]


def test_every_preset_of_the_library_is_compared() -> None:
    assert {preset for preset, _, _ in LIBRARY} == PRESET_SCHEMES.keys() - {"UNQUANTIZED"}


@pytest.mark.parametrize(("preset", "weights", "activations"), LIBRARY)
def test_the_config_says_what_the_librarys_presets_say(
    plugins: Plugins, preset: str, weights: str, activations: str
) -> None:
    scheme = ModelScheme(*(parsed(text, plugins) if text else None for text in (weights, activations)))
    config = quantization_config(scheme, choose_layout(scheme), ["lm_head"])
    ours = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    theirs = preset_name_to_scheme(preset, ["Linear"])
    for mine, other in ((ours.weights, theirs.weights), (ours.input_activations, theirs.input_activations)):
        assert (mine is None) == (other is None)
        fields = (
            "num_bits",
            "type",
            "symmetric",
            "strategy",
            "group_size",
            "block_structure",
            "dynamic",
            "scale_dtype",
        )
        for name in fields:
            assert getattr(mine, name, None) == getattr(other, name, None), name
    assert config["format"] == config["config_groups"]["group_0"]["format"] == ours.format


def test_int4_is_packed_whatever_the_activations_where_the_library_would_not(make: Make, tmp_path: Path) -> None:
    written(CompressedTensors(), make("int4-sym-channel", "int4-asym-token"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    group = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    assert config["format"] == group.format == "pack-quantized"
    assert infer_module_format(nn.Linear, group) == "int-quantized"
    assert config["ignore"] == ["lm_head"]


MXFP4_FROM_SM90 = (
    "W4A4 from SM100 on, whatever the config says of activations; before it W4A8 from SM90 on: dynamic FP8 activations "
    "per token, whatever the config says of activations; W4A16 with --linear-backend marlin, W4A4 with "
    "--linear-backend emulation; before it W4A16 from SM80 on"
)


@pytest.mark.parametrize(
    ("weights", "activations", "executed_by_vllm"),
    [
        ("int4-sym-g128", "", "W4A16: activations are not quantized (by"),
        ("int3-sym-g128", "", "W3A16: activations are not quantized; the kernel `humming` only"),
        ("int4-asym-g128", "", "W4A16: activations are not quantized (by"),
        ("int3-asym-g128", "", "W3A16: activations are not quantized; the kernel `humming` only"),
        ("int4-sym-g128", "int4-sym-token", "W4A16 on most kernels; W4A4 with --linear-backend humming"),
        ("int4-sym-channel", "int4-asym-token", "refused: it wants symmetric activations"),
        ("int4-sym-channel", "int6-sym-token", "refused: it wants symmetric activations of 4 or 8 bits"),
        (
            "int4-sym-g128",
            "fp8-token",
            "W4A8 from SM90",
        ),
        (
            "int4-sym-g32",
            "fp8-token",
            "from SM100 on refused: it has packed integers with FP8 activations on SM90 only; before it from SM90",
        ),
        (
            "int8-sym-channel",
            "int8-asym-token",
            "W8A8: dynamic INT8 activations per token, asymmetric; scales of inputs are fitted in float32, not rounded "
            "to bf16; from SM100 on refused: CUTLASS has no INT8 on SM100",
        ),
        ("int8-sym-channel", "int8-sym-tensor", "refused: it wants INT8 activations per token"),
        ("fp8-channel", "", "W8A16: activations are not quantized (by"),
        ("fp8-tensor", "fp8-tensor", "W8A8 from SM89 on: dynamic FP8 activations per token"),
        (
            "fp8-b128",
            "fp8-g128",
            "W8A8 from SM90 on: dynamic FP8 activations per group of 128; before it W8A16 from SM89 on",
        ),
        ("nvfp4", "", "W4A16: activations are not quantized (by"),
        ("nvfp4", "nvfp4", "W4A4 from SM100 on; before it W4A16, unless --linear-backend emulation"),
        ("mxfp4", "", f"{MXFP4_FROM_SM90}; before it refused"),
        ("mxfp4", "mxfp4", f"{MXFP4_FROM_SM90}, unless --linear-backend emulation"),
    ],
)
def test_what_vllm_does_with_a_scheme_is_said(
    plugins: Plugins, weights: str, activations: str, executed_by_vllm: str
) -> None:
    scheme = ModelScheme(*(parsed(text, plugins) if text else None for text in (weights, activations)))
    config = quantization_config(scheme, choose_layout(scheme), ())
    told = said(cases_of(config, **artifact_facts(scheme, dtype=torch.bfloat16)))["vllm"]
    assert told.startswith(executed_by_vllm)
    assert told.endswith("(by the code of vLLM 0.33, not run)")


def altered(directory: Path, name: str, change: Callable[[Tensor], Tensor] | None) -> None:
    """Rewrite the weights of a checkpoint with one tensor changed, or without it."""
    tensors = load_file(directory / "model.safetensors")
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor.clone())
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def flipped(tensor: Tensor) -> Tensor:
    """Change one bit."""
    flat = tensor.contiguous().view(torch.uint8).reshape(-1)
    flat[7] ^= 1
    return tensor


@pytest.mark.parametrize(
    ("weights", "leaf"),
    [
        ("int4-sym-g32", "weight_packed"),
        ("int4-sym-g32", "weight_scale"),
        ("int3-asym-g32", "weight_zero_point"),
        ("int8-sym-channel", "weight_packed"),
        ("fp8-channel", "weight"),
        ("nvfp4", "weight_packed"),
        ("mxfp4", "weight_scale"),
        ("mxfp6_e2m3", "weight_packed"),
        ("mxfp6_e2m3", "weight_scale"),
        ("mxfp8", "weight"),
        ("mxfp8", "weight_scale"),
    ],
)
def test_one_wrong_bit_is_found_and_named(make: Make, tmp_path: Path, weights: str, leaf: str) -> None:
    subject, name = make(weights), "model.layers.1.self_attn.v_proj"
    written(CompressedTensors(), subject, tmp_path / "out")
    altered(tmp_path / "out", f"{name}.{leaf}", flipped)
    with pytest.raises(ArtifactError, match=f"the weight of `{name}` that was written is not"):
        CompressedTensors().verify(subject, tmp_path / "out")


def test_a_multiplier_that_was_not_inverted_or_is_a_little_off_is_found(make: Make, tmp_path: Path) -> None:
    subject, name = make("nvfp4"), "model.layers.0.mlp.down_proj"
    written(CompressedTensors(), subject, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight_global_scale"]
    for other in (1 / stored, stored * (1 + 2.0**-20)):
        altered(tmp_path / "out", f"{name}.weight_global_scale", lambda _, other=other: other)
        with pytest.raises(ArtifactError, match="global scale"):
            CompressedTensors().verify(subject, tmp_path / "out")


@pytest.mark.parametrize("exporter", [CompressedTensors(), HuggingFace()])
def test_a_missing_tensor_is_found(make: Make, tmp_path: Path, exporter: Exporter) -> None:
    subject = make("int4-sym-g32", model="qwen2")
    written(exporter, subject, tmp_path / "out")
    altered(tmp_path / "out", "model.layers.0.self_attn.k_proj.bias", None)
    with pytest.raises(ArtifactError, match=r"does not fit .* `model\.layers\.0\.self_attn\.k_proj\.bias`"):
        exporter.verify(subject, tmp_path / "out")


def test_a_config_that_says_another_group_size_is_found(make: Make, tmp_path: Path) -> None:
    subject = make("int4-sym-g32")
    written(CompressedTensors(), subject, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 16
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="does not fit the model"):
        CompressedTensors().verify(subject, tmp_path / "out")


REFUSED = [
    ("fp4-g16-sfp32", "", "", "NVFP4 or MXFP4 only", "--weights nvfp4"),
    ("fp4-g16-se8m0", "", "", "NVFP4 or MXFP4 only", "--weights nvfp4"),
    ("fp6_e2m3-g16-se8m0", "", "", "MXFP6 only", "--weights mxfp6_e2m3"),
    ("mxfp8", "mxfp8", "", "MXFP8 weights go with MXFP8-RCEIL", "--activations mxfp8-rceil"),
    ("mxfp6_e2m3", "mxfp8-search", "", "MXFP6 weights go with", "--activations mxfp8-rceil"),
    ("mxfp6_e2m3", "mxfp6_e3m2", "", "MXFP6 weights go with", "--activations mxfp6_e2m3"),
    ("int4-sym-tensor", "", "", "no scale for a whole tensor", "--weights int4-sym-channel-sbf16"),
    ("int4-sym-g32-sfp32", "", "", "16-bit scales", "--weights int4-sym-g32-sbf16"),
    ("int4-sym-g32-sfp16", "", "", "compute in float16", "--weights int4-sym-g32-sbf16"),
    ("int8-sym-channel-se8m0", "int8-sym-token", "", "no such scales", "--weights int8-sym-channel-sbf16"),
    ("int4-sym-g32", "mxfp4", "", "integer activations, or FP8 ones", "--activations int8-sym-token"),
    ("int4-sym-g32", "mxfp8-rceil", "", "integer activations, or FP8 ones", "--activations fp8-token"),
    ("int4-sym-g32", "fp8-token-c0.9", "", "the whole range", "--activations fp8-sym-token-sfp32"),
    ("int4-sym-g32", "fp8-token-sbf16", "", "do not round them", "--activations fp8-sym-token-sfp32"),
    ("mxfp4", "fp8-g32-sfp16", "", "do not round them", "--activations fp8-sym-g32-sfp32"),
    ("mxfp4", "mxfp8-rceil", "", "MXFP4 activations, or FP8 ones", "--activations mxfp4"),
    ("mxfp8", "fp8-g16", "", "MXFP8-RCEIL activations", "--activations mxfp8-rceil"),
    ("int8-sym-channel", "int8-sym-token-o6", "", "quantize all columns", "--activations int8-sym-token-sbf16"),
    ("fp8-channel", "int8-sym-token", "", "FP8 activations", "--activations fp8-token"),
    ("fp8-b32", "fp8-token", "", "in blocks of 32", "--activations fp8-g32"),
    ("fp8-channel", "fp8-g32", "", "one scale a token", "--activations fp8-token"),
    ("mxfp4", "mxfp4-floor", "", "MXFP4 activations", "--activations mxfp4"),
    ("mxfp4", "int8-sym-token", "", "MXFP4 activations", "--activations mxfp4"),
    ("int4-sym-g32", "", "nf4-g16-sfp32", "FP4 or integers, or 16 bits", "--kv fp8-tensor"),
    ("int4-sym-g32", "", "fp4-g16-sfp16", "do not round them", "--kv fp4-sym-g16-sfp32"),
    ("int4-sym-g32", "", "mxfp4-floor", "as `even` does", "--kv mxfp4-sym-g32-se8m0"),
    ("int4-sym-g32", "", "int8-asym-token-head", "do not round them", "--kv int8-asym-token-head-sfp32"),
    ("int4-sym-g32", "", "int8-sym-tensor-sfp32", "over all codes", "--kv int8-sym-tensor-sfp32-half"),
    ("int4-sym-g32", "", "fp8-tensor-c0.9", "the whole range", "--kv fp8-sym-tensor-sfp32"),
]


@pytest.mark.parametrize(("weights", "activations", "kv", "reason", "hint"), REFUSED)
def test_a_scheme_without_a_layout_is_refused_with_the_nearest(
    make: Make, weights: str, activations: str, kv: str, reason: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=reason) as refused:
        CompressedTensors().check(make(weights, activations, kv))
    assert refused.value.hint.partition(";")[0].endswith(hint)


def test_every_nearest_scheme_has_a_layout(make: Make) -> None:
    for weights, activations, kv, _, hint in REFUSED:
        part, _, nearest = hint.partition(" ")
        parts = {"--weights": weights, "--activations": activations, "--kv": kv, part: nearest}
        CompressedTensors().check(make(*parts.values()))


def planned(subject: Subject, *proposals: dict[str, list[Operator]]) -> Subject:
    """Return the subject with a plan of operators, one method a proposal."""
    plan = Plan()
    for proposal in proposals:
        plan = extend(plan, Proposal(proposal), subject.model.graph, method="test")
    return replace(subject, plan=plan)


def rotations(subject: Subject, *, online: bool) -> dict[str, list[Operator]]:
    dims = subject.model.graph.dims
    signs = random_signs(dims.hidden, torch.Generator().manual_seed(2))
    found: dict[str, list[Operator]] = {"residual": [Hadamard(dims.hidden, signs=signs)]}
    for layer in range(dims.num_layers):
        found[f"layers.{layer}.vo"] = [Hadamard(dims.head_dim)]
        if online:
            found[f"layers.{layer}.qk_post"] = [Hadamard(dims.head_dim)]
            scale = torch.rand(dims.intermediate, generator=torch.Generator().manual_seed(layer)) + 0.5
            found[f"layers.{layer}.up_down"] = [Diag(scale), Hadamard(dims.intermediate), Diag(1.5 - scale / 2)]
    return found


def test_folded_rotations_are_packed_and_untie_the_head(make: Make, tmp_path: Path) -> None:
    """Weights stay those of the artifact; everything around them is folded, and rounded to bfloat16."""
    subject = make("int8-sym-channel")
    subject = planned(subject, rotations(subject, online=False))
    written(CompressedTensors(), subject, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert config["tie_word_embeddings"] is False
    for name, tensor in subject.ends().items():
        assert torch.equal(stored[name], tensor.bfloat16())
    assert torch.equal(stored["model.layers.1.input_layernorm.weight"], torch.ones(64, dtype=torch.bfloat16))
    assert (executed(tmp_path / "out") - measured(subject)).abs().mean() < 0.01 * measured(subject).abs().mean()


def test_a_head_that_stays_tied_is_not_stored(make: Make, tmp_path: Path) -> None:
    written(CompressedTensors(), make("int4-sym-g32"), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("settings", [(), CODED])
def test_low_rank_corrections_are_refused_with_the_linear(make: Make, settings: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(UsageError, match="low-rank") as refused:
        CompressedTensors().check(make("int4-sym-g32", method="rtn+lorc", settings=settings))
    assert ("first", "model.layers.0.mlp.down_proj") in refused.value.facts
    assert "--to hf" in refused.value.hint


def test_nvfp4_siblings_must_share_a_global_scale(make: Make, plugins: Plugins, tmp_path: Path) -> None:
    odd = "model.layers.1.self_attn.k_proj"
    subject = with_input_scales(make("nvfp4"), parsed("nvfp4", plugins), tmp_path / "scales", odd=odd)
    with pytest.raises(UsageError, match="different global scales") as refused:
        CompressedTensors().check(subject)
    assert ("linear", odd) in refused.value.facts


def test_nvfp4_activations_must_be_calibrated(make: Make, plugins: Plugins) -> None:
    subject = make("nvfp4")
    scheme = replace(subject.scheme, activations=parsed("nvfp4", plugins))
    with pytest.raises(UsageError, match="not calibrated"):
        CompressedTensors().check(replace(subject, scheme=scheme))


def test_nvfp4_global_scales_are_stored_as_reciprocals_and_shared(make: Make, plugins: Plugins, tmp_path: Path) -> None:
    subject = with_input_scales(make("nvfp4"), parsed("nvfp4", plugins), tmp_path / "scales")
    written(CompressedTensors(), subject, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v")]
    for leaf, expected in (
        ("weight_global_scale", 1 / subject.linear(subject.model.graph.linears[0]).parameters[0].global_scale),
        ("input_global_scale", 1 / torch.tensor(0.0011)),
    ):
        for name in attention:
            assert stored[f"{name}.{leaf}"].dtype == torch.float32
            torch.testing.assert_close(stored[f"{name}.{leaf}"], expected.reshape(1), rtol=1e-7, atol=0)


def test_a_plan_that_needs_new_biases_is_refused(make: Make, tmp_path: Path) -> None:
    subject = make("int4-sym-g32")
    shift = Shift(torch.ones(subject.model.graph.dims.head_dim))
    with pytest.raises(UsageError, match="biases that this model does not have"):
        written(HuggingFace(), planned(subject, {"layers.0.vo": [shift]}), tmp_path / "out")


@pytest.mark.parametrize(
    ("weights", "method", "model"),
    [("int4-asym-g32", "rtn", "qwen2"), ("nvfp4", "rtn+lorc", "llama"), ("int3", "rtn+lorc coded", "llama")],
)
def test_dequantized_weights_do_what_online_operators_and_corrections_did(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str, weights: str, method: str
) -> None:
    """Stored in float32 instead of 16 bits, the folder computes the same function."""
    monkeypatch.setattr(hf, "_dtype", lambda _: torch.float32)
    method, _, coded = method.partition(" ")
    subject = make(weights, "int8-sym-token", model=model, method=method, settings=CODED if coded else ())
    subject = planned(subject, rotations(subject, online=True))
    exported = written(HuggingFace(), subject, tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.float32
    ours = measured(without_activations(subject))
    torch.testing.assert_close(executed(tmp_path / "out"), ours, rtol=0, atol=2e-5)
    assert (ours - measured(without_activations(replace(subject, plan=Plan())))).abs().mean() > 0.01
    assert "activations are NOT quantized (without the int8 activations" in exported.consumers["transformers"]


def test_a_shift_online_becomes_a_bias(make: Make) -> None:
    """``(x - z) T`` in front of a linear is undone in its weight and its bias."""
    subject = make("int8-sym-channel", model="qwen2")
    generator = torch.Generator().manual_seed(4)
    shift = torch.randn(64, dtype=torch.float64, generator=generator)
    mix = torch.rand(64, dtype=torch.float64, generator=generator) + 0.5
    operators: list[Operator] = [Hadamard(64), Shift(shift), Diag(mix)]
    subject = planned(subject, {"layers.0.attn_in": operators})
    assert subject.plan.at("layers.0.attn_in").online == tuple(operators)
    linear = subject.model.graph.linears[0]
    bias = subject.folded(0)["self_attn.q_proj.bias"]
    weight, moved = dense(subject, linear, bias, torch.float64)
    x = torch.randn(5, 64, dtype=torch.float64, generator=generator)
    online = x
    for operator in operators:
        online = operator.act(online)
    scheme = subject.scheme.weights
    assert scheme is not None
    ours = subject.linear(linear).weight(subject.weight_grid(linear)).double()
    torch.testing.assert_close(x @ weight.T + moved, online @ ours.T + bias, rtol=0, atol=1e-10)


def test_a_plain_checkpoint_loads_anywhere_in_16_bits(make: Make, tmp_path: Path) -> None:
    subject = make("int4-sym-g32", kv="fp8-tensor", model="qwen2")
    exported = written(HuggingFace(), subject, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.dtype == torch.bfloat16
    assert not hasattr(config, "quantization_config")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    plain = replace(subject, scheme=replace(subject.scheme, kv=None))
    assert torch.equal(executed(tmp_path / "out", torch.bfloat16), measured(plain, torch.bfloat16))
    assert "without the fp8 KV cache of the artifact" in exported.consumers["transformers"]
    altered(tmp_path / "out", "model.layers.0.mlp.up_proj.weight", flipped)
    with pytest.raises(ArtifactError, match=r"`model\.layers\.0\.mlp\.up_proj`"):
        HuggingFace().verify(subject, tmp_path / "out")


@pytest.mark.parametrize("exporter", [CompressedTensors(), HuggingFace()])
def test_only_what_is_quantized_is_exported(make: Make, exporter: Exporter) -> None:
    with pytest.raises(UsageError):
        exporter.check(replace(make("int4-sym-g32"), quantized=None))


@pytest.mark.parametrize(
    ("weights", "stored", "expected"),
    [
        ("int4-sym-g32", torch.float32, torch.bfloat16),
        ("int4-sym-g32", torch.float16, torch.bfloat16),
        ("int4-sym-g32-sfp16", torch.float32, torch.float16),
        ("int4-sym-g32-sfp16", torch.float16, torch.float16),
        ("nvfp4", torch.float16, torch.bfloat16),
        ("fp8-channel", torch.float16, torch.float16),
        ("fp8-channel", torch.float32, torch.bfloat16),
    ],
)
def test_scales_decide_what_consumers_compute_in(
    plugins: Plugins, weights: str, stored: torch.dtype, expected: torch.dtype
) -> None:
    assert checkpoint_dtype(parsed(weights, plugins), stored) == expected


def test_files_beside_the_weights_are_copied_byte_for_byte(make: Make, models: dict[str, Path], tmp_path: Path) -> None:
    written(CompressedTensors(), make("int4-sym-g32"), tmp_path / "out")
    for name in ("tokenizer.json", "generation_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (models["llama"] / name).read_bytes()
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.json", "generation_config.json", "LICENSE", "config.json", "model.safetensors"}


def test_shards_are_numbered_and_load_like_one_file(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    subject = make("int4-sym-g32")
    written(CompressedTensors(), subject, tmp_path / "one")
    monkeypatch.setattr(checkpoint, "Shards", lambda folder: Shards(folder, limit=30_000))
    written(CompressedTensors(), subject, tmp_path / "many")
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(load_file(tmp_path / "many" / index["weight_map"][name])[name], tensor)
    assert not [file for file in (tmp_path / "many").iterdir() if file.name.startswith(".")]
    assert torch.equal(executed(tmp_path / "many"), executed(tmp_path / "one"))


@pytest.mark.parametrize(
    ("weights", "activations", "hint"),
    [
        ("amxfp4", None, ""),
        ("mxfp6_e3m2", "mxfp6_e3m2", ""),
        ("nf4", None, ""),
        ("fp4_e1m2", "fp4_e1m2-tensor", ""),
        ("fp4_e3m0-g32", None, ""),
        ("fp8_e5m2", None, ""),
        ("fp4-g16-se2m1", None, ""),
        ("fp4-g32-sint4", None, ""),
        ("fp4-g16-sue5m3", None, ""),
        ("nvfp4", "nvfp4-four_over_six", "nearest that fits: --activations nvfp4"),
        ("int4-g32", "int8-tensor-static", "nearest that fits: --activations int8-sym-tensor-sbf16"),
        ("int8-channel", "int8-tensor-c0.9", "nearest that fits: --activations int8-sym-tensor-sbf16"),
        ("mxfp4", "mxfp4-search", "nearest that fits: --activations mxfp4"),
    ],
)
def test_layouts_name_the_nearest_of_their_parts_and_leave_other_schemes_to_the_exporter(
    weights: str, activations: str | None, hint: str
) -> None:
    parts = [None if text is None else read(text)[1] for text in (weights, activations)]
    with pytest.raises(SchemeError) as caught:
        choose_layout(ModelScheme(*parts))
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("weights", "layout"),
    [
        ("nvfp4-four_over_six", "nvfp4-pack-quantized"),
        ("mxfp4-search", "mxfp4-pack-quantized"),
        ("int4-g32-narrow", "pack-quantized"),
    ],
)
def test_rules_of_weights_are_no_matter_of_layouts(weights: str, layout: str) -> None:
    assert choose_layout(ModelScheme(weights=read(weights)[1])) == layout
