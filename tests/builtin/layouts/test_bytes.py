"""GPTQ, AWQ and ModelOpt checkpoints hold what qtool quantized, byte for byte as their readers expect it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qtool.builtin.exporters import checkpoint
from qtool.builtin.exporters.awq import AWQ
from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.gptq import GPTQ, GPTQv2
from qtool.builtin.exporters.modelopt import ModelOpt
from qtool.builtin.exporters.shards import Shards
from qtool.engine.exporter import UNREADABLE, Exporter
from qtool.engine.packed import PackedLinear
from qtool.errors import ArtifactError
from qtool.numerics.packing import pack_codes
from qtool.plugins import Plugins
from qtool.scheme import GroupParameters
from tests.builtin.layouts.conftest import NAME, Make, altered, calibrated, flipped
from tests.builtin.packed import written


def codes_of(bits: int, outputs: int = 32, inputs: int = 32) -> Tensor:
    return torch.randint(
        0, 2**bits, (outputs, inputs), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )


def packed(codes: Tensor, bits: int) -> PackedLinear:
    """Return codes as they lie in an artifact."""
    return PackedLinear(pack_codes(codes, bits), bits, codes.shape[1], GroupParameters(torch.ones(len(codes), 1)))


def word(*places: tuple[int, int]) -> int:
    """Return a signed 32-bit word of (code, lowest bit)."""
    value = sum(code << bit for code, bit in places) & 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("exporter", [GPTQ(), GPTQv2()])
def test_gptq_words_hold_codes_along_inputs_and_zeros_along_outputs(exporter: GPTQv2, bits: int) -> None:
    codes, zeros = codes_of(bits), codes_of(bits, inputs=2).clamp(min=1)
    tensors = exporter.tensors(packed(codes, bits), zeros)
    per, less = 32 // bits, 1 if exporter.layout == "gptq" else 0
    for row in range(32 // per):
        for out in (0, 1, 31):
            places = ((int(codes[out, row * per + j]), bits * j) for j in range(per))
            assert int(tensors["qweight"][row, out]) == word(*places)
    for group in range(2):
        for column in range(32 // per):
            places = ((int(zeros[column * per + j, group]) - less, bits * j) for j in range(per))
            assert int(tensors["qzeros"][group, column]) == word(*places)
    assert tensors["g_idx"].tolist() == [0] * 16 + [1] * 16
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int32}


def test_gptq_symmetric_zeros_are_the_constants_that_readers_know() -> None:
    codes, zeros = codes_of(4), torch.full((32, 1), 8, dtype=torch.uint8)
    assert set(GPTQ().tensors(packed(codes, 4), zeros)["qzeros"].flatten().tolist()) == {0x77777777}
    assert set(GPTQv2().tensors(packed(codes, 4), zeros)["qzeros"].flatten().tolist()) == {word((0x88888888, 0))}


def three_words(c: list[int]) -> list[int]:
    """Ten whole codes, two bits of the next; its third bit, ten codes, one bit of the next; its two bits, ten codes."""
    return [
        word(*((c[j], 3 * j) for j in range(10)), (c[10] & 3, 30)),
        word((c[10] >> 2, 0), *((c[11 + j], 3 * j + 1) for j in range(10)), (c[21] & 1, 31)),
        word((c[21] >> 1, 0), *((c[22 + j], 3 * j + 2) for j in range(10))),
    ]


@pytest.mark.parametrize("exporter", [GPTQ(), GPTQv2()])
def test_gptq_packs_32_codes_of_3_bits_into_3_words_and_splits_two_of_them(exporter: GPTQv2) -> None:
    codes, zeros = codes_of(3), codes_of(3, inputs=2).clamp(min=1)
    tensors = exporter.tensors(packed(codes, 3), zeros)
    less = 1 if exporter.layout == "gptq" else 0
    for out in range(32):
        assert tensors["qweight"][:, out].tolist() == three_words(codes[out].tolist())
    for group in range(2):
        assert tensors["qzeros"][group].tolist() == three_words((zeros[:, group].int() - less).tolist())


def test_awq_words_hold_eight_outputs_in_their_order() -> None:
    codes, zeros = codes_of(4, outputs=16), codes_of(4, outputs=16, inputs=2)
    tensors = AWQ().tensors(packed(codes, 4), zeros)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    for name, values in (("qweight", codes), ("qzeros", zeros)):
        assert tensors[name].shape == (values.shape[1], 2)
        for row in range(values.shape[1]):
            for column in range(2):
                places = ((int(values[8 * column + order[i], row]), 4 * i) for i in range(8))
                assert int(tensors[name][row, column]) == word(*places)


INTEGERS = [
    *(
        (exporter, f"int{bits}-{kind}", name)
        for exporter, kind, name in (
            (GPTQ(), "sym-g32-signed_full", "llama"),
            (GPTQv2(), "asym-g32", "llama"),
            (GPTQv2(), "sym-channel-sfp16", "qwen2"),
        )
        for bits in (2, 3, 4, 8)
    ),
    (AWQ(), "int4-asym-g32", "llama"),
    (AWQ(), "int4-sym-g32-signed_full", "llama"),
    (AWQ(), "int4-asym-channel-sfp16", "qwen2"),
]


@pytest.mark.parametrize(("exporter", "weights", "name"), INTEGERS)
def test_every_value_of_the_files_is_ours(
    make: Make, tmp_path: Path, exporter: Exporter, weights: str, name: str
) -> None:
    """A reader of one value at a time, from the layouts' description, decodes what qtool decodes."""
    subject = make(weights, name=name)
    exported = written(exporter, subject, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said, stored = config["quantization_config"], load_file(tmp_path / "out" / "model.safetensors")
    linear = next(linear for linear in subject.model.graph.linears if linear.name == NAME)
    ours = subject.linear(linear).weight(subject.weight_grid(linear))
    tensors = {leaf: stored[f"{NAME}.{leaf}"] for leaf in ("qweight", "qzeros", "scales")}
    size = ours.shape[1] if said["group_size"] == -1 else said["group_size"]
    read_code, read_zero = readers(tensors, said)
    for out in range(ours.shape[0]):
        for i in range(0, ours.shape[1], 3):
            scale = float(tensors["scales"][i // size, out])
            assert np.float32(read_code(out, i) - read_zero(out, i // size)) * np.float32(scale) == float(ours[out, i])
    assert tensors["scales"].dtype == torch.float16
    assert config["torch_dtype"] == ("bfloat16" if name == "llama" else "float16")
    size = sum(tensor.nbytes for key, tensor in stored.items() if key.rpartition(".")[2] in (*tensors, "g_idx"))
    assert exported.details["bytes"]["linears"] == size


def readers(tensors: dict[str, Tensor], said: dict[str, Any]) -> tuple[Callable[..., int], Callable[..., int]]:
    """Return what reads the code of an output and input, and the zero point of an output and group."""
    bits = said["bits"]

    def at(column: Tensor, position: int) -> int:
        """One code of a column of words, taken as one long number."""
        number = int.from_bytes(column.contiguous().numpy().tobytes(), "little")
        return number >> (bits * position) & (2**bits - 1)

    def nibble(matrix: Tensor, row: int, out: int) -> int:
        place = (0, 2, 4, 6, 1, 3, 5, 7).index(out % 8)
        return (int(matrix[row, out // 8]) & 0xFFFFFFFF) >> (4 * place) & 15

    weight, zeros = tensors["qweight"], tensors["qzeros"]
    if said["quant_method"] == "awq":
        return (lambda out, i: nibble(weight, i, out)), (lambda out, group: nibble(zeros, group, out))
    add = {"gptq": 1, "gptq_v2": 0}[said["checkpoint_format"]]
    return (lambda out, i: at(weight[:, out], i)), (lambda out, group: at(zeros[group], out) + add)


def test_signed_scales_are_there_and_kept(make: Make, tmp_path: Path) -> None:
    written(GPTQ(), make("int4-sym-g32-signed_full"), tmp_path / "out")
    scales = load_file(tmp_path / "out" / "model.safetensors")[f"{NAME}.scales"]
    assert 0.2 < float((scales < 0).float().mean()) < 0.8


@pytest.mark.parametrize("quantized_inputs", [True, False])
def test_modelopt_holds_the_artifacts_nvfp4(
    make: Make, plugins: Plugins, tmp_path: Path, *, quantized_inputs: bool
) -> None:
    subject = make("nvfp4")
    if quantized_inputs:
        subject = calibrated(subject, plugins, tmp_path / "scales")
    written(ModelOpt(), subject, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert subject.quantized is not None
    for linear in subject.model.graph.linears:
        raw = stored[f"{linear.name}.weight"].numpy()
        pairs = np.stack((raw & 15, raw >> 4), axis=-1).reshape(len(raw), -1)
        values = pairs.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        block = stored[f"{linear.name}.weight_scale"].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        step = np.repeat(block.astype(np.float32) * stored[f"{linear.name}.weight_scale_2"].numpy(), 16, axis=1)
        ours = subject.linear(linear).weight(subject.weight_grid(linear))
        assert torch.equal(torch.from_numpy(values * step), ours)
        assert stored[f"{linear.name}.weight_scale_2"].shape == ()
        if quantized_inputs:
            held = subject.quantized.tensor(f"{linear.reads}.input_global_scale")
            assert float(stored[f"{linear.name}.input_scale"]) == float(held)
        else:
            assert f"{linear.name}.input_scale" not in stored
    algorithm = "NVFP4" if quantized_inputs else "W4A16_NVFP4"
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    also = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert (said["quant_algo"], also["quant_algo"]) == (algorithm, algorithm)
    assert said["ignore"] == also["exclude_modules"] == ["lm_head"]
    assert also["group_size"] == 16


def test_modelopt_nvfp4_globals_are_reciprocals_of_compressed_tensors(
    make: Make, plugins: Plugins, tmp_path: Path
) -> None:
    subject = calibrated(make("nvfp4"), plugins, tmp_path / "scales")
    written(ModelOpt(), subject, tmp_path / "mine")
    written(CompressedTensors(), subject, tmp_path / "theirs")
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("mine", "theirs"))
    for here, there in (("weight_scale_2", "weight_global_scale"), ("input_scale", "input_global_scale")):
        assert float(mine[f"{NAME}.{here}"] * theirs[f"{NAME}.{there}"]) == pytest.approx(1, rel=1e-6)
    assert torch.equal(mine[f"{NAME}.weight"], theirs[f"{NAME}.weight_packed"])
    assert torch.equal(mine[f"{NAME}.weight_scale"].view(torch.uint8), theirs[f"{NAME}.weight_scale"].view(torch.uint8))


@pytest.mark.parametrize("weights", ["fp8-channel", "fp8-channel-sbf16"])
def test_modelopt_holds_the_artifacts_fp8(make: Make, tmp_path: Path, weights: str) -> None:
    subject = make(weights, "fp8-token", name="qwen2")
    written(ModelOpt(), subject, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for linear in subject.model.graph.linears:
        raw = stored[f"{linear.name}.weight"].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        scale = stored[f"{linear.name}.weight_scale"]
        ours = subject.linear(linear).weight(subject.weight_grid(linear))
        assert scale.dtype == torch.float32
        assert torch.equal(torch.from_numpy(raw.astype(np.float32)) * scale[:, None], ours)
        assert scale.shape == (len(ours),)


@pytest.mark.parametrize("weights", ["fp8-tensor", "fp8-tensor-sbf16"])
def test_modelopt_holds_the_artifacts_fp8_of_one_scale(make: Make, tmp_path: Path, weights: str) -> None:
    subject = make(weights, "fp8-tensor")
    exported = written(ModelOpt(), subject, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for linear in subject.model.graph.linears:
        raw = stored[f"{linear.name}.weight"].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        scale = stored[f"{linear.name}.weight_scale"]
        assert (scale.dtype, scale.shape) == (torch.float32, ())
        ours = subject.linear(linear).weight(subject.weight_grid(linear))
        assert torch.equal(torch.from_numpy(raw.astype(np.float32)) * scale, ours)
        assert f"{linear.name}.input_scale" not in stored
    config = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert config["quantization"]["quant_algo"] == "FP8"
    assert exported.consumers["vllm"].startswith(UNREADABLE)
    assert exported.consumers["tensorrt-llm"].startswith("W8A8: dynamic FP8 activations per tensor")


@pytest.mark.parametrize(
    ("exporter", "weights", "leaf"),
    [
        *((GPTQ(), "int3-sym-g32", leaf) for leaf in ("qweight", "qzeros", "scales", "g_idx")),
        *((GPTQv2(), "int4-asym-g32", leaf) for leaf in ("qweight", "qzeros")),
        *((AWQ(), "int4-asym-g32", leaf) for leaf in ("qweight", "qzeros", "scales")),
        *((ModelOpt(), "nvfp4", leaf) for leaf in ("weight", "weight_scale", "weight_scale_2")),
    ],
)
def test_one_wrong_bit_is_found_and_named(
    make: Make, tmp_path: Path, exporter: Exporter, weights: str, leaf: str
) -> None:
    subject = make(weights)
    written(exporter, subject, tmp_path / "out")
    altered(tmp_path / "out", f"{NAME}.{leaf}", flipped)
    # A zero point that is not in the middle is no symmetric code at all.
    symmetric_zero = isinstance(exporter, GPTQ) and leaf == "qzeros" and "-sym-" in weights
    said = "cannot unpack `{}`" if symmetric_zero else "the weight of `{}` that was written is not"
    with pytest.raises(ArtifactError, match=said.format(NAME)):
        exporter.verify(subject, tmp_path / "out")


def test_a_wrong_input_scale_is_found(make: Make, plugins: Plugins, tmp_path: Path) -> None:
    subject = calibrated(make("nvfp4"), plugins, tmp_path / "scales")
    written(ModelOpt(), subject, tmp_path / "out")
    altered(tmp_path / "out", f"{NAME}.input_scale", lambda scale: 1 / scale)
    with pytest.raises(ArtifactError, match="input scale"):
        ModelOpt().verify(subject, tmp_path / "out")


@pytest.mark.parametrize(
    ("exporter", "weights", "key", "value"),
    [
        (GPTQ(), "int4-sym-g32", "checkpoint_format", "gptq_v2"),
        (GPTQ(), "int4-sym-g32", "group_size", 16),
        (GPTQ(), "int4-sym-g32", "bits", 8),
        (GPTQv2(), "int4-asym-g32", "sym", True),
        (AWQ(), "int4-sym-g32", "group_size", 16),
        (ModelOpt(), "nvfp4", "quant_algo", "NVFP4"),
    ],
)
def test_a_config_that_says_something_else_is_found(
    make: Make, tmp_path: Path, exporter: Exporter, weights: str, key: str, value: object
) -> None:
    subject = make(weights)
    written(exporter, subject, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"][key] = value
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError):
        exporter.verify(subject, tmp_path / "out")


SAID_BY_GPTQ = {"quant_method": "gptq", "desc_act": False, "lm_head": False, "pack_dtype": "int32"}


@pytest.mark.parametrize(
    ("exporter", "weights", "said"),
    [
        (GPTQ(), "int3-sym-g32", {"bits": 3, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}),
        (GPTQv2(), "int4-asym-channel", {"bits": 4, "group_size": -1, "sym": False, "checkpoint_format": "gptq_v2"}),
        (AWQ(), "int4-sym-g32", {"bits": 4, "group_size": 32, "zero_point": True}),
        (AWQ(), "int4-asym-channel", {"bits": 4, "group_size": -1, "zero_point": True}),
    ],
)
def test_the_config_says_what_readers_ask_for(
    make: Make, tmp_path: Path, exporter: Exporter, weights: str, said: dict[str, object]
) -> None:
    written(exporter, make(weights), tmp_path / "out")
    awq = {"quant_method": "awq", "version": "gemm", "modules_to_not_convert": ["lm_head"]}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == said | (awq if isinstance(exporter, AWQ) else SAID_BY_GPTQ)


def test_shards_are_streamed_and_hold_the_same(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    subject = make("int4-sym-g32")
    written(GPTQ(), subject, tmp_path / "one")
    monkeypatch.setattr(checkpoint, "Shards", lambda folder: Shards(folder, limit=30_000))
    written(GPTQ(), subject, tmp_path / "many")
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) == 3
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts: dict[str, Tensor] = {}
    for file in files:
        parts |= load_file(file)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
