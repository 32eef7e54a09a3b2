"""Offsets in place of zero points: the formulas number by number, what decodes to itself, what is stored."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from qtool.builtin.exporters.gguf_blocks import stored_blocks
from qtool.builtin.mitigators.gptq import GPTQ
from qtool.builtin.mitigators.ldlq import LDLQ
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.engine.storage import foreseen_bytes, part_of
from qtool.engine.stored import linear_tensors, read_linear
from qtool.errors import SchemeError
from qtool.numerics.integers import fit_offset
from qtool.plugins import Plugins
from qtool.scheme import GroupParameters, ScaleFormat, TensorScheme, parse_tensor_scheme
from tests.builtin.packed import packed

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Q4_1 = "int4-asym-g32-offset-sfp16"


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover()


def grid_of(text: str, plugins: Plugins) -> Grid:
    scheme = parse_tensor_scheme(text, plugins.format)
    return Grid.of(scheme, plugins.format(scheme.format))


def rounded(weight: Tensor, text: str, plugins: Plugins) -> QuantizedLinear:
    (part,) = (grid := grid_of(text, plugins)).parts
    problem = LayerProblem("one", weight, grid, global_scales=(part.global_scale(weight.abs().amax()),))
    return RTN().quantize(problem, ClipOptions())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale_format", FLOATS)
def test_the_formulas(bits: int, scale_format: ScaleFormat, plugins: Plugins) -> None:
    dtype, top = FLOATS[scale_format], 2**bits - 1
    groups = torch.randn(40, 16, generator=torch.Generator().manual_seed(bits)) + 1
    scale, offset = fit_offset(groups, num_bits=bits, scale_format=scale_format)
    fmt, parameters = plugins.format(f"int{bits}"), GroupParameters(scale, offset=offset)
    codes, values = fmt.encode(groups, parameters), fmt.round(groups, parameters)
    assert torch.equal(fmt.decode(codes, parameters), values)
    for i, row in enumerate(groups.tolist()):
        m = float(torch.tensor(min(row)).to(dtype))
        s = float(torch.tensor((max(row) - m) / top).to(dtype))
        assert float(offset[i]) == m
        assert float(scale[i]) == pytest.approx(s, rel=2e-7 if dtype == torch.float32 else 0)
        for x, code, value in zip(row, codes[i].tolist(), values[i].tolist(), strict=True):
            exact = (x - m) / float(scale[i])
            if abs(exact % 1 - 0.5) > 1e-4:
                assert code == min(max(round(exact), 0), top)
            assert value == float(np.float32(np.float32(scale[i]) * np.float32(code)) + np.float32(m))


@pytest.mark.parametrize("far", [0.0, 1.0, -40.0])
def test_weights_of_this_form_with_both_ends_in_use_decode_to_themselves(far: float, plugins: Plugins) -> None:
    """As the weights of a GGUF model in Q4_1 are."""
    generator = torch.Generator().manual_seed(7)
    codes = torch.stack([torch.randperm(32, generator=generator) % 16 for _ in range(64)]).reshape(8, 256)
    scale = (0.001 + torch.rand(8, 8, generator=generator) / 10).half().float()
    offset = (torch.randn(8, 8, generator=generator) + far).half().float()
    blocks = stored_blocks(packed(codes.to(torch.uint8), GroupParameters(scale, offset=offset), 4), "Q4_1")
    weight = torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q4_1).copy())
    found, grid = rounded(weight, Q4_1, plugins), grid_of(Q4_1, plugins)
    assert torch.equal(found.weight(grid), weight)
    assert torch.equal(found.codes.long(), codes)
    (parameters,) = found.parameters
    assert torch.equal(parameters.scale, scale)
    assert parameters.offset is not None
    assert torch.equal(parameters.offset, offset)
    assert torch.equal(stored_blocks(packed(found.codes, parameters, 4), "Q4_1"), blocks)


def test_random_blocks_are_decoded_by_the_official_package_as_by_qtool(plugins: Plugins) -> None:
    weight = torch.randn(20, 96, generator=torch.Generator().manual_seed(2)) * torch.logspace(-4, 1, 20).unsqueeze(1)
    found = rounded(weight, Q4_1, plugins)
    blocks = stored_blocks(packed(found.codes, found.parameters[0], 4), "Q4_1")
    theirs = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q4_1)
    assert np.array_equal(theirs, found.weight(grid_of(Q4_1, plugins)).numpy())


def test_a_range_far_from_0_is_used_whole(plugins: Plugins) -> None:
    groups = 5 + torch.rand(50, 16, generator=torch.Generator().manual_seed(0))
    fmt = plugins.format("int2")

    def error(text: str) -> float:
        scheme = parse_tensor_scheme(text, plugins.format)
        return float((fmt.round(groups, fmt.fit(groups, scheme)) - groups).square().mean())

    assert error("int2-asym-g16-offset-sfp32") == pytest.approx(1 / 9 / 12, rel=0.3)
    assert error("int2-asym-g16-sfp32") > 10 * error("int2-asym-g16-offset-sfp32")
    assert error("int2-asym-g16-offset") < 1.1 * error("int2-asym-g16-offset-sfp32")


@pytest.mark.parametrize("scale_format", FLOATS)
@pytest.mark.parametrize("value", [0.0, 7.0, -7.0, 1e4, 1.0005, -3e-3])
def test_groups_of_one_value_and_narrow_ranges_lose_digits_only(
    scale_format: ScaleFormat, value: float, plugins: Plugins
) -> None:
    """The rounding of the offset, above or below, is what the step reaches over."""
    fmt, scheme = plugins.format("int4"), TensorScheme("int4", symmetric=False, scale=scale_format, offset=True)
    precision = {"fp32": 2.0**-23, "bf16": 2.0**-8, "fp16": 2.0**-11}[scale_format]
    same = torch.full((1, 8), value)
    assert float((fmt.round(same, fmt.fit(same, scheme)) - same).abs().max()) <= abs(value) * precision**1.7 + 2.0**-25
    narrow = same + torch.linspace(0, 1e-6, 8)
    error = (fmt.round(narrow, fmt.fit(narrow, scheme)) - narrow).abs().max()
    assert float(error) <= 1e-6 + abs(value) * precision / 10 + 2.0**-24


def test_values_that_all_lie_below_their_rounded_offset_have_a_negative_step(plugins: Plugins) -> None:
    fmt, scheme = plugins.format("int4"), TensorScheme("int4", symmetric=False, scale="bf16", offset=True)
    values = torch.tensor([[1.0040, 1.0050]])
    fitted = fmt.fit(values, scheme)
    assert fitted.offset is not None
    assert float(fitted.offset) > 1.0050 > float(fitted.offset + 15 * fitted.scale)
    torch.testing.assert_close(fmt.round(values, fitted), values, rtol=0, atol=1.5e-4)


def test_values_beyond_float16_are_clamped() -> None:
    scale, offset = fit_offset(torch.tensor([[-1e5, 1e5]]), num_bits=8, scale_format="fp16")
    assert float(offset) == -65504
    assert float(scale) == pytest.approx(165504 / 255, rel=2**-11)


def test_a_clip_keeps_the_middle() -> None:
    scale, offset = fit_offset(torch.tensor([[2.0, 3.0, 4.0, 6.0]]), num_bits=2, scale_format="fp32", clip=0.5)
    assert float(offset) == 3
    assert float(scale) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        (Q4_1, torch.float16),
        ("int2-asym-g16-offset", torch.bfloat16),
        ("int3-asym-tensor-offset-sfp16", torch.float16),
        ("int6-asym-channel-offset-sfp32", torch.float32),
    ],
)
def test_offsets_are_stored_as_scales_are_and_counted(text: str, dtype: torch.dtype, plugins: Plugins) -> None:
    scheme = parse_tensor_scheme(text, plugins.format)
    assert parse_tensor_scheme(str(scheme), plugins.format) == scheme
    grid, fmt = grid_of(text, plugins), plugins.format(scheme.format)
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)) + 0.3
    found = rounded(weight, text, plugins)
    stored = linear_tensors("one", found, grid)
    assert sorted(stored) == ["one.codes", "one.offset", "one.scale"]
    assert stored["one.offset"].dtype == stored["one.scale"].dtype == dtype
    assert stored["one.offset"].shape == stored["one.scale"].shape
    counted: dict[str, int] = {}
    for name, tensor in stored.items():
        counted[part_of(name)] = counted.get(part_of(name), 0) + tensor.nbytes
    assert foreseen_bytes(scheme, fmt, 3, 64) == counted
    assert counted["zeros"] == counted["scales"]
    assert torch.equal(read_linear("one", 64, stored, grid).weight(grid), found.weight(grid))


@pytest.mark.parametrize("method", [GPTQ, LDLQ])
def test_solvers_beat_rounding_and_choose_codes_against_what_is_stored(
    method: type[GPTQ | LDLQ], plugins: Plugins
) -> None:
    generator = torch.Generator().manual_seed(4)
    mixed = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    weight, hessian = torch.randn(12, 64, generator=generator) + 0.2, mixed.T @ mixed / 300
    grid = grid_of("int3-asym-g16-offset", plugins)
    problem = LayerProblem("one", weight, grid, hessian, global_scales=(None,))
    solved, nearest = method().quantize(problem, method.Config()), RTN().quantize(problem, ClipOptions())

    def loss(one: QuantizedLinear) -> float:
        error = weight - one.weight(grid)
        return float((error @ hessian * error).sum())

    assert loss(solved) < 0.9 * loss(nearest)
    back = read_linear("one", 64, linear_tensors("one", solved, grid), grid)
    assert torch.equal(back.weight(grid), solved.weight(grid))


@pytest.mark.parametrize(
    ("text", "message", "nearest"),
    [
        ("int4-sym-g16-offset", "asymmetric integers", "int4-sym-g16-sbf16"),
        ("int4-asym-g16-real-offset", "none to be `real`", "int4-asym-g16-offset-sbf16"),
        ("fp4-asym-g16-offset", "asymmetric integers", "fp4-asym-g16-sfp32"),
        ("nvfp4-offset", "asymmetric integers", "nvfp4-sym-g16-se4m3"),
        ("int4-asym-g16-offset-se8m0", "without zero points", "int4-sym-g16-se8m0"),
        ("int4-asym-g16-offset-scales3g16", "not with an offset", "int4-asym-g16-sbf16-scales3g16"),
        ("int8-asym-tensor-offset-static", "are whole numbers", "int8-asym-tensor-sbf16-static"),
        ("int4-asym-offset-full", "a rule for symmetric integers", "int4-asym-channel-offset-sbf16"),
    ],
)
def test_what_has_no_offset_is_refused(text: str, message: str, nearest: str, plugins: Plugins) -> None:
    with pytest.raises(SchemeError, match=message) as refused:
        parse_tensor_scheme(text, plugins.format)
    assert refused.value.hint.endswith(nearest)
    parse_tensor_scheme(nearest, plugins.format)


def test_schemes_without_one_are_written_as_before(plugins: Plugins) -> None:
    plain = parse_tensor_scheme("int4-asym-g32", plugins.format)
    assert str(replace(plain, offset=True)) == "int4-asym-g32-offset-sbf16"
    assert str(plain) == "int4-asym-g32-sbf16"
