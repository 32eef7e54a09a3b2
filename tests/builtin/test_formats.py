from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from qtool.errors import SchemeError
from qtool.numerics.groups import from_groups, to_groups
from qtool.numerics.levels import levels
from qtool.numerics.scales import decode_scale, encode_scale
from qtool.scheme import GroupParameters
from tests.builtin.format_cases import WRITTEN, fit, read, values_of
from tests.oracles import amxfp4
from tests.oracles import rounding as oracle


@pytest.mark.parametrize("text", WRITTEN)
def test_rounding_is_decoding_the_codes_and_is_idempotent(text: str) -> None:
    form, groups, parameters = fit(text, values_of(6, 128))
    codes = form.encode(groups, parameters)
    values = form.decode(codes, parameters)
    assert torch.equal(form.round(groups, parameters), values)
    assert torch.equal(form.round(values, parameters), values)
    assert int(codes.max()) < 2**form.bits
    assert (values - groups).norm() < groups.norm() * max(1.8 * 2.0 ** (1 - form.bits), 0.08)


@pytest.mark.parametrize("text", WRITTEN)
def test_all_codes_round_trip(text: str) -> None:
    form, _, parameters = fit(text, values_of(6, 128))
    rows = parameters.scale.shape
    codes = torch.arange(2**form.bits).to(torch.uint8)
    codes = codes[form.decode(codes.unsqueeze(0), GroupParameters(torch.ones(1)))[0].isfinite()]
    assert len(codes) >= 2**form.bits - 8
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
    assert torch.equal(decode_scale(stored, scheme.scale), parameters.scale)
    if scheme.scale == "e8m0":
        assert torch.equal(stored.view(torch.float8_e8m0fnu).float(), parameters.scale)
    assert (parameters.global_scale is not None) == (scheme.scale in ("e4m3", "ue5m3", "e2m1", "int4"))


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
    _, _, clipped = fit(text, values_of(6, 128), clip=0.1 if "search" in text else 0.4)
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


@pytest.mark.parametrize("kind", ["tight", "full", "half", "signed_full", "asym"])
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


@pytest.mark.parametrize("text", ["amxfp4", "amxfp4-se8m0"])
def test_amxfp4_is_the_oracle(text: str) -> None:
    x = values_of(8, 64)
    x[:4] += x[:4].abs().amax(1, keepdim=True)  # some groups are on one side of zero, and others lean to it
    x[0, :32], x[1, 0], x[2, 32:] = -x[0, :32], 0.0, 0.0
    form, groups, parameters = fit(text, x)
    codes = form.encode(groups, parameters)
    values, lean = form.decode(codes, parameters), 0
    assert parameters.negative is not None
    for row, group in itertools.product(range(8), range(2)):
        block = groups[row, group].tolist()
        above, below = amxfp4.shared_scales(block, power_of_two=text.endswith("e8m0"))
        assert (float(parameters.scale[row, group]), float(parameters.negative[row, group])) == (above, below)
        expected, decoded = amxfp4.round_block(block, power_of_two=text.endswith("e8m0"))
        assert codes[row, group].tolist() == expected
        assert values[row, group].tolist() == decoded
        lean += above != below
    assert lean > 8


def test_amxfp4_follows_groups_that_lean_to_one_side() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) + 1.5
    errors = {}
    for text in ("amxfp4-sfp32", "fp4-g32"):
        form, groups, parameters = fit(text, x)
        rounded = form.round(groups, parameters)
        errors[text] = {sign: float((rounded - groups)[groups * sign > 0].norm()) for sign in (1, -1)}
    assert errors["amxfp4-sfp32"][1] == errors["fp4-g32"][1]
    assert errors["amxfp4-sfp32"][-1] < 0.5 * errors["fp4-g32"][-1]


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
        stored: oracle.ScaleDtype = "bfloat16" if "bf16" in text else "float32"
        assert scale == pytest.approx(oracle.store_scale(max(map(abs, block)) / 448, stored), rel=1e-7)
        assert got == [oracle.encode_e4m3(value / scale) for value in block]


@pytest.mark.parametrize("rule", ["floor", "even", "rceil"])
@pytest.mark.parametrize(("name", "emax", "largest", "bits"), [("int4", 2, 7.0, 2), ("int8", 6, 127.0, 6)])
def test_power_of_two_scales_of_integers_follow_their_rule(
    rule: oracle.ExponentRule, name: str, emax: int, largest: float, bits: int
) -> None:
    form, scheme = read(f"{name}-se8m0-{rule}")
    amax = torch.arange(1.0, 2.0, 1 / 256)
    fitted = form.fit(amax.unsqueeze(-1), scheme).scale.tolist()
    for value, scale in zip(amax.tolist(), fitted, strict=True):
        exponent = oracle.mx_exponent([value], rule, element_emax=emax, element_max=largest, mantissa_bits=bits)
        assert scale == 2.0**exponent


@pytest.mark.parametrize(
    ("text", "values", "emax"),
    [("mxfp8", oracle.E4M3_VALUES, 8), ("mxfp6_e2m3", oracle.E2M3_VALUES, 2), ("mxfp6_e3m2", oracle.E3M2_VALUES, 4)],
)
def test_mxfp8_and_mxfp6_are_the_oracle(text: str, values: list[float], emax: int) -> None:
    form, groups, parameters = fit(f"{text}-floor", values_of(8, 64))
    codes = form.encode(groups, parameters)
    for row, group in itertools.product(range(8), range(2)):
        block = groups[row, group].tolist()
        exponent = oracle.mx_exponent(block, "floor", element_emax=emax)
        assert float(parameters.scale[row, group]) == 2.0**exponent
        assert codes[row, group].tolist() == [oracle.nearest_code(value / 2.0**exponent, values) for value in block]


