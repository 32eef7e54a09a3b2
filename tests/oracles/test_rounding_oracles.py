"""The scalar formats against ml_dtypes and against worked examples."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from .rounding import (
    E2M1_VALUES,
    E4M3_VALUES,
    ExponentRule,
    Grid,
    IntRange,
    ScaleDtype,
    decode_e8m0,
    decode_int,
    decode_mxfp4,
    decode_nvfp4,
    encode_e2m1,
    encode_e4m3,
    encode_int,
    encode_mxfp4,
    encode_nvfp4,
    fit_int,
    int_grid,
    int_limits,
    mx_exponent,
    mxfp4_grid,
    nvfp4_global_scale,
    nvfp4_grid,
    store_scale,
)


def test_e2m1_and_e4m3_tables_match_ml_dtypes() -> None:
    e2m1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    e4m3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(np.array(E2M1_VALUES), e2m1)
    np.testing.assert_array_equal(np.signbit(E2M1_VALUES), np.signbit(e2m1))
    np.testing.assert_array_equal(np.array(E4M3_VALUES), e4m3)


def probes(values: list[float]) -> np.ndarray:
    """Return each value, each midpoint, their neighbours in float32, all with both signs."""
    grid = np.array(sorted(value for value in set(values) if value >= 0), dtype=np.float32)
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
    below, above = np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(1e9))
    points = np.concatenate([points, below, above])
    points = points[points <= grid.max()]
    return np.concatenate([points, -points])


def test_e2m1_encoding_matches_ml_dtypes() -> None:
    wide = np.concatenate([np.linspace(-9, 9, 1001), [np.inf, -np.inf]]).astype(np.float32)
    points = np.concatenate([probes(E2M1_VALUES), wide])
    expected = points.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 0xF
    assert [encode_e2m1(float(x)) for x in points] == expected.tolist()
    ties = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    assert {x: E2M1_VALUES[encode_e2m1(x)] for x in ties} == ties
    with pytest.raises(ValueError, match="NaN"):
        encode_e2m1(math.nan)


def test_e4m3_encoding_matches_ml_dtypes_and_saturates() -> None:
    points = probes([value for value in E4M3_VALUES if not math.isnan(value)])
    expected = points.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert [encode_e4m3(float(x)) for x in points] == expected.tolist()
    assert [E4M3_VALUES[encode_e4m3(x)] for x in (1e6, -math.inf, 470.0)] == [448.0, -448.0, 448.0]


def test_e8m0_matches_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal(np.array([decode_e8m0(int(code)) for code in codes]), expected)


@pytest.mark.parametrize(
    ("amax", "floor", "even", "rceil"),
    [
        (4.0, 0, 0, 0),
        (6.0, 0, 0, 0),
        (6.000001, 0, 0, 1),
        (6.999999, 0, 0, 1),
        (7.0, 0, 1, 1),
        (7.999999, 0, 1, 1),
        (8.0, 1, 1, 1),
        (3.0, -1, -1, -1),
        (3.1, -1, -1, 0),
        (0.0, -127, -127, -127),
        (2.0**-140, -127, -127, -127),
        (2.0**133, 127, 127, 127),
    ],
)
def test_shared_exponent_rules(amax: float, floor: int, even: int, rceil: int) -> None:
    rules: tuple[ExponentRule, ...] = ("floor", "even", "rceil")
    assert [mx_exponent([0.1 * amax, -amax], rule) for rule in rules] == [floor, even, rceil]


def test_shared_exponent_of_other_elements() -> None:
    def e4m3(amax: float) -> list[int]:
        rules: tuple[ExponentRule, ...] = ("floor", "even", "rceil")
        return [mx_exponent([amax], r, element_emax=8, element_max=448.0, mantissa_bits=3) for r in rules]

    assert e4m3(448.0) == [0, 0, 0]
    assert e4m3(480.0) == [0, 0, 1]
    assert e4m3(496.0) == [0, 1, 1]


@pytest.mark.parametrize("rule", ["floor", "even"])
def test_mxfp4_is_idempotent_and_follows_powers_of_two(rule: ExponentRule) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        block = (rng.standard_normal(32) * math.exp(rng.standard_normal())).tolist()
        scale_code, codes = encode_mxfp4(block, rule)
        assert encode_mxfp4(decode_mxfp4(scale_code, codes), rule) == (scale_code, codes)
        assert encode_mxfp4([8 * x for x in block], rule) == (scale_code + 3, codes)
        scaled = np.array(block) / 2.0 ** (scale_code - 127)
        nibbles = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 0xF
        assert codes == nibbles.tolist()


def test_nvfp4_levels() -> None:
    rng = np.random.default_rng(1)
    tensor = [(rng.standard_normal(16) * 0.05).tolist() for _ in range(20)]
    flat = [x for block in tensor for x in block]
    global_scale = nvfp4_global_scale(flat)
    assert global_scale == float(np.float32(max(map(abs, flat)) / 2688))
    for block in tensor:
        scale_code, codes = encode_nvfp4(block, global_scale)
        scale = float(np.uint8(scale_code).view(ml_dtypes.float8_e4m3fn))
        assert scale * global_scale * 6 == pytest.approx(max(map(abs, block)), rel=2**-4 * (1 + 1e-6))
        scaled = (np.array(block) / (scale * global_scale)).astype(ml_dtypes.float4_e2m1fn)
        assert codes == (scaled.view(np.uint8) & 0xF).tolist()
        values = decode_nvfp4(scale_code, codes, global_scale)
        nibbles = np.array(codes, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        np.testing.assert_allclose(values, nibbles * scale * global_scale, rtol=1e-15)
        assert encode_nvfp4(values, global_scale) == (scale_code, codes)
        if max(map(abs, block)) == max(map(abs, flat)):
            assert scale == 448.0
    assert decode_nvfp4(*encode_nvfp4([0.0] * 16, global_scale), global_scale) == [0.0] * 16
    assert decode_nvfp4(*encode_nvfp4([1e-9] * 16, 1.0), 1.0) == [0.0] * 16
    assert nvfp4_global_scale([0.0, 0.0]) == 1.0


def test_grids_wrap_the_block_formats() -> None:
    weight = np.random.default_rng(5).standard_normal((3, 16)) * 0.1
    rows, tensor = weight.tolist(), torch.from_numpy(weight)

    def through(grid: Grid) -> tuple[list[list[int]], list[list[float]]]:
        scale, zero = grid.fit(tensor)
        codes = [grid.encode(column, scale, zero) for column in tensor.T]
        values = [grid.decode(column, scale, zero) for column in codes]
        return torch.stack(codes, dim=1).tolist(), torch.stack(values, dim=1).tolist()

    blocks = [encode_nvfp4(row, 2.0**-10) for row in rows]
    assert through(nvfp4_grid(2.0**-10)) == (
        [codes for _, codes in blocks],
        [decode_nvfp4(s, codes, 2.0**-10) for s, codes in blocks],
    )
    blocks = [encode_mxfp4(row, "rceil") for row in rows]
    assert through(mxfp4_grid("rceil")) == (
        [codes for _, codes in blocks],
        [decode_mxfp4(s, codes) for s, codes in blocks],
    )
    fits = [fit_int(row, 3, "asym", "float16") for row in rows]
    integers = [[encode_int(x, s, z, (0, 7)) for x in row] for row, (s, z) in zip(rows, fits, strict=True)]
    assert through(int_grid(3, "asym", "float16")) == (
        integers,
        [[decode_int(code, s, z) for code in row] for row, (s, z) in zip(integers, fits, strict=True)],
    )


@pytest.mark.parametrize("kind", ["tight", "full", "half", "signed_full", "asym"])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_integer_error_is_at_most_half_a_step_inside_the_range(num_bits: int, kind: IntRange) -> None:
    rng = np.random.default_rng(num_bits)
    limits = int_limits(num_bits, kind)
    for shift in (-3.0, 0.0, 0.7, 3.0):
        block = (rng.standard_normal(64) + shift).tolist()
        scale, zero = fit_int(block, num_bits, kind, "float64")
        low, high = sorted(decode_int(code, scale, zero) for code in limits)
        for x in [*block, 0.0]:
            inside = min(max(x, low), high)
            error = decode_int(encode_int(x, scale, zero, limits), scale, zero) - inside
            assert abs(error) <= abs(scale) / 2 * (1 + 1e-9)
        assert decode_int(encode_int(0.0, scale, zero, limits), scale, zero) == 0.0


def test_integer_scales_of_a_known_block() -> None:
    block = [-3.0, 0.4, 1.5]
    assert fit_int(block, 4, "full", "float64") == (3.0 / 7, 0)
    assert fit_int(block, 4, "tight", "float64") == (3.0 / 8, 0)
    assert fit_int([3.0, -3.2, 1.5], 4, "tight", "float64") == (3.0 / 7, 0)
    assert fit_int(block, 4, "half", "float64") == (0.4, 0)
    assert fit_int(block, 4, "signed_full", "float64") == (3.0 / 8, 0)
    assert fit_int([3.0, -2.9, 1.5], 4, "signed_full", "float64") == (-3.0 / 8, 0)
    assert fit_int(block, 4, "asym", "float64") == (0.3, 10)
    assert fit_int([1.0, 1.5], 4, "asym", "float64") == (0.1, 0)
    assert fit_int([-1.5, -1.0], 4, "asym", "float64") == (0.1, 15)
    kinds: tuple[IntRange, ...] = ("tight", "half", "asym")
    assert [int_limits(4, kind) for kind in kinds] == [(-8, 7), (-8, 7), (0, 15)]
    codes = [encode_int(x, 0.4, 0, (-8, 7)) for x in (-3.0, 3.0, 0.2, 0.6000000001)]
    assert codes == [-8, 7, 0, 2]
    assert encode_int(-3.0, 0.3, 10, (0, 15)) == 0
    assert fit_int([0.0, 0.0], 4, "full") == (1.0, 0)
    assert fit_int([0.0, 0.0], 4, "asym") == (1.0, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "e4m3"])
def test_zero_point_uses_the_stored_scale(dtype: ScaleDtype) -> None:
    peers = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn}
    rng = np.random.default_rng(3)
    for _ in range(50):
        block = (rng.standard_normal(32) * 3).tolist()
        scale, zero = fit_int(block, 4, "asym", dtype)
        assert scale == float(peers[dtype]((max(block) - min(block)) / 15))
        assert zero == min(max(round(-min(block) / scale), 0), 15)
    assert store_scale(1e9, "e4m3") == 448.0


def refitted_error(kind: IntRange) -> float:
    """Return the largest change when quantized values are fitted and quantized once more."""
    block = np.random.default_rng(4).standard_normal(128).tolist()
    block[0] = 4.0
    scale, _ = fit_int(block, 4, kind, "float64")
    once = [decode_int(encode_int(x, scale, 0, (-8, 7)), scale, 0) for x in block]
    again, _ = fit_int(once, 4, kind, "float64")
    twice = [decode_int(encode_int(x, again, 0, (-8, 7)), again, 0) for x in once]
    return max(abs(a - b) for a, b in zip(once, twice, strict=True))


def test_refitting_is_idempotent_except_for_half() -> None:
    assert refitted_error("tight") < 1e-14
    assert refitted_error("full") < 1e-14
    assert refitted_error("signed_full") < 1e-14
    assert refitted_error("half") > 0.01
