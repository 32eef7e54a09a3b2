from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

from qtool.numerics.minifloats import (
    E1M2,
    E2M1,
    E2M3,
    E3M0,
    E3M2,
    E4M3,
    E5M2,
    UE5M3,
    Minifloat,
    decode_e8m0,
    encode_e8m0,
    shared_exponents,
)
from tests.oracles import llm_fp4
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
    [around(midpoints(E4M3.decode(all_bytes()))), around(torch.tensor([448.0, 464.0, 480.0, 1e9, torch.inf])), spread()]
)


@pytest.mark.parametrize(("value", "rounded"), E2M1_TIES.items())
def test_e2m1_ties_go_to_the_even_code(value: float, rounded: float) -> None:
    assert E2M1.round(torch.tensor([value, -value])).tolist() == [rounded, -rounded]
    assert E2M1.decode(E2M1.encode(torch.tensor([value, -value]))).tolist() == [rounded, -rounded]


def test_e2m1_codes_are_those_of_ml_dtypes() -> None:
    expected = E2M1_PROBES.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(E2M1.encode(E2M1_PROBES).numpy(), expected)


def test_e2m1_codes_are_those_of_an_exhaustive_search() -> None:
    probes = E2M1_PROBES[:: max(1, E2M1_PROBES.numel() // 2000)]
    assert E2M1.encode(probes).tolist() == [oracle.encode_e2m1(value) for value in probes.tolist()]


def test_e2m1_rounding_is_decoding_the_code() -> None:
    assert torch.equal(E2M1.round(E2M1_PROBES), E2M1.decode(E2M1.encode(E2M1_PROBES)))


def test_all_e2m1_codes_round_trip() -> None:
    codes = torch.arange(16).to(torch.uint8)
    values = E2M1.decode(codes)
    assert torch.equal(E2M1.encode(values), codes)
    assert np.array_equal(values.numpy(), codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    assert values[8].signbit()


def test_e2m1_rounding_keeps_nan_and_its_input() -> None:
    x = torch.tensor([torch.nan, 2.2, -9.0])
    before = x.clone()
    rounded = E2M1.round(x)
    assert rounded[0].isnan()
    assert rounded[1:].tolist() == [2.0, -6.0]
    assert torch.equal(x[1:], before[1:])


def test_e4m3_codes_are_those_of_ml_dtypes_after_saturation() -> None:
    saturated = E4M3_PROBES.clamp(-448, 448).numpy()
    expected = saturated.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(E4M3.encode(E4M3_PROBES).numpy(), expected)
    assert torch.equal(E4M3.round(E4M3_PROBES), E4M3.decode(E4M3.encode(E4M3_PROBES)))


def test_e4m3_codes_are_those_of_an_exhaustive_search() -> None:
    probes = E4M3_PROBES[::97]
    assert E4M3.encode(probes).tolist() == [oracle.encode_e4m3(value) for value in probes.tolist()]


def test_all_finite_e4m3_codes_round_trip() -> None:
    codes = all_bytes()
    values = E4M3.decode(codes)
    assert codes[values.isnan()].tolist() == [127, 255]
    assert torch.equal(E4M3.encode(values)[~values.isnan()], codes[~values.isnan()])
    assert np.array_equal(
        values.numpy(), codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32), equal_nan=True
    )


KINDS = [
    (E2M1, ml_dtypes.float4_e2m1fn),
    (E2M3, ml_dtypes.float6_e2m3fn),
    (E3M2, ml_dtypes.float6_e3m2fn),
    (E4M3, ml_dtypes.float8_e4m3fn),
    (E5M2, ml_dtypes.float8_e5m2),
]


def codes_of(kind: Minifloat) -> torch.Tensor:
    return torch.arange(2 ** (kind.exponent_bits + kind.mantissa_bits + kind.signed)).to(torch.uint8)


def probes_of(kind: Minifloat) -> torch.Tensor:
    """Return all midpoints and their neighbours, what saturates, and random values of many magnitudes."""
    return torch.cat(
        [
            around(midpoints(kind.decode(codes_of(kind)))),
            around(kind.max_value * torch.tensor([1.0, 1.03, 1.07, 1.5, 1e6, torch.inf])),
            spread() * kind.max_value / 100,
            torch.tensor([0.0, -0.0, 1e-40, -1e-40]),
        ]
    )


BY_HAND = [
    (E1M2, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]),  # S.e.mm: below 2 the mantissa counts halves, above likewise
    (E3M0, [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]),  # S.eee.: 2^(e - 3), and 0
]


@pytest.mark.parametrize(("kind", "values"), BY_HAND)
def test_bits_of_the_other_floats_of_4_bits(kind: Minifloat, values: list[float]) -> None:
    table = torch.tensor([*values, *(-value for value in values)])
    assert torch.equal(kind.decode(codes_of(kind)), table)
    assert torch.equal(kind.decode(codes_of(kind)).signbit(), table.signbit())
    assert kind.encode(table).tolist() == list(range(16))
    assert (kind.min_value, kind.max_value) == (values[1], values[-1])


@pytest.mark.parametrize(("kind", "values"), BY_HAND)
def test_they_round_as_llm_fp4s_quantizer(kind: Minifloat, values: list[float]) -> None:
    fields, bias = (kind.exponent_bits, kind.mantissa_bits), 2 ** (kind.exponent_bits - 1) - 1
    probes = probes_of(kind)[::7].clamp(-1e9, 1e9)
    expected = [llm_fp4.quantize(value, bias, *fields) for value in probes.tolist()]
    assert kind.round(probes).tolist() == expected
    assert torch.equal(kind.decode(kind.encode(probes)), kind.round(probes))
    assert set(map(abs, expected)) == set(values)


def test_without_a_mantissa_ties_go_to_the_larger_of_two_powers_of_two() -> None:
    ties = torch.tensor([0.125, 0.375, 0.75, 1.5, 3.0, 6.0, 12.0])
    assert E3M0.round(torch.cat([ties, -ties])).tolist() == [0, 0.5, 1, 2, 4, 8, 16, 0, -0.5, -1, -2, -4, -8, -16]
    assert E3M0.encode(ties).tolist() == [0, 2, 3, 4, 5, 6, 7]
    assert E3M0.round(torch.nextafter(ties, -INFINITY)).tolist() == [0, 0.25, 0.5, 1, 2, 4, 8]


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_every_code_decodes_as_in_ml_dtypes(kind: Minifloat, dtype: type) -> None:
    codes = codes_of(kind)
    theirs = codes.numpy().view(dtype).astype(np.float32)
    assert np.array_equal(kind.decode(codes).numpy(), theirs, equal_nan=True)
    finite = kind.decode(codes).isfinite()
    assert torch.equal(kind.encode(kind.decode(codes))[finite], codes[finite])
    assert float(kind.decode(codes)[finite].max()) == kind.max_value


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_values_encode_as_in_ml_dtypes_after_saturation(kind: Minifloat, dtype: type) -> None:
    probes = probes_of(kind)
    expected = probes.clamp(-kind.max_value, kind.max_value).numpy().astype(dtype).view(np.uint8)
    assert np.array_equal(kind.encode(probes).numpy(), expected)
    assert torch.equal(kind.round(probes), kind.decode(kind.encode(probes)))


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_torchs_own_bytes_are_those_of_the_formula(kind: Minifloat, dtype: type) -> None:
    plain = replace(kind, native=None)
    assert torch.equal(plain.encode(probes_of(kind)), kind.encode(probes_of(kind)))
    finite = kind.decode(codes_of(kind)).isfinite()
    assert torch.equal(plain.decode(codes_of(kind))[finite], kind.decode(codes_of(kind))[finite])
    assert not plain.decode(codes_of(kind))[~finite].isfinite().any()


def test_a_float_without_a_sign_has_one_more_bit_of_exponent() -> None:
    codes = codes_of(UE5M3)
    values = UE5M3.decode(codes)
    expected = torch.tensor([oracle.float_value(code, 5, 3, 15) for code in range(256)])
    assert values[255].isnan()
    assert torch.equal(values[:255], expected[:255])
    assert torch.equal(UE5M3.encode(values[:255]), codes[:255])
    probes = probes_of(UE5M3).abs()
    shared = probes[(probes >= 2.0**-14) & (probes <= 57344)]
    theirs = shared.numpy().astype(ml_dtypes.float8_e4m3).astype(np.float32)
    inside = (shared >= 2.0**-6) & (shared < 240)
    assert np.array_equal(UE5M3.round(shared[inside]).numpy(), theirs[inside.numpy()])
    assert torch.equal(UE5M3.round(probes), UE5M3.decode(UE5M3.encode(probes)))
    assert UE5M3.encode(torch.tensor([-1.0, -0.0, 1e9])).tolist() == [0, 0, 254]


def test_all_e8m0_codes_round_trip() -> None:
    codes = all_bytes()[:255]
    values = decode_e8m0(codes)
    assert [float(v) for v in values] == [2.0 ** (code - 127) for code in range(255)]
    theirs = all_bytes().numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(decode_e8m0(all_bytes()).numpy(), theirs, equal_nan=True)
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
