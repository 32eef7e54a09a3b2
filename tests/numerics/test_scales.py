from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from qtool.errors import SchemeError
from qtool.numerics.minifloats import E2M1, E4M3, UE5M3, decode_e8m0
from qtool.numerics.scales import (
    LARGEST_SHORT,
    decode_scale,
    encode_scale,
    fit_scale,
    fp4_global_scale,
    store_scale,
)
from tests.oracles import rounding as oracle

FORMATS = ["fp32", "fp16", "bf16", "e4m3", "ue5m3", "e5m2", "e2m1", "int4", "e8m0"]
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    **dict.fromkeys(("ue5m3", "e2m1", "int4", "e8m0"), torch.uint8),
}


def positive(seed: int = 0) -> torch.Tensor:
    return torch.rand(2000, generator=torch.Generator().manual_seed(seed)) * 3 + 1e-3


def global_of(scale_format: str) -> torch.Tensor | None:
    return torch.tensor(1 / 256) if scale_format in LARGEST_SHORT else None


@pytest.mark.parametrize(
    ("scale_format", "dtype"),
    [("fp32", np.float32), ("fp16", np.float16), ("bf16", ml_dtypes.bfloat16), ("e5m2", ml_dtypes.float8_e5m2)],
)
def test_float_scales_round_as_numpy_does(scale_format: str, dtype: type) -> None:
    scale = positive()
    expected = scale.numpy().astype(dtype).astype(np.float32)
    assert np.array_equal(store_scale(scale, scale_format).numpy(), expected)


def test_e4m3_scales_are_relative_to_the_global_scale() -> None:
    scale, global_scale = positive(), torch.tensor(3.0 / 448)
    expected = [oracle.store_scale(value, "e4m3") for value in (scale / global_scale).tolist()]
    assert store_scale(scale, "e4m3", global_scale=global_scale).tolist() == expected


def test_a_step_takes_the_nearest_power_of_two() -> None:
    step = torch.tensor([1.0, 1.4, 1.6, 0.74, 0.76, 3e-45])
    assert store_scale(step, "e8m0").tolist() == [1.0, 1.0, 2.0, 0.5, 1.0, 2.0**-127]


def test_four_bit_scales_are_the_nearest_of_their_values() -> None:
    scale, global_scale = positive(), torch.tensor(3.0 / 6)
    for scale_format, values in (("e2m1", E2M1.values[1:8]), ("int4", range(1, 16)), ("ue5m3", UE5M3.values[1:255])):
        relative, table = scale / global_scale, torch.tensor([*values]).float()
        expected = (relative.unsqueeze(-1) - table).abs().amin(-1)
        stored = store_scale(scale, scale_format, global_scale=global_scale)
        assert torch.equal((stored - relative).abs(), expected)
        assert set(encode_scale(table, scale_format).tolist()) == set(range(1, len(table) + 1))


def test_int4_scales_have_no_zero_and_ties_go_to_even() -> None:
    scale = torch.tensor([0.2, 0.5, 1.5, 2.5, 15.4, 99.0])
    assert store_scale(scale, "int4", global_scale=torch.tensor(1.0)).tolist() == [1, 1, 2, 2, 15, 15]


@pytest.mark.parametrize(("scale_format", "largest"), [("e2m1", 6), ("int4", 15), ("ue5m3", 114688), ("e4m3", 448)])
def test_the_multiplier_gives_the_largest_block_the_largest_scale(scale_format: str, largest: float) -> None:
    amax = torch.tensor([0.0371, 0.01])
    multiplier = fp4_global_scale(amax[0], scale_format)
    scale = fit_scale(amax, max_value=6.0, scale_format=scale_format, global_scale=multiplier)
    assert scale[0] == largest
    assert float(multiplier) == pytest.approx(0.0371 / 6 / largest)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_storing_twice_changes_nothing(scale_format: str) -> None:
    global_scale = global_of(scale_format)
    stored = store_scale(positive(), scale_format, global_scale=global_scale)
    step = stored if global_scale is None else stored * global_scale
    assert torch.equal(store_scale(step, scale_format, global_scale=global_scale), stored)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_what_is_stored_decodes_to_the_scale_bit_for_bit(scale_format: str) -> None:
    scale = store_scale(positive(), scale_format, global_scale=global_of(scale_format))
    stored = encode_scale(scale, scale_format)
    assert stored.dtype == DTYPES[scale_format]
    assert torch.equal(decode_scale(stored, scale_format), scale)


