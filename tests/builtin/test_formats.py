from __future__ import annotations

import itertools
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

from qtool.builtin.formats.fp4 import E2M1, MXFP4, NVFP4
from qtool.builtin.formats.fp8 import E4M3
from qtool.builtin.formats.integer import Int2, Int3, Int4, Int5, Int6, Int7, Int8, Integer
from qtool.builtin.formats.presets import PRESETS
from qtool.errors import SchemeError
from qtool.numerics.groups import from_groups, to_groups
from qtool.numerics.packing import pack_codes
from qtool.numerics.scales import bits_per_value, encode_scale
from qtool.scheme import (
    Format,
    GroupParameters,
    ModelScheme,
    Preset,
    TensorScheme,
    parse_model_scheme,
    parse_tensor_scheme,
)
from tests.oracles import rounding as oracle

CLASSES = (Int2, Int3, Int4, Int5, Int6, Int7, Int8, E2M1, MXFP4, NVFP4, E4M3)
FORMATS = {cls.name: cls() for cls in CLASSES}
WRITTEN = [
    *(f"int{b}-{rest}" for b in range(2, 9) for rest in ("sym-g32", "sym-full", "asym-g16-sfp16", "asym-token-sfp32")),
    "int4-g32-se8m0",
    "int8-g32-se8m0-rceil",
    "fp4",
    "fp4-tensor-sbf16",
    "fp4-asym-token",
    "fp4-asym-g16-sfp16",
    "fp4-g16-se4m3",
    "fp4-g64-se8m0-floor",
    "mxfp4",
    "mxfp4-floor",
    "mxfp4-rceil",
    "nvfp4",
    "fp8-tensor",
    "fp8-token-sbf16",
    "fp8-g32-se8m0",
]


def read(text: str) -> tuple[Integer | E2M1 | E4M3, TensorScheme]:
    scheme = parse_tensor_scheme(text, FORMATS.__getitem__)
    return FORMATS[scheme.format], scheme


def values_of(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return values with heavy tails, shifted channels, and a scale that varies from row to row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) ** 3 + 0.2 * torch.randn(shape[-1], generator=generator)
    return x * torch.logspace(-2, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))


def fit(text: str, x: torch.Tensor, clip: float = 1.0) -> tuple[Integer | E2M1 | E4M3, torch.Tensor, GroupParameters]:
    form, scheme = read(text)
    groups = to_groups(x, scheme.strategy, scheme.group_size)
    global_scale = form.global_scale(x.abs().max().float(), scheme)
    return form, groups, form.fit(groups, scheme, global_scale=global_scale, clip=clip)


def error_of(text: str, x: torch.Tensor) -> float:
    form, groups, parameters = fit(text, x)
    return float((form.round(groups, parameters) - groups).norm() / groups.norm())


@pytest.mark.parametrize("text", WRITTEN)
def test_rounding_is_decoding_the_codes_and_is_idempotent(text: str) -> None:
    form, groups, parameters = fit(text, values_of(6, 128))
    codes = form.encode(groups, parameters)
    values = form.decode(codes, parameters)
    assert torch.equal(form.round(groups, parameters), values)
    assert torch.equal(form.round(values, parameters), values)
    assert int(codes.max()) < 2**form.bits
    assert (values - groups).norm() < groups.norm() * max(1.8 * 2.0 ** (1 - form.bits), 0.05)


@pytest.mark.parametrize("text", WRITTEN)
def test_all_codes_round_trip(text: str) -> None:
    form, _, parameters = fit(text, values_of(6, 128))
    rows = parameters.scale.shape
    codes = torch.arange(2**form.bits).to(torch.uint8)
    if form.name == "fp8":
        codes = codes[codes % 128 != 127]
    codes = codes.expand(*rows, -1)
    again = form.encode(form.decode(codes, parameters), parameters)
    if parameters.zero_point is not None and form.name == "fp4":
        assert torch.equal(again[codes != 8], codes[codes != 8])  # a shifted -0 is the 0 of another code
    else:
        assert torch.equal(again, codes)


@pytest.mark.parametrize("text", WRITTEN)
def test_stored_scales_are_what_was_fitted(text: str) -> None:
    _, scheme = read(text)
    _, _, parameters = fit(text, values_of(6, 128))
    stored = encode_scale(parameters.scale, scheme.scale)
    widened = stored.view(torch.float8_e8m0fnu) if scheme.scale == "e8m0" else stored
    assert torch.equal(widened.float(), parameters.scale)
    assert (parameters.global_scale is not None) == (scheme.scale == "e4m3")


@pytest.mark.parametrize("text", WRITTEN)
@pytest.mark.parametrize("factor", [2.0**-2, 2.0**5])
def test_powers_of_two_move_scales_and_leave_codes(text: str, factor: float) -> None:
    x = values_of(6, 128)
    form, groups, parameters = fit(text, x)
    _, scaled, moved = fit(text, x * factor)
    assert torch.equal(moved.step(), parameters.step() * factor)
    assert torch.equal(form.encode(scaled, moved), form.encode(groups, parameters))


