from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from qtool.errors import SchemeError
from qtool.numerics.minifloats import decode_e4m3, decode_e8m0
from qtool.numerics.scales import (
    decode_scale,
    encode_scale,
    fit_scale,
    fp4_global_scale,
    store_scale,
)
from tests.oracles import rounding as oracle

FORMATS = ["fp32", "fp16", "bf16", "e4m3", "e8m0"]
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.uint8,
}


def positive(seed: int = 0) -> torch.Tensor:
    return torch.rand(2000, generator=torch.Generator().manual_seed(seed)) * 3 + 1e-3


def global_of(scale_format: str) -> torch.Tensor | None:
    return torch.tensor(1 / 256) if scale_format == "e4m3" else None


@pytest.mark.parametrize(
    ("scale_format", "dtype"), [("fp32", np.float32), ("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)]
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
    assert torch.equal(decode_scale(codes.view(torch.float8_e4m3fn), "e4m3"), decode_e4m3(codes))
    assert torch.equal(encode_scale(decode_e4m3(codes), "e4m3").view(torch.uint8), codes)
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
