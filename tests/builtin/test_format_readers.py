"""Other libraries read the values that the formats decode."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize

from qtool.numerics.groups import from_groups
from qtool.numerics.packing import pack_codes
from qtool.numerics.scales import encode_scale
from tests.builtin.format_cases import fit, values_of


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
