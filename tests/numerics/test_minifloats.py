from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

from qtool.numerics.minifloats import (
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    encode_e2m1,
    encode_e4m3,
    encode_e8m0,
    round_e2m1,
    round_e4m3,
    shared_exponents,
)
from tests.oracles import rounding as oracle

INFINITY = torch.tensor(torch.inf)
E2M1_TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}


def around(points: torch.Tensor) -> torch.Tensor:
    """Return points with their float32 neighbours, of both signs."""
    near = torch.cat([points, torch.nextafter(points, INFINITY), torch.nextafter(points, -INFINITY)])
    return torch.cat([near, -near])


def midpoints(values: torch.Tensor) -> torch.Tensor:
    ordered = values[values.isfinite()].unique()
    return (ordered[1:] + ordered[:-1]) / 2


def spread(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(4096, generator=generator) * 10.0**k for k in range(-6, 5)])


def all_bytes() -> torch.Tensor:
    return torch.arange(256).to(torch.uint8)


E2M1_PROBES = torch.cat([around(torch.tensor([*E2M1_TIES, 6.0, 7.0, 0.0, 1e-40, torch.inf])), spread()])
E4M3_PROBES = torch.cat(
    [around(midpoints(decode_e4m3(all_bytes()))), around(torch.tensor([448.0, 464.0, 480.0, 1e9, torch.inf])), spread()]
)


@pytest.mark.parametrize(("value", "rounded"), E2M1_TIES.items())
def test_e2m1_ties_go_to_the_even_code(value: float, rounded: float) -> None:
    assert round_e2m1(torch.tensor([value, -value])).tolist() == [rounded, -rounded]
    assert decode_e2m1(encode_e2m1(torch.tensor([value, -value]))).tolist() == [rounded, -rounded]


def test_e2m1_codes_are_those_of_ml_dtypes() -> None:
    expected = E2M1_PROBES.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(encode_e2m1(E2M1_PROBES).numpy(), expected)