@pytest.mark.parametrize("text", WRITTEN)
def test_groups_of_zeros_decode_to_zero(text: str) -> None:
    x = values_of(6, 128)
    x[2] = 0
    for values in (x, torch.zeros(6, 128)):
        form, groups, parameters = fit(text, values)
        rounded = form.round(groups, parameters)
        assert parameters.step().isfinite().all()
        assert (parameters.step() > 0).all()
        assert not from_groups(rounded, x.shape)[values == 0].any() or "fp4-asym" in text
        assert not rounded[(groups == 0).all(-1)].any()


@pytest.mark.parametrize("text", WRITTEN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_keeps_the_dtype_and_its_input(text: str, dtype: torch.dtype) -> None:
    x = values_of(4, 64, seed=1).to(dtype)
    form, groups, parameters = fit(text, x)
    before = groups.clone()
    rounded = form.round(groups, parameters)
    form.encode(groups, parameters)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, form.round(groups.float(), parameters).to(dtype))
    assert torch.equal(groups, before)


@pytest.mark.parametrize("text", WRITTEN)
def test_clip_narrows_the_range(text: str) -> None:
    form, groups, parameters = fit(text, values_of(6, 128))
    _, _, clipped = fit(text, values_of(6, 128), clip=0.4)
    assert (clipped.step() <= parameters.step()).all()
    reach = [form.round(groups, p).abs().amax() for p in (clipped, parameters)]
    assert reach[0] < reach[1]


@pytest.mark.parametrize("text", ["int4-g32", "int4-asym-g32", "fp4-g32", "nvfp4", "mxfp4"])
def test_a_column_rounds_as_it_does_inside_its_group(text: str) -> None:
    form, groups, parameters = fit(text, values_of(6, 128))
    column = replace(
        parameters,
        scale=parameters.scale[:, 1],
        zero_point=None if parameters.zero_point is None else parameters.zero_point[:, 1],
    )
    codes = form.encode(groups[:, 1, 5:6].contiguous(), column)
    assert torch.equal(codes, form.encode(groups, parameters)[:, 1, 5:6])


@pytest.mark.parametrize("kind", ["full", "half", "asym"])
def test_int4_is_the_oracle(kind: oracle.IntRange) -> None:
    x = values_of(4, 64)
    form, groups, parameters = fit(f"int4-g32-sfp32{'-' + kind}" if kind != "asym" else "int4-asym-g32-sfp32", x)
    limits = oracle.int_limits(4, kind)
    rounded = form.round(groups, parameters)
    for row, group in itertools.product(range(4), range(2)):
        block = groups[row, group].tolist()
        scale, zero = oracle.fit_int(block, 4, kind)
        expected = [oracle.decode_int(oracle.encode_int(v, scale, zero, limits), scale, zero) for v in block]
        for value, got, wanted in zip(block, rounded[row, group].tolist(), expected, strict=True):
            if kind == "half" and abs(value) == max(map(abs, block)):
                assert abs(got - value) == pytest.approx(scale / 2, rel=1e-5)  # amax lies on a tie
            else:
                assert got == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("rule", ["floor", "even", "rceil"])
def test_mxfp4_is_the_oracle(rule: oracle.ExponentRule) -> None:
    form, groups, parameters = fit(f"mxfp4-{rule}", values_of(8, 64))
    codes = form.encode(groups, parameters)
    for row, group in itertools.product(range(8), range(2)):
        scale_code, expected = oracle.encode_mxfp4(groups[row, group].tolist(), rule)
        assert int(encode_scale(parameters.scale, "e8m0")[row, group]) == scale_code
        assert codes[row, group].tolist() == expected


def test_nvfp4_is_the_oracle() -> None:
    x = values_of(8, 64)
    form, groups, parameters = fit("nvfp4", x)
    global_scale = oracle.nvfp4_global_scale(x.flatten().tolist())
    codes, values = form.encode(groups, parameters), form.decode(form.encode(groups, parameters), parameters)
    assert parameters.global_scale is not None
    assert float(parameters.global_scale) == global_scale
    for row, group in itertools.product(range(8), range(4)):
        scale_code, expected = oracle.encode_nvfp4(groups[row, group].tolist(), global_scale)
        if scale_code == 0:
            continue  # the oracle drops such blocks, the format keeps the least scale
        assert float(parameters.scale[row, group]) == oracle.decode_e4m3(scale_code)
        assert codes[row, group].tolist() == expected
        decoded = oracle.decode_nvfp4(scale_code, expected, global_scale)
        assert values[row, group].tolist() == pytest.approx(decoded, rel=1e-6)


