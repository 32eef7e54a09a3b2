"""Zero points that are real numbers: the formulas number by number, what is stored, and who refuses them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qtool.builtin.mitigators.spqr import SpQR, SpQRConfig
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.engine.stored import linear_tensors, read_linear
from qtool.errors import SchemeError
from qtool.numerics.integers import fit_asymmetric, fit_real
from qtool.plugins import Plugins
from qtool.scheme import GroupParameters, ScaleFormat, TensorScheme, parse_tensor_scheme

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale_format", FLOATS)
def test_the_formulas(bits: int, scale_format: ScaleFormat) -> None:
    dtype = FLOATS[scale_format]
    groups = torch.randn(40, 16, generator=torch.Generator().manual_seed(bits)) + 1
    scale, zero = fit_real(groups, num_bits=bits, scale_format=scale_format)
    for row, s, z in zip(groups.tolist(), scale.tolist(), zero.tolist(), strict=True):
        counted = {"fp32": 2**24, "bf16": 256, "fp16": 2048}[scale_format]
        width = max((max(row) - min(row)) / (2**bits - 1), max(map(abs, row)) / counted)
        step = torch.tensor(width).to(dtype)
        assert s == pytest.approx(float(step), rel=2e-7)
        assert z == pytest.approx(float(torch.tensor(-min(row) / s).to(dtype)), rel=2e-7)
    assert torch.equal(scale.to(dtype).float(), scale)
    assert torch.equal(zero.to(dtype).float(), zero)


def test_a_range_far_from_0_is_used_whole(plugins: Plugins) -> None:
    groups = 5 + torch.rand(50, 16, generator=torch.Generator().manual_seed(0))
    fmt = plugins.format("int2")

    def error(text: str) -> float:
        scheme = parse_tensor_scheme(text, plugins.format)
        return float((fmt.round(groups, fmt.fit(groups, scheme)) - groups).square().mean())

    assert error("int2-asym-g16-real-sfp32") == pytest.approx(1 / 9 / 12, rel=0.3)
    assert error("int2-asym-g16-sfp32") > 10 * error("int2-asym-g16-real-sfp32")
    assert error("int2-asym-g16-real") < 1.1 * error("int2-asym-g16-real-sfp32")


@pytest.mark.parametrize("scale_format", FLOATS)
@pytest.mark.parametrize("value", [0.0, 7.0, -7.0, 1e4])
def test_groups_of_one_value_and_ranges_too_far_away(scale_format: ScaleFormat, value: float, plugins: Plugins) -> None:
    """Nothing may be lost but digits: half a step of a step that is no wider than the format's own rounding."""
    fmt = plugins.format("int4")
    scheme = TensorScheme("int4", symmetric=False, scale=scale_format, real=True)
    same = torch.full((1, 8), value)
    precision = {"fp32": 2.0**-23, "bf16": 2.0**-8, "fp16": 2.0**-11}[scale_format]
    assert float((fmt.round(same, fmt.fit(same, scheme)) - same).abs().max()) <= abs(value) * precision
    narrow = same + torch.linspace(0, 1e-6, 8)
    error = (fmt.round(narrow, fmt.fit(narrow, scheme)) - narrow).abs().max()
    assert float(error) <= 1e-6 + 2 * abs(value) * precision


def test_a_clip_keeps_the_middle() -> None:
    groups = torch.tensor([[2.0, 3.0, 4.0, 6.0]])
    scale, zero = fit_real(groups, num_bits=2, scale_format="fp32", clip=0.5)
    assert float(scale) == pytest.approx(2 / 3)
    assert float(zero) == pytest.approx(-3 / (2 / 3))