def test_the_search_for_an_exponent_takes_the_least_error_of_three() -> None:
    x = values_of(8, 64)
    _form, groups, parameters = fit("mxfp4-search", x)
    _, _, base = fit("mxfp4", x)
    moved = 0
    for row, group in itertools.product(range(8), range(2)):
        block, start = groups[row, group].tolist(), float(base.scale[row, group])
        errors = {}
        for scale in (start, start / 2, start * 2):
            rounded = [scale * oracle.decode_e2m1(oracle.encode_e2m1(value / scale)) for value in block]
            errors[scale] = sum((a - b) ** 2 for a, b in zip(block, rounded, strict=True))
        assert float(parameters.scale[row, group]) == min(errors, key=lambda scale: errors[scale])
        moved += float(parameters.scale[row, group]) != start
    assert moved


def test_the_search_goes_up_where_the_rule_is_too_low() -> None:
    """Only E4M3 has room for that: 464 to 480 are nearer to 480 than to 448, and ``even`` goes up from 480."""
    block = torch.zeros(1, 32)
    block[0, :2] = torch.tensor([479.0, 1.0])
    for text, scale, value in (("mxfp8", 1.0, 448.0), ("mxfp8-search", 2.0, 480.0)):
        form, groups, parameters = fit(text, block)
        assert parameters.scale.tolist() == [[scale]]
        assert float(form.round(groups, parameters).max()) == value


def test_four_over_six_takes_the_lesser_error_of_two() -> None:
    x = values_of(8, 64)
    _form, groups, parameters = fit("nvfp4-four_over_six", x)
    multiplier = oracle.store_scale(float(x.abs().max()) / (6 * 256), "float32")
    assert float(parameters.global_scale) == multiplier
    chosen = []
    for row, group in itertools.product(range(8), range(4)):
        block, errors = groups[row, group].tolist(), {}
        for largest in (6, 4):
            scale = oracle.store_scale(max(map(abs, block)) / largest / multiplier, "e4m3")
            step = scale * multiplier
            rounded = [step * oracle.decode_e2m1(oracle.encode_e2m1(value / step)) for value in block]
            errors[scale] = (sum((a - b) ** 2 for a, b in zip(block, rounded, strict=True)), largest)
        best = min(errors, key=lambda scale: errors[scale])
        assert float(parameters.scale[row, group]) == best
        chosen.append(errors[best][1])
    assert {4, 6} == set(chosen)


def test_nf4_rounds_to_the_nearest_of_its_16_values_and_ties_to_even() -> None:
    form, groups, parameters = fit("nf4", values_of(8, 128))
    assert torch.equal(parameters.scale, groups.abs().amax(-1))
    one = GroupParameters(torch.ones(1))
    values = form.decode(torch.arange(16).to(torch.uint8).unsqueeze(0), one)[0].double()
    assert values.tolist() == pytest.approx(oracle.nf4_values(), abs=2e-6)
    scaled = (groups / parameters.scale.unsqueeze(-1)).double().unsqueeze(-1)
    assert torch.equal(form.encode(groups, parameters).long(), (scaled - values).abs().argmin(-1))
    middles = (values[1:] + values[:-1]) / 2
    for offset in (-1, 0, 1):
        probes = middles.float() if offset == 0 else torch.nextafter(middles.float(), torch.tensor(offset * torch.inf))
        distance = (probes.double().unsqueeze(-1) - values).abs()
        least = distance == distance.amin(-1, keepdim=True)
        expected = [min(row.nonzero().flatten().tolist(), key=lambda code: code % 2) for row in least]
        assert form.encode(probes.unsqueeze(0), one)[0].tolist() == expected


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_narrow_integers_never_have_the_lowest_code(bits: int) -> None:
    x = values_of(6, 128)
    form, groups, parameters = fit(f"int{bits}-g32-narrow-sfp32", x, clip=0.3)
    full, _, whole = fit(f"int{bits}-g32-full-sfp32", x, clip=0.3)
    assert torch.equal(parameters.scale, whole.scale)
    codes, usual = form.encode(groups, parameters), full.encode(groups, whole)
    assert int(usual.min()) == 0
    assert torch.equal(codes, usual.clamp(min=1))
    assert torch.equal(form.round(groups, parameters), form.decode(codes, parameters))
    assert len(levels(form)) == 2**bits - 1
    assert levels(form).tolist() == [-value for value in reversed(levels(form).tolist())]


@pytest.mark.parametrize("rule", ["floor", "rceil"])
def test_power_of_two_scales_of_fp8_follow_their_rule(rule: oracle.ExponentRule) -> None:
    form, scheme = read(f"fp8-se8m0-{rule}")
    amax = torch.arange(1.0, 2.0, 1 / 256)
    for value, scale in zip(amax.tolist(), form.fit(amax.unsqueeze(-1), scheme).scale.tolist(), strict=True):
        assert scale == 2.0 ** oracle.mx_exponent([value], rule, element_emax=8, element_max=448.0)


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


def test_e4m3_scales_need_their_global_scale() -> None:
    form, scheme = read("nvfp4")
    with pytest.raises(SchemeError, match="need a global scale"):
        form.fit(values_of(2, 16), scheme)
