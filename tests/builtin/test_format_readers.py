"""Other libraries read the values that the formats decode."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp6.base import MXFP6PackedCompressor
from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from qtool.numerics.groups import from_groups
from qtool.numerics.packing import pack_codes
from qtool.numerics.scales import decode_scale, encode_scale
from qtool.scheme import GroupParameters
from tests.builtin.format_cases import fit, read, values_of


def ct_scheme(**weights: object) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_reads_packed_integers(bits: int, symmetric: bool) -> None:
    x = values_of(32, 128)
    form, groups, parameters = fit(f"int{bits}-{'sym' if symmetric else 'asym'}-g32", x)
    codes = form.encode(groups, parameters)
    state = {
        "weight_packed": pack_codes(from_groups(codes, x.shape), bits).view(torch.int32),
        "weight_scale": parameters.scale,
        "weight_shape": torch.tensor(x.shape),
    }
    if parameters.zero_point is not None:
        signed = (parameters.zero_point - 2 ** (bits - 1)).to(torch.int8)
        state["weight_zero_point"] = pack_to_int32(signed, bits, packed_dim=0)
    scheme = ct_scheme(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32)
    theirs = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(theirs, from_groups(form.round(groups, parameters), x.shape))


@pytest.mark.parametrize("text", ["nvfp4", "mxfp4"])
def test_compressed_tensors_reads_and_writes_the_same_nibbles(text: str) -> None:
    x = values_of(8, 64)
    form, groups, parameters = fit(text, x)
    codes = from_groups(form.encode(groups, parameters), x.shape)
    in_steps = from_groups(groups / parameters.step().unsqueeze(-1), x.shape)
    elements = unpack_fp4_from_uint8(pack_codes(codes, 4), *x.shape, torch.float32)
    assert torch.equal(
        elements * from_groups(parameters.step().unsqueeze(-1).expand(groups.shape), x.shape),
        from_groups(form.round(groups, parameters), x.shape),
    )
    signed = torch.where(in_steps.signbit(), -elements.abs(), elements.abs())
    assert torch.equal(pack_fp4_to_uint8(signed), pack_codes(codes, 4))


def test_compressed_tensors_reads_nvfp4() -> None:
    x = values_of(8, 64)
    form, groups, parameters = fit("nvfp4", x)
    ours = from_groups(form.round(groups, parameters), x.shape)
    assert parameters.global_scale is not None
    packed = pack_codes(from_groups(form.encode(groups, parameters), x.shape), 4)
    scheme = ct_scheme(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
    theirs = dequantize(
        unpack_fp4_from_uint8(packed, *x.shape, torch.float32),
        scale=encode_scale(parameters.scale, "e4m3").float(),
        args=scheme.weights,
        global_scale=1 / parameters.global_scale.reshape(1),
    )
    assert torch.allclose(theirs, ours, rtol=1e-6, atol=0)
    state = {
        "weight_packed": packed,
        "weight_scale": encode_scale(parameters.scale, "e4m3"),
        "weight_global_scale": 1 / parameters.global_scale.reshape(1),
    }
    loaded = NVFP4PackedCompressor.decompress(state, scheme)["weight"]
    assert torch.allclose(loaded.float(), ours, rtol=2**-7, atol=0)


@pytest.mark.parametrize("rule", ["floor", "even", "rceil"])
def test_compressed_tensors_reads_mxfp4(rule: str) -> None:
    x = values_of(8, 64)
    form, groups, parameters = fit(f"mxfp4-{rule}", x)
    state = {
        "weight_packed": pack_codes(from_groups(form.encode(groups, parameters), x.shape), 4),
        "weight_scale": encode_scale(parameters.scale, "e8m0"),
    }
    scheme = ct_scheme(num_bits=4, type="float", symmetric=True, strategy="group", group_size=32)
    theirs = MXFP4PackedCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(theirs.float(), from_groups(form.round(groups, parameters), x.shape))


MX_SCALE = {"type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}


@pytest.mark.parametrize("rule", ["floor", "even", "rceil"])
def test_compressed_tensors_reads_and_writes_mxfp6(rule: str) -> None:
    x, scheme = values_of(8, 64), ct_scheme(num_bits=6, **MX_SCALE)
    form, groups, parameters = fit(f"mxfp6_e2m3-{rule}", x)
    codes, exponents = from_groups(form.encode(groups, parameters), x.shape), encode_scale(parameters.scale, "e8m0")
    state = {"weight_packed": pack_codes(codes, 6), "weight_scale": exponents}
    theirs = MXFP6PackedCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(theirs.float(), from_groups(form.round(groups, parameters), x.shape))
    written = MXFP6PackedCompressor.compress({"weight": x, "weight_scale": parameters.scale}, scheme)
    assert torch.equal(written["weight_packed"], state["weight_packed"])
    assert torch.equal(written["weight_scale"], exponents)


@pytest.mark.parametrize("rule", ["floor", "even", "rceil"])
def test_compressed_tensors_reads_and_writes_mxfp8(rule: str) -> None:
    x, scheme = values_of(8, 64), ct_scheme(num_bits=8, **MX_SCALE)
    form, groups, parameters = fit(f"mxfp8-{rule}", x)
    codes, exponents = from_groups(form.encode(groups, parameters), x.shape), encode_scale(parameters.scale, "e8m0")
    state = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": exponents}
    theirs = MXFP8QuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(theirs.float(), from_groups(form.round(groups, parameters), x.shape))
    written = MXFP8QuantizationCompressor.compress({"weight": x, "weight_scale": parameters.scale}, scheme)
    assert torch.equal(written["weight"].view(torch.uint8), codes)
    assert torch.equal(written["weight_scale"], exponents)


@pytest.mark.parametrize("bits", [6, 8])
def test_compressed_tensors_reads_every_code_of_blocks_of_32(bits: int) -> None:
    form, _ = read("mxfp6_e2m3" if bits == 6 else "mxfp8")
    codes = torch.arange(2**bits, dtype=torch.uint8).reshape(-1, 32)
    codes = torch.where(codes & 0x7F == 0x7F, 0, codes) if bits == 8 else codes  # which is NaN
    exponents = torch.arange(120, 120 + len(codes), dtype=torch.uint8).unsqueeze(-1)
    ours = form.decode(codes, GroupParameters(decode_scale(exponents, "e8m0").squeeze(-1)))
    compressor = MXFP6PackedCompressor if bits == 6 else MXFP8QuantizationCompressor
    packed = {"weight_packed": pack_codes(codes, 6)} if bits == 6 else {"weight": codes.view(torch.float8_e4m3fn)}
    theirs = compressor.decompress({**packed, "weight_scale": exponents}, ct_scheme(num_bits=bits, **MX_SCALE))
    assert torch.equal(theirs["weight"].float(), ours)
    assert torch.equal(theirs["weight"].signbit(), ours.signbit())


@pytest.mark.parametrize(("text", "bits"), [("mxfp6_e2m3", 6), ("mxfp8-rceil", 8)])
def test_compressed_tensors_quantizes_inputs_in_blocks_of_32_alike(text: str, bits: int) -> None:
    x = values_of(64, 256)
    form, groups, parameters = fit(text, x)
    args = QuantizationArgs(num_bits=bits, **MX_SCALE)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    assert torch.equal(scale.float(), parameters.scale.reshape(scale.shape))
    theirs = fake_quantize(x, scale, zero_point, args)
    assert torch.equal(theirs, from_groups(form.round(groups, parameters), x.shape))


def halves(codes: torch.Tensor) -> np.ndarray:
    """Lay blocks of codes out as GGUF does: byte ``j`` holds value ``j`` low and value ``j + n/2`` high."""
    low, high = codes.chunk(2, dim=-1)
    return (low | high << 4).numpy()


def test_gguf_reads_mxfp4() -> None:
    x = values_of(8, 64)
    form, groups, parameters = fit("mxfp4", x)
    exponents = encode_scale(parameters.scale, "e8m0").unsqueeze(-1).numpy()
    blocks = np.concatenate([exponents, halves(form.encode(groups, parameters))], axis=-1).reshape(8, -1)
    theirs = gguf.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(theirs, from_groups(form.round(groups, parameters), x.shape).numpy())


def test_gguf_reads_nvfp4_times_its_tensor_scale() -> None:
    x = values_of(8, 128)
    form, groups, parameters = fit("nvfp4", x)
    assert parameters.global_scale is not None
    scales = encode_scale(parameters.scale, "e4m3").view(torch.uint8).reshape(8, 2, 4).numpy()
    nibbles = halves(form.encode(groups, parameters)).reshape(8, 2, 32)
    theirs = gguf.dequantize(np.concatenate([scales, nibbles], -1).reshape(8, -1), gguf.GGMLQuantizationType.NVFP4)
    ours = from_groups(form.round(groups, replace(parameters, global_scale=None)), x.shape)
    assert ours.shape == theirs.shape
    unscaled = form.decode(form.encode(groups, parameters), replace(parameters, global_scale=None))
    assert np.array_equal(theirs, from_groups(unscaled, x.shape).numpy())


def test_gguf_reads_int4_in_groups_of_32_as_q4_0() -> None:
    x = values_of(8, 64)
    form, groups, parameters = fit("int4-g32-sfp16", x)
    scales = encode_scale(parameters.scale, "fp16").unsqueeze(-1).view(torch.uint8).numpy()
    blocks = np.concatenate([scales, halves(form.encode(groups, parameters))], axis=-1).reshape(8, -1)
    theirs = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(theirs, from_groups(form.round(groups, parameters), x.shape).numpy())