@pytest.mark.parametrize(
    ("text", "dtype", "bits"),
    [
        ("int2-asym-g16-real", torch.bfloat16, 16),
        ("int2-asym-g16-real-sfp16", torch.float16, 16),
        ("int6-asym-channel-real-sfp32", torch.float32, 32),
        ("int2-asym-g16", torch.uint8, 2),
    ],
)
def test_zero_points_are_stored_as_scales_are(text: str, dtype: torch.dtype, bits: int, plugins: Plugins) -> None:
    scheme = parse_tensor_scheme(text, plugins.format)
    assert parse_tensor_scheme(str(scheme), plugins.format) == scheme
    grid = Grid.of(scheme, plugins.format(scheme.format))
    (part,) = grid.parts
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)) + 0.3
    parameters = part.fit(part.groups(weight), global_scale=None)
    codes = part.format.encode(part.groups(weight), parameters).reshape(3, 64)
    stored = linear_tensors("one", QuantizedLinear(codes, (parameters,)), grid)
    zeros = stored["one.zero_point"]
    assert zeros.dtype == dtype
    groups = 3 * scheme.groups_of(64, layer="one")
    assert zeros.nbytes * 8 == groups * bits
    back = read_linear("one", 64, stored, grid)
    assert torch.equal(back.weight(grid), grid.decode(codes, (parameters,)))


def test_zero_points_with_more_digits_are_never_rounded_on_storing(plugins: Plugins) -> None:
    scheme = parse_tensor_scheme("int4-asym-channel-real", plugins.format)
    grid = Grid.of(scheme, plugins.format("int4"))
    (part,) = grid.parts
    weight = torch.randn(2, 8)
    parameters = replace(part.fit(part.groups(weight), global_scale=None), zero_point=torch.full((2, 1), 1.234567))
    linear = QuantizedLinear(torch.zeros(2, 8, dtype=torch.uint8), (parameters,))
    back = read_linear("one", 8, linear_tensors("one", linear, grid), grid)
    assert torch.equal(back.weight(grid), linear.weight(grid))


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("int4-sym-g16-real", "int4-sym-g16-sbf16"),
        ("fp4-asym-g16-real", "fp4-asym-g16-sfp32"),
        ("nvfp4-real", "nvfp4-sym-g16-se4m3"),
        ("int4-asym-g16-real-se8m0", "int4-sym-g16-se8m0"),
    ],
)
def test_what_has_no_such_zero_points_is_refused(text: str, nearest: str, plugins: Plugins) -> None:
    with pytest.raises(SchemeError) as refused:
        parse_tensor_scheme(text, plugins.format)
    assert refused.value.hint.endswith(nearest)
    parse_tensor_scheme(nearest, plugins.format)


def test_whole_zero_points_are_as_they_were() -> None:
    groups = torch.randn(9, 16, generator=torch.Generator().manual_seed(3))
    _, zero = fit_asymmetric(groups, num_bits=3, scale_format="bf16")
    assert torch.equal(zero, zero.round())


def test_a_real_zero_point_that_happens_to_be_whole_is_stored_as_the_others(plugins: Plugins) -> None:
    scheme = parse_tensor_scheme("int4-asym-channel-real", plugins.format)
    grid = Grid.of(scheme, plugins.format("int4"))
    parameters = GroupParameters(torch.ones(2, 1), torch.full((2, 1), 3.0))
    linear = QuantizedLinear(torch.zeros(2, 8, dtype=torch.uint8), (parameters,))
    stored = linear_tensors("one", linear, grid)
    assert stored["one.zero_point"].dtype == torch.bfloat16
    assert torch.equal(read_linear("one", 8, stored, grid).weight(grid), linear.weight(grid))


def test_spqr_rounds_them_to_what_is_stored(plugins: Plugins) -> None:
    generator = torch.Generator().manual_seed(4)
    weight, inputs = torch.randn(6, 32, generator=generator), torch.randn(100, 32, generator=generator)
    grid = Grid.of(parse_tensor_scheme("int3-asym-g8-real", plugins.format), plugins.format("int3"))
    problem = LayerProblem("one", weight, grid, inputs.T @ inputs / 100, global_scales=(None,))
    solved = SpQR().quantize(problem, SpQRConfig(tau=None))
    stored = linear_tensors("one", solved, grid)
    assert stored["one.zero_point"].dtype == torch.bfloat16
    assert torch.equal(read_linear("one", 32, stored, grid).weight(grid), solved.weight(grid))