def test_stored_bytes_decode_as_their_formats_say() -> None:
    codes = torch.arange(1, 127).to(torch.uint8)
    assert torch.equal(decode_scale(codes.view(torch.float8_e4m3fn), "e4m3"), E4M3.decode(codes))
    assert torch.equal(encode_scale(E4M3.decode(codes), "e4m3").view(torch.uint8), codes)
    assert torch.equal(encode_scale(decode_e8m0(codes), "e8m0"), codes)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_scales_are_positive_and_finite_whatever_the_range(scale_format: str) -> None:
    scale = torch.tensor([0.0, 1e-45, 1e-38, 1e-12, 1e12, 3e38])
    stored = store_scale(scale, scale_format, global_scale=global_of(scale_format))
    assert stored[0] == 1
    assert stored.isfinite().all()
    assert (stored > 0).all()
    assert (stored[2:] >= stored[1:-1]).all()


@pytest.mark.parametrize("scale_format", FORMATS)
def test_zero_and_tiny_ranges_fit_a_finite_scale(scale_format: str) -> None:
    amax = torch.tensor([0.0, 1e-45, 1e-30])
    scale = fit_scale(amax, max_value=6.0, scale_format=scale_format, global_scale=global_of(scale_format))
    assert scale[0] == 1
    assert scale.isfinite().all()
    assert (scale > 0).all()


@pytest.mark.parametrize(
    ("scale_format", "least", "largest"), [("fp16", 2.0**-24, 65504.0), ("e5m2", 2.0**-16, 57344.0)]
)
def test_narrow_floats_keep_their_subnormals(scale_format: str, least: float, largest: float) -> None:
    """What would be stored as 0 is the least instead."""
    scale = torch.tensor([least / 4, least, least * 3, largest * 9])
    assert store_scale(scale, scale_format).tolist() == [least, least, least * 3, largest]


def test_nan_is_not_hidden() -> None:
    assert store_scale(torch.tensor([torch.nan]), "bf16").isnan().all()


@pytest.mark.parametrize("amax", [6.0, 0.0371, 1e-5, 123.4, 7e4, 1e-20])
def test_the_block_with_the_largest_value_has_the_largest_scale(amax: float) -> None:
    largest = torch.tensor(amax)
    scale = fit_scale(
        torch.stack([largest, largest / 448, largest / 1e9, largest * 0]),
        max_value=6.0,
        scale_format="e4m3",
        global_scale=fp4_global_scale(largest),
    )
    assert scale.tolist() == [448.0, 1.0, 2.0**-9, 1.0]


def test_the_global_scale_is_that_of_the_oracle() -> None:
    for value in (0.02, 1.0, 77.0, 0.0):
        assert float(fp4_global_scale(torch.tensor(value))) == oracle.nvfp4_global_scale([value, -value / 2])
    assert fp4_global_scale(torch.tensor(1e-40)) * 2.0**-9 >= torch.finfo(torch.float32).tiny


def test_power_of_two_scales_follow_the_rule() -> None:
    amax = torch.tensor([6.0, 6.9, 7.0, 8.0])
    for rule, expected in {"floor": [1, 1, 1, 2], "even": [1, 1, 2, 2], "rceil": [1, 2, 2, 2]}.items():
        assert fit_scale(amax, max_value=6.0, scale_format="e8m0", exponent_rule=rule).tolist() == expected


@pytest.mark.parametrize("scale_format", ["fp32", "e8m0", "bf16"])
def test_only_e4m3_has_a_global_scale(scale_format: str) -> None:
    one = torch.ones(1)
    with pytest.raises(SchemeError, match="have no global scale"):
        fit_scale(one, max_value=6.0, scale_format=scale_format, global_scale=torch.tensor(1.0))
    with pytest.raises(SchemeError, match="need a global scale"):
        fit_scale(one, max_value=6.0, scale_format="e4m3")