@pytest.mark.parametrize("text", ["fp8-token", "fp8-tensor", "fp8-g32-sbf16"])
def test_fp8_is_the_oracle(text: str) -> None:
    form, groups, parameters = fit(text, values_of(4, 64))
    codes = form.encode(groups, parameters)
    flat = groups.reshape(-1, groups.shape[-1]).tolist()
    for block, scale, got in zip(flat, parameters.scale.flatten().tolist(), codes.flatten(0, -2).tolist(), strict=True):
        stored = "bfloat16" if "bf16" in text else "float32"
        assert scale == pytest.approx(oracle.store_scale(max(map(abs, block)) / 448, stored), rel=1e-7)
        assert got == [oracle.encode_e4m3(value / scale) for value in block]


@pytest.mark.parametrize("rule", ["floor", "rceil"])
def test_power_of_two_scales_of_integers_and_fp8_follow_their_rule(rule: oracle.ExponentRule) -> None:
    x = values_of(6, 64)
    for name, emax, largest in (("int4", 2, 7.0), ("int8", 6, 127.0), ("fp8", 8, 448.0)):
        _, groups, parameters = fit(f"{name}-g32-se8m0-{rule}", x)
        for block, scale in zip(groups.reshape(-1, 32).tolist(), parameters.scale.flatten().tolist(), strict=True):
            assert scale == 2.0 ** oracle.mx_exponent(block, rule, element_emax=emax, element_max=largest)


def test_nvfp4_gives_the_largest_block_the_largest_scale_and_refits_to_itself() -> None:
    x = values_of(16, 64)
    form, groups, parameters = fit("nvfp4", x)
    largest = groups.abs().amax(-1) == x.abs().max()
    assert parameters.scale[largest].tolist() == [448.0]
    normal = parameters.scale >= 2.0**-6
    rounded = form.round(groups, parameters)
    again = form.fit(rounded, form.defaults, global_scale=parameters.global_scale)
    full = normal & (rounded.abs().amax(-1) == 6 * parameters.step())
    assert torch.equal(again.scale[full], parameters.scale[full])
    assert full.sum() > 20


def test_values_beyond_a_calibrated_range_saturate() -> None:
    x = values_of(4, 64)
    form, scheme = read("nvfp4")
    groups = to_groups(x, "group", 16)
    half = form.global_scale(x.abs().max() / 2, scheme)
    parameters = form.fit(groups, scheme, global_scale=half)
    rounded = form.round(groups, parameters)
    assert parameters.scale.max() == 448
    assert float(rounded.abs().max()) == pytest.approx(float(x.abs().max() / 2), rel=1e-6)


def test_a_group_that_is_far_from_zero_keeps_its_value_in_asymmetric_fp4() -> None:
    x = torch.tensor([[3.0, 3.0, 3.0, 3.0], [1000.0, 1000.5, 1001.0, 1001.5], [-7.0, -7.0, -7.0, -6.9]])
    form, groups, parameters = fit("fp4-asym-g4", x)
    rounded = form.round(groups, parameters)[:, 0]
    assert rounded[0].tolist() == [3.0] * 4
    assert (rounded - x).abs().max() < 0.1
    assert torch.equal(form.decode(form.encode(groups, parameters), parameters)[:, 0], rounded)


def test_asymmetric_fp4_shifts_to_the_middle_of_the_range() -> None:
    form, groups, parameters = fit("fp4-asym-g4", torch.tensor([[-1.0, 0.0, 4.0, 5.0]]))
    assert float(parameters.scale) == 0.5
    assert parameters.zero_point is not None
    assert float(parameters.zero_point) == -4.0
    assert form.round(groups, parameters).flatten().tolist() == [-1.0, 0.0, 4.0, 5.0]


# -- other libraries read the same values ------------------------------------------------------------------------------


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


# -- schemes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "n", "bits"),
    [
        ("int4-g128-sfp16", 1024, 4.125),
        ("int4-asym-g128", 1024, 4.15625),
        ("int4-g32", 1024, 4.5),
        ("int4", 1024, 4.015625),
        ("nvfp4", 1024, 4.5),
        ("mxfp4", 1024, 4.25),
        ("fp4-g16", 1024, 6.0),
        ("fp4-g32-se4m3", 1024, 4.25),
        ("fp8-g32-se8m0", 1024, 8.25),
    ],
)
def test_bits_per_value(text: str, n: int, bits: float) -> None:
    form, scheme = read(text)
    cost = bits_per_value(
        form.bits,
        scale_format=scheme.scale,
        values_per_scale=n // scheme.groups_of(n, layer="layer"),
        zero_point_bits=form.zero_point_bits(scheme),
    )
    assert cost == bits


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        *((f"int{b}", f"int{b + 1}") for b in range(2, 8)),
        ("int4", "int4-g128"),
        ("int4-g128", "int4-g32"),
        ("int4-g32", "int4-asym-g32"),
        ("mxfp4", "nvfp4"),
        ("fp4", "fp4-g16"),
        ("nvfp4", "fp4-g16"),
        ("fp4-asym-g16", "fp8"),
        ("mxfp4-floor", "mxfp4"),
    ],
)
def test_more_bits_finer_groups_and_better_scales_are_closer(worse: str, better: str) -> None:
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) + 0.3
    assert error_of(better, x) < error_of(worse, x)