def test_e2m1_codes_are_those_of_an_exhaustive_search() -> None:
    probes = E2M1_PROBES[:: max(1, E2M1_PROBES.numel() // 2000)]
    assert encode_e2m1(probes).tolist() == [oracle.encode_e2m1(value) for value in probes.tolist()]


def test_e2m1_rounding_is_decoding_the_code() -> None:
    assert torch.equal(round_e2m1(E2M1_PROBES), decode_e2m1(encode_e2m1(E2M1_PROBES)))


def test_all_e2m1_codes_round_trip() -> None:
    codes = torch.arange(16).to(torch.uint8)
    values = decode_e2m1(codes)
    assert torch.equal(encode_e2m1(values), codes)
    assert np.array_equal(values.numpy(), codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    assert values[8].signbit()


def test_e2m1_rounding_keeps_nan_and_its_input() -> None:
    x = torch.tensor([torch.nan, 2.2, -9.0])
    before = x.clone()
    rounded = round_e2m1(x)
    assert rounded[0].isnan()
    assert rounded[1:].tolist() == [2.0, -6.0]
    assert torch.equal(x[1:], before[1:])


def test_e4m3_codes_are_those_of_ml_dtypes_after_saturation() -> None:
    saturated = E4M3_PROBES.clamp(-448, 448).numpy()
    expected = saturated.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(encode_e4m3(E4M3_PROBES).numpy(), expected)
    assert torch.equal(round_e4m3(E4M3_PROBES), decode_e4m3(encode_e4m3(E4M3_PROBES)))


def test_e4m3_codes_are_those_of_an_exhaustive_search() -> None:
    probes = E4M3_PROBES[::97]
    assert encode_e4m3(probes).tolist() == [oracle.encode_e4m3(value) for value in probes.tolist()]


def test_all_finite_e4m3_codes_round_trip() -> None:
    codes = all_bytes()
    values = decode_e4m3(codes)
    assert codes[values.isnan()].tolist() == [127, 255]
    assert torch.equal(encode_e4m3(values)[~values.isnan()], codes[~values.isnan()])
    assert np.array_equal(
        values.numpy(), codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32), equal_nan=True
    )


def test_all_e8m0_codes_round_trip() -> None:
    codes = all_bytes()[:255]
    values = decode_e8m0(codes)
    assert [float(v) for v in values] == [2.0 ** (code - 127) for code in range(255)]
    assert torch.equal(encode_e8m0(values), codes)
    assert decode_e8m0(all_bytes()[255:]).isnan().all()


def test_e8m0_never_writes_its_nan() -> None:
    assert encode_e8m0(torch.tensor([0.0, 1e-45, 3e38, torch.inf])).tolist() == [0, 0, 254, 254]


RULES = ("floor", "even", "rceil")
GRIDS = [(rule, *grid) for rule in RULES for grid in ((6.0, 2, 1), (1.0, 0, 0), (7.0, 2, 2), (127.0, 6, 6))]


# E4M3 has no row for `even`: its largest mantissa is not all ones, which gives the published rule two readings.
@pytest.mark.parametrize(
    ("rule", "max_value", "emax", "mantissa_bits"), [*GRIDS, ("floor", 448.0, 8, 3), ("rceil", 448.0, 8, 3)]
)
def test_shared_exponents_are_those_of_the_oracle(rule: str, max_value: float, emax: int, mantissa_bits: int) -> None:
    powers = 2.0 ** torch.arange(-20, 20)
    edges = torch.cat([powers, powers * 1.5, powers * 1.75, powers * 1.875, powers * max_value, powers * 1.984375])
    amax = torch.cat([around(edges)[: 3 * edges.numel()], spread()[::37].abs()])
    amax = torch.cat([amax, torch.tensor([2.0**-126, 3.4e38])])
    expected = [
        oracle.mx_exponent([value], rule, element_emax=emax, element_max=max_value, mantissa_bits=mantissa_bits)
        for value in amax.tolist()
    ]
    assert shared_exponents(amax, max_value=max_value, rule=rule).tolist() == expected


def test_even_is_the_rule_of_compressed_tensors() -> None:
    amax = torch.cat([spread().abs(), around(2.0 ** torch.arange(-9, 9) * 1.75)[:54]])
    exponents = shared_exponents(amax, max_value=6.0, rule="even")
    assert torch.equal(exponents + 127, generate_mx_scales(amax).int())


@pytest.mark.parametrize("max_value", [6.0, 448.0, 7.0])
def test_rceil_is_the_least_exponent_that_does_not_saturate(max_value: float) -> None:
    amax = torch.cat([around(2.0 ** torch.arange(-9, 9) * max_value)[:54], spread().abs()])
    scale = 2.0 ** shared_exponents(amax, max_value=max_value, rule="rceil").double()
    assert (amax.double() <= max_value * scale).all()
    assert (amax.double() > max_value * scale / 2).all()


@pytest.mark.parametrize("rule", RULES)
def test_powers_of_two_shift_the_exponent(rule: str) -> None:
    amax = spread().abs().clamp(min=1e-3, max=1e3)
    base = shared_exponents(amax, max_value=6.0, rule=rule)
    for k in (-9, 4):
        assert torch.equal(shared_exponents(amax * 2.0**k, max_value=6.0, rule=rule), base + k)


def test_even_reads_e4m3_as_half_way_to_the_next_power_of_two() -> None:
    amax = torch.tensor([448.0, 479.9, 480.0, 512.0])
    assert shared_exponents(amax, max_value=448.0, rule="even").tolist() == [0, 0, 1, 1]


def test_exponents_stay_in_range_and_zero_blocks_get_scale_one() -> None:
    amax = torch.tensor([0.0, 1e-45, 2.0**-127, 3.4e38, torch.inf])
    for rule in RULES:
        exponents = shared_exponents(amax, max_value=1.0, rule=rule)
        assert exponents[0] == 0
        assert exponents.min() >= -127
        assert exponents.max() <= 127
