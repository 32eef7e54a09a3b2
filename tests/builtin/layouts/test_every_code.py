"""Decoders of other libraries, on every code of a format under every scale that it has."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from qtool.numerics.packing import pack_codes
from qtool.numerics.scales import decode_scale
from qtool.plugins import Plugins
from qtool.scheme import GroupParameters


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover()


def halves(codes: Tensor) -> Tensor:
    """Return codes two to a byte as llama.cpp has them: the first half of a block in the low nibbles."""
    low, high = codes.chunk(2, -1)
    return low | high << 4


def compressed(layout: str, tensors: dict[str, Tensor], **weights: object) -> Tensor:
    """Decode with compressed-tensors."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    found: Tensor = BaseCompressor.get_value_from_registry(layout).decompress(tensors, scheme)["weight"]
    return found


@pytest.mark.parametrize("library", ["gguf", "compressed-tensors"])
def test_mxfp4_under_every_exponent(plugins: Plugins, library: str) -> None:
    """Of the three largest bytes one is no number, and under the others 6 overflows float32."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(253, 2)
    exponents = torch.arange(253, dtype=torch.uint8).unsqueeze(-1)
    ours = plugins.format("mxfp4").decode(codes, GroupParameters(decode_scale(exponents, "e8m0").squeeze(-1)))
    if library == "gguf":
        blocks = torch.cat((exponents, halves(codes)), -1).numpy()
        theirs = torch.from_numpy(gguf.dequantize(blocks, GGMLQuantizationType.MXFP4))
    else:
        stored = {"weight_packed": pack_codes(codes, 4), "weight_scale": exponents}
        how = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
        theirs = compressed("mxfp4-pack-quantized", stored, **how).float()
    assert torch.equal(ours, theirs)


def test_nvfp4_blocks_of_gguf_under_every_scale(plugins: Plugins) -> None:
    scales = torch.arange(127, dtype=torch.uint8)  # 127 is no number
    codes = torch.arange(16, dtype=torch.uint8).repeat(len(scales), 4, 1)
    ours = decode_scale(scales.view(torch.float8_e4m3fn), "e4m3").unsqueeze(-1).expand(-1, 4)
    blocks = torch.cat((scales.unsqueeze(-1).expand(-1, 4), *(halves(codes[:, part]) for part in range(4))), -1)
    theirs = gguf.dequantize(np.ascontiguousarray(blocks.numpy()), GGMLQuantizationType.NVFP4)
    decoded = plugins.format("nvfp4").decode(codes, GroupParameters(ours))
    assert torch.equal(decoded.flatten(1), torch.from_numpy(theirs))


def test_nvfp4_of_compressed_tensors_under_every_scale(plugins: Plugins) -> None:
    """With a divisor that is a power of two, so that dividing by it is multiplying."""
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(-1)
    codes = torch.arange(16, dtype=torch.uint8).repeat(len(scales), 1)
    stored = {
        "weight_packed": pack_codes(codes, 4),
        "weight_scale": scales,
        "weight_global_scale": torch.tensor([2.0**11]),
    }
    how = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    parameters = GroupParameters(decode_scale(scales, "e4m3").squeeze(-1), None, torch.tensor(2.0**-11))
    ours = plugins.format("nvfp4").decode(codes, parameters)
    assert torch.equal(ours, compressed("nvfp4-pack-quantized", stored, **how).float())


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_bytes_of_compressed_tensors(plugins: Plugins, name: str) -> None:
    """Every byte under scales of rows, but for the two of FP8 that are no number."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = (codes[(codes & 0x7F) != 0x7F] if name == "fp8" else codes).repeat(64, 1)
    scale = torch.rand(64, 1, generator=torch.Generator().manual_seed(1)) + 2.0**-10
    ours = plugins.format(name).decode(codes, GroupParameters(scale.squeeze(-1)))
    signed = codes.view(torch.float8_e4m3fn) if name == "fp8" else (codes ^ 0x80).view(torch.int8)
    how = {"num_bits": 8, "type": "float" if name == "fp8" else "int", "strategy": "channel"}
    stored = {"weight": signed, "weight_scale": scale}
    layout = "float-quantized" if name == "fp8" else "int-quantized"
    assert torch.equal(ours, compressed(layout, stored, **how).float())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_of_compressed_tensors(plugins: Plugins, bits: int, symmetric: bool) -> None:
    """Every code under every zero point, each with scales that bfloat16 has."""
    count, size = 1 << bits, 32
    rows = 32 if symmetric else max(32, count)
    codes = torch.arange(max(count, size), dtype=torch.int32).remainder(count).to(torch.uint8).repeat(rows, 1)
    scale = torch.rand(rows, codes.shape[1] // size, generator=torch.Generator().manual_seed(bits)).bfloat16().float()
    zeros = torch.arange(rows, dtype=torch.int32).remainder(count).to(torch.uint8).unsqueeze(-1).expand_as(scale)
    parameters = GroupParameters(scale, None if symmetric else zeros.float())
    ours = plugins.format(f"int{bits}").decode(codes.unflatten(-1, (-1, size)), parameters).flatten(1)
    stored = {
        "weight_packed": pack_codes(codes, bits).view(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape),
    }
    if not symmetric:
        stored["weight_zero_point"] = pack_codes(zeros.T.contiguous(), bits).view(torch.int32).T.contiguous()
    how = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": size}
    assert torch.equal(ours, compressed("pack-quantized", stored, **how))