def test_the_relative_errors_on_a_gaussian_are_the_published_ones() -> None:
    x = torch.randn(256, 2048, generator=torch.Generator().manual_seed(1))
    expected = {"int4-g16-sfp32-full": 8.53, "int4-g128-sfp32-half": 11.12, "fp4-g128": 10.90, "fp4": 11.69}
    expected |= {"mxfp4-floor": 11.52, "mxfp4": 11.19, "mxfp4-rceil": 11.54, "nvfp4": 9.50}
    measured = {text: 100 * error_of(text, x) for text in expected}
    assert measured == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_parse_as_they_are_written(preset: Preset) -> None:
    scheme = parse_model_scheme(preset.name, FORMATS.__getitem__, {p.name: p for p in PRESETS})
    for part, text in ((scheme.weights, preset.weights), (scheme.activations, preset.activations), (scheme.kv, None)):
        assert part == (None if text is None else read(text)[1])
    assert preset.name == preset.name.upper()


def preset_of(text: str) -> ModelScheme:
    return parse_model_scheme(text, FORMATS.__getitem__, {p.name: p for p in PRESETS})


def test_the_presets_mean_what_the_ecosystem_means() -> None:
    w4a16 = preset_of("W4A16").weights
    assert w4a16 is not None
    assert (w4a16.format, w4a16.symmetric, w4a16.strategy, w4a16.group_size) == ("int4", True, "group", 128)
    w4a4 = preset_of("W4A4-g64")
    assert w4a4.activations is not None
    assert w4a4.weights is not None
    assert (w4a4.activations.symmetric, w4a4.activations.group_size) == (False, 64)
    assert (w4a4.weights.symmetric, w4a4.weights.group_size) == (True, 64)
    w8a8 = preset_of("W8A8-g64")
    assert w8a8.activations is not None
    assert w8a8.activations.strategy == "token"
    dynamic = preset_of("fp8_dynamic")
    assert dynamic.weights is not None
    assert dynamic.weights.strategy == "channel"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("int4-se4m3", "no e4m3 scales", "int4-sym-channel-sbf16"),
        ("int4-asym-se8m0", "without zero points", "int4-sym-channel-se8m0"),
        ("int4-rceil", "rounds e8m0 scales", "int4-sym-channel-sbf16"),
        ("fp4-half", "rule for symmetric integers", "fp4-sym-channel"),
        ("fp8-asym", "no zero point", "fp8-sym-channel"),
        ("fp8-se4m3", "no e4m3 scales", "fp8-sym-channel-sfp32"),
        ("nvfp4-g32", "16 values", "fp4-sym-g32-se4m3"),
        ("nvfp4-asym", "no zero point", "nvfp4-sym-g16-se4m3"),
        ("mxfp4-g16", "32 values", "fp4-sym-g16-se8m0"),
        ("mxfp4-sfp32", "32 values", "fp4-sym-g32-sfp32"),
    ],
)
def test_what_means_nothing_is_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(SchemeError, match=message) as caught:
        read(text)
    assert caught.value.hint.startswith(f"nearest that works: {hint}")


def test_the_nearest_scheme_of_a_refusal_always_works() -> None:
    refused = 0
    parts = itertools.product(
        ("int4", "fp4", "mxfp4", "nvfp4", "fp8"),
        (True, False),
        ("tensor", "channel", "token", "group"),
        (None, 16, 32),
        ("fp32", "fp16", "bf16", "e4m3", "e8m0"),
        ("full", "half"),
        ("even", "floor", "rceil"),
    )
    for scheme in itertools.starmap(TensorScheme, parts):
        try:
            FORMATS[scheme.format].check(scheme)
        except SchemeError as error:
            refused += 1
            hint = error.hint.removeprefix("nearest that works: ")
            read(hint)
    assert refused > 1000


def test_e4m3_scales_need_their_global_scale() -> None:
    form, scheme = read("nvfp4")
    with pytest.raises(SchemeError, match="need a global scale"):
        form.fit(values_of(2, 16), scheme)


def test_every_format_keeps_the_contract() -> None:
    forms: list[Format] = [*FORMATS.values()]
    for name, form in zip(FORMATS, forms, strict=True):
        assert form.name == name
        assert form.defaults.format == name
        form.check(form.defaults)
