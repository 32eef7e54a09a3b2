from __future__ import annotations

import pytest
import torch

from qtool.numerics.integers import (
    decode_integers,
    encode_integers,
    fit_asymmetric,
    fit_symmetric,
    round_integers,
)
from tests.oracles import rounding as oracle

BITS = [2, 3, 4, 5, 6, 7, 8]
STORED = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def groups_of(*shape: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + shift


def fit(groups: torch.Tensor, kind: str, bits: int, scale_format: str = "fp32", clip: float = 1.0) -> tuple:
    if kind == "asym":
        return fit_asymmetric(groups, num_bits=bits, scale_format=scale_format, clip=clip)
    scale = fit_symmetric(groups, num_bits=bits, range_rule=kind, scale_format=scale_format, clip=clip)
    return scale, None


@pytest.mark.parametrize("kind", ["tight", "full", "half", "signed_full", "asym"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_format", STORED)
def test_scalar_by_scalar_as_the_oracle_does_it(kind: str, bits: int, scale_format: str) -> None:
    groups = groups_of(6, 16, shift=0.3)
    scale, zero_point = fit(groups, kind, bits, scale_format)
    codes = encode_integers(groups, scale, zero_point, bits)
    values = decode_integers(codes, scale, zero_point, bits)
    limits = oracle.int_limits(bits, kind)
    for row in range(6):
        expected_scale, expected_zero = oracle.fit_int(groups[row].tolist(), bits, kind, STORED[scale_format])
        assert float(scale[row]) == pytest.approx(expected_scale, rel=2e-7)
        if zero_point is not None:
            assert int(zero_point[row]) == expected_zero
        for value, code, decoded in zip(groups[row].tolist(), codes[row].tolist(), values[row].tolist(), strict=True):
            if kind == "half" and abs(value) == float(groups[row].abs().max()):
                continue  # amax lies on a tie: which code it gets is up to the last bit of the scale
            expected = oracle.encode_int(value, expected_scale, expected_zero, limits)
            assert code + limits[0] == expected
            assert decoded == pytest.approx(oracle.decode_int(expected, expected_scale, expected_zero), rel=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_scales_by_hand(bits: int) -> None:
    qmax = 2 ** (bits - 1) - 1
    groups = torch.tensor([[0.5, -3.0, 1.0, 2.0]])
    assert float(fit(groups, "full", bits)[0]) == pytest.approx(3 / qmax)
    assert float(fit(groups, "tight", bits)[0]) == pytest.approx(max(2 / qmax, 3 / (qmax + 1)))
    assert float(fit(groups, "half", bits)[0]) == pytest.approx(3 / (qmax + 0.5))
    scale, zero_point = fit(groups, "asym", bits)
    assert float(scale) == pytest.approx(5 / (2**bits - 1))
    assert float(zero_point) == round(3 * (2**bits - 1) / 5)


@pytest.mark.parametrize("kind", ["tight", "full", "half", "asym"])
@pytest.mark.parametrize("bits", BITS)
def test_the_error_inside_the_range_is_half_a_step(kind: str, bits: int) -> None:
    groups = groups_of(8, 64, seed=bits)
    scale, zero_point = fit(groups, kind, bits)
    error = (round_integers(groups, scale, zero_point, bits) - groups).abs()
    slack = 1.5 if kind == "asym" else 1.0  # an end of the range moves by the rounding of the zero point
    assert (error <= scale.unsqueeze(-1) * 0.5 * slack * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", ["tight", "full", "half", "signed_full", "asym"])
@pytest.mark.parametrize("bits", BITS)
def test_all_codes_round_trip_and_rounding_is_decoding(kind: str, bits: int) -> None:
    scale, zero_point = fit(groups_of(5, 32, seed=1, shift=-0.4), kind, bits, "bf16")
    codes = torch.arange(2**bits).to(torch.uint8).repeat(5, 1)
    values = decode_integers(codes, scale, zero_point, bits)
    assert torch.equal(encode_integers(values, scale, zero_point, bits), codes)
    assert torch.equal(round_integers(values, scale, zero_point, bits), values)


def test_ties_go_to_even_and_the_ends_clamp() -> None:
    one = torch.ones(1)
    x = torch.tensor([[-9.0, -8.5, -0.5, 0.5, 1.5, 2.5, 7.5, 9.0]])
    assert encode_integers(x, one, None, 4).tolist() == [[0, 0, 8, 8, 10, 10, 15, 15]]
    assert round_integers(x, one, None, 4).tolist() == [[-8, -8, 0, 0, 2, 2, 7, 7]]
    zero_point = torch.tensor([3.0])
    assert encode_integers(x, one, zero_point, 4).tolist() == [[0, 0, 3, 3, 5, 5, 11, 12]]
    assert round_integers(x, one, zero_point, 4).tolist() == [[-3, -3, 0, 0, 2, 2, 8, 9]]


def test_only_full_reaches_the_lowest_code_by_clipping_alone() -> None:
    for bits, largest in [(4, 7.5), (8, 127.5)]:
        groups = torch.tensor([[-largest, 0.2, 0.4, 0.9]])
        for kind, clip, lowest in [("half", 1.0, 0), ("full", 1.0, 1), ("full", 0.8, 0), ("tight", 1.0, 0)]:
            scale, _ = fit(groups, kind, bits, clip=clip)
            assert int(encode_integers(groups, scale, None, bits).min()) == lowest


@pytest.mark.parametrize("bits", BITS)
def test_half_alone_cannot_be_fitted_again(bits: int) -> None:
    """Regression: the top code of ``half`` decodes inside the range, so a second fit would shrink it."""
    groups = groups_of(16, 64, seed=3).abs()  # the largest magnitude is positive
    for kind in ("tight", "full", "half"):
        scale, _ = fit(groups, kind, bits, "bf16")
        rounded = round_integers(groups, scale, None, bits)
        again, _ = fit(rounded, kind, bits, "fp32")
        if kind != "half":
            assert torch.allclose(again, scale, rtol=1e-6)
        else:
            assert (again < scale * 0.999).all()
        assert torch.equal(round_integers(rounded, scale, None, bits), rounded)


@pytest.mark.parametrize("kind", ["tight", "full", "half", "signed_full", "asym"])
def test_groups_of_zeros_decode_to_zero(kind: str) -> None:
    groups = torch.zeros(2, 8)
    for scale_format in ("fp32", "fp16", "bf16"):
        scale, zero_point = fit(groups, kind, 4, scale_format)
        assert scale.tolist() == [1, 1]
        codes = encode_integers(groups, scale, zero_point, 4)
        assert decode_integers(codes, scale, zero_point, 4).tolist() == groups.tolist()


@pytest.mark.parametrize("shift", [-5.0, -0.5, 0.0, 0.5, 5.0])
def test_zero_has_a_code_of_its_own(shift: float) -> None:
    groups = groups_of(8, 16, seed=4, shift=shift)
    scale, zero_point = fit(groups, "asym", 4, "bf16")
    assert torch.equal(zero_point, zero_point.round())
    assert zero_point.min() >= 0
    assert zero_point.max() <= 15
    assert not round_integers(torch.zeros(8, 16), scale, zero_point, 4).any()


def test_the_range_is_widened_to_hold_zero() -> None:
    for groups, zero in [(torch.tensor([[3.0, 4.0, 5.0, 7.5]]), 0), (torch.tensor([[-7.5, -6.0, -5.0, -3.0]]), 15)]:
        scale, zero_point = fit(groups, "asym", 4)
        assert (float(scale), float(zero_point)) == (0.5, zero)
        assert torch.equal(round_integers(groups, scale, zero_point, 4), groups)


def test_the_zero_point_is_derived_from_the_stored_scale() -> None:
    groups = groups_of(400, 32, seed=5)
    scale, zero_point = fit(groups, "asym", 8, "bf16")
    low = groups.amin(-1)
    assert torch.equal(zero_point, (-low / scale).round().clamp(0, 255))
    exact = (groups.amax(-1) - low) / 255
    assert not torch.equal((-low / exact).round(), zero_point)


@pytest.mark.parametrize("kind", ["tight", "full", "half", "signed_full", "asym"])
@pytest.mark.parametrize("factor", [0.125, 64.0])
def test_powers_of_two_scale_exactly(kind: str, factor: float) -> None:
    groups = groups_of(8, 32, seed=6)
    for scale_format in ("fp32", "bf16"):
        scale, zero_point = fit(groups, kind, 4, scale_format)
        scaled, moved = fit(groups * factor, kind, 4, scale_format)
        assert torch.equal(scaled, scale * factor)
        codes = encode_integers(groups, scale, zero_point, 4)
        assert torch.equal(encode_integers(groups * factor, scaled, moved, 4), codes)


@pytest.mark.parametrize("kind", ["tight", "full", "half", "signed_full", "asym"])
def test_clip_keeps_a_fraction_of_the_range(kind: str) -> None:
    groups = groups_of(8, 32, seed=7)
    scale, zero_point = fit(groups, kind, 4)
    clipped, moved = fit(groups, kind, 4, clip=0.75)
    assert torch.allclose(clipped, scale * 0.75)
    if zero_point is not None:
        assert torch.equal(moved, zero_point)


@pytest.mark.parametrize("bits", BITS)
def test_signed_full_has_its_longer_end_at_the_largest_value(bits: int) -> None:
    groups = groups_of(64, 16, seed=11)
    scale, _ = fit(groups, "signed_full", bits)
    rounded, top = round_integers(groups, scale, None, bits), 2 ** (bits - 1) - 1
    largest = groups.abs().argmax(-1, keepdim=True)
    assert torch.allclose(rounded.gather(-1, largest), groups.gather(-1, largest))
    assert torch.equal(scale < 0, groups.gather(-1, largest).squeeze(-1) > 0)
    assert 0 < int((scale < 0).sum()) < 64
    step = scale.abs().unsqueeze(-1)
    inside = groups / scale.unsqueeze(-1) <= top
    assert ((rounded - groups).abs() <= step * torch.where(inside, 0.5, 1.0) * (1 + 1e-5)).all()
    assert not inside.all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_signed_full_loses_least_at_few_bits(bits: int) -> None:
    groups = groups_of(2000, 64, seed=12)
    lost = {}
    for kind in ("tight", "full", "half", "signed_full"):
        scale, _ = fit(groups, kind, bits, "bf16")
        lost[kind] = float((round_integers(groups, scale, None, bits) - groups).square().mean())
    assert lost["signed_full"] < 0.9 * min(lost[kind] for kind in ("tight", "full", "half"))


@pytest.mark.parametrize("bits", BITS)
def test_tight_is_the_least_scale_that_clips_nothing(bits: int) -> None:
    groups = groups_of(64, 16, seed=11, shift=0.2)
    scale, _ = fit(groups, "tight", bits)
    qmax = 2 ** (bits - 1) - 1

    def clips(step: torch.Tensor) -> torch.Tensor:
        return (groups.amax(-1) > step * qmax * (1 + 1e-6)) | (groups.amin(-1) < -step * (qmax + 1) * (1 + 1e-6))

    assert not clips(scale).any()
    assert clips(scale * 0.999).all()


def test_power_of_two_scales_of_integers_ignore_the_range_rule() -> None:
    groups = torch.tensor([[7.0], [7.4], [7.5], [8.0]])
    expected = {"floor": [1, 1, 1, 2], "even": [1, 1, 2, 2], "rceil": [1, 2, 2, 2]}
    for rule, scales in expected.items():
        for range_rule in ("tight", "full", "half"):
            scale = fit_symmetric(groups, num_bits=4, range_rule=range_rule, scale_format="e8m0", exponent_rule=rule)
            assert scale.tolist() == scales


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rounding_keeps_the_dtype_and_computes_in_float32(dtype: torch.dtype) -> None:
    groups = groups_of(4, 32, seed=8).to(dtype)
    scale, zero_point = fit(groups, "asym", 4)
    rounded = round_integers(groups, scale, zero_point, 4)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, round_integers(groups.float(), scale, zero_point, 4).to(dtype))


def test_inputs_are_left_alone() -> None:
    groups = groups_of(4, 32, seed=9)
    before = groups.clone()
    scale, zero_point = fit(groups, "asym", 4)
    kept = scale.clone(), zero_point.clone()
    codes = encode_integers(groups, scale, zero_point, 4)
    round_integers(groups, scale, zero_point, 4)
    decode_integers(codes, scale, zero_point, 4)
    assert torch.equal(groups, before)
    assert torch.equal(scale, kept[0])
    assert torch.equal(zero_point, kept[1])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_need_not_be_whole(bits: int) -> None:
    groups = groups_of(6, 16, shift=0.4)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / (2**bits - 1)
    zero_point = -low / scale
    codes = encode_integers(groups, scale, zero_point, bits)
    wide = groups.double() / scale.double()[:, None] + zero_point.double()[:, None]
    clear = (wide - wide.round()).abs() < 0.499
    assert torch.equal(codes[clear], wide.round().clamp(0, 2**bits - 1).to(torch.uint8)[clear])
    values = decode_integers(codes, scale, zero_point, bits)
    assert float(((values - groups).abs() / scale[:, None]).max()) <= 0.5 + 1e-4
    assert torch.equal(round_integers(groups, scale, zero_point, bits), values)
    assert torch.equal(encode_integers(values, scale, zero_point, bits), codes)


def test_ties_under_whole_zero_points_are_those_of_the_values() -> None:
    groups = torch.tensor([[0.5, 1.5, 2.5, -0.5]])
    codes = encode_integers(groups, torch.ones(1), torch.tensor([3.0]), 4)
    assert codes.tolist() == [[3, 5, 5, 3]]
