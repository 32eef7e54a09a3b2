from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch

from qtool.builtin.formats.presets import PRESETS
from qtool.errors import SchemeError
from qtool.scheme import (
    ExponentRule,
    Format,
    GroupParameters,
    ModelScheme,
    Preset,
    RangeRule,
    ScaleFormat,
    TensorScheme,
)
from qtool.steps.schemes import parse_model_scheme
from tests.builtin.format_cases import FORMATS, WRITTEN, error_of, fit, read


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
        ("mxfp4", "mxfp4-search"),
        ("nvfp4", "nvfp4-four_over_six"),
        ("fp4-g16-se2m1", "fp4-g16-sint4"),
        ("fp4-g16-sint4", "nvfp4"),
        ("mxfp4", "mxfp6_e3m2"),
        ("mxfp6_e3m2", "mxfp6_e2m3"),
        ("mxfp6_e2m3", "mxfp8"),
        ("fp8_e5m2", "fp8"),
        ("fp4-g64", "nf4"),
        ("int4-g64-sfp32", "nf4"),
    ],
)
def test_more_bits_finer_groups_and_better_scales_are_closer(worse: str, better: str) -> None:
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) + 0.3
    assert error_of(better, x) < error_of(worse, x)


def test_the_relative_errors_on_a_gaussian_are_the_published_ones() -> None:
    x = torch.randn(256, 2048, generator=torch.Generator().manual_seed(1))
    expected = {"int4-g16-sfp32-full": 8.53, "int4-g128-sfp32-half": 11.12, "fp4-g128": 10.90, "fp4": 11.69}
    expected |= {"mxfp4-floor": 11.52, "mxfp4": 11.19, "mxfp4-rceil": 11.54, "nvfp4": 9.50, "nvfp4-four_over_six": 8.70}
    measured = {text: 100 * error_of(text, x) for text in expected}
    assert measured == pytest.approx(expected, abs=0.05)


def test_scales_with_more_exponents_hold_blocks_that_others_lose() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-7, 0, 8).unsqueeze(-1)
    e4m3, ue5m3 = (fit(text, x) for text in ("nvfp4", "fp4-g16-sue5m3"))

    def errors(found: tuple[Format, torch.Tensor, GroupParameters]) -> list[float]:
        form, groups, parameters = found
        return ((form.round(groups, parameters) - groups).norm(dim=(1, 2)) / groups.norm(dim=(1, 2))).tolist()

    assert errors(e4m3)[0] == 1
    assert max(errors(ue5m3)[:2]) < 0.2
    assert errors(e4m3)[4:] == errors(ue5m3)[4:]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_parse_as_they_are_written(preset: Preset) -> None:
    scheme = parse_model_scheme(preset.name, FORMATS.__getitem__, {p.name: p for p in PRESETS})
    for part, text in (
        (scheme.weights, preset.weights),
        (scheme.activations, preset.activations),
        (scheme.kv, preset.kv),
    ):
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
        ("int4-asym-full", "rule for symmetric integers", "int4-asym-channel"),
        ("fp8-asym", "no zero point", "fp8-sym-channel"),
        ("fp8-se4m3", "no e4m3 scales", "fp8-sym-channel-sfp32"),
        ("nvfp4-g32", "16 values", "fp4-sym-g32-se4m3"),
        ("nvfp4-asym", "no zero point", "nvfp4-sym-g16-se4m3"),
        ("mxfp4-g16", "32 values", "fp4-sym-g16-se8m0"),
        ("mxfp4-sfp32", "32 values", "fp4-sym-g32-sfp32"),
        ("mxfp8-g16", "32 values", "fp8-sym-g16-se8m0"),
        ("mxfp6_e2m3-sfp16", "32 values", "fp6_e2m3-sym-g32-sfp16"),
        ("mxfp6_e3m2-asym", "no zero point", "mxfp6_e3m2-sym-g32-se8m0"),
        ("fp6_e3m2-se4m3", "no e4m3 scales", "fp6_e3m2-sym-channel-sfp32"),
        ("int4-sint4", "no int4 scales", "int4-sym-channel-sbf16"),
        ("fp4-asym-g16-se2m1", "without zero points", "fp4-sym-g16-se2m1"),
        ("int4-asym-narrow", "rule for symmetric integers", "int4-asym-channel-sbf16"),
        ("nf4-asym", "no zero point", "nf4-sym-g64-sfp32"),
        ("nf4-se4m3", "no e4m3 scales", "nf4-sym-g64-sfp32"),
        ("nf4-full", "rule for symmetric integers", "nf4-sym-g64-sfp32"),
        ("nvfp4-search", "rounds e8m0 scales", "nvfp4-sym-g16-se4m3"),
        ("mxfp4-four_over_six", "FP4 with e4m3 scales", "mxfp4-sym-g32-se8m0"),
        ("fp4-token-static", "static scales are of whole tensors", "fp4-sym-tensor-sfp32-static"),
        ("int8-asym-tensor-real-static", "static zero points are whole", "int8-asym-tensor-sbf16-static"),
        ("int8-asym-tensor-offset-static", "static zero points are whole", "int8-asym-tensor-sbf16-static"),
        ("int8-asym-token-static", "static scales are of whole tensors", "int8-asym-tensor-sbf16-static"),
        ("int8-asym-tensor-se8m0-static", "come without zero points", "int8-sym-tensor-se8m0-static"),
        ("fp8-asym-tensor-static", "no zero point", "fp8-sym-tensor-sfp32-static"),
        ("int8-tensor-o6-static", "outliers are found as they come", "int8-sym-tensor-sbf16-static"),
        ("fp4-tensor-se4m3-static", "no multiplier above them", "fp4-sym-tensor-sfp32-static"),
        ("int8-tensor-signed_full-static", "have no sign", "int8-sym-tensor-sbf16-full-static"),
        ("fp4-tensor-se8m0-search-static", "searched by what", "fp4-sym-tensor-se8m0-static"),
        ("nvfp4-static", "16 values", "fp4-sym-tensor-sfp32-static"),
        ("mxfp4-static", "32 values", "fp4-sym-tensor-se8m0-static"),
        ("amxfp4-static", "two scales, and of static ones there is one", "fp4-sym-tensor-sfp32-static"),
        ("fp4_e3m0-asym", "no zero point", "fp4_e3m0-sym-channel-sfp32"),
        ("fp4_e1m2-se4m3", "no e4m3 scales", "fp4_e1m2-sym-channel-sfp32"),
        ("int4-b128", "no scales of several rows", "int4-sym-g128"),
        ("mxfp8-b128", "32 values", "fp8-sym-b128-se8m0"),
        ("int8-four_over_six", "FP4 with e4m3 scales", "int8-sym-channel"),
    ],
)
def test_what_means_nothing_is_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(SchemeError, match=message) as caught:
        read(text)
    assert caught.value.hint.startswith(f"nearest that works: {hint}")


def test_the_nearest_scheme_of_a_refusal_always_works() -> None:
    refused, hints = 0, set[str]()
    parts = itertools.product(
        ("int4", "fp4", "mxfp4", "nvfp4", "fp8", "mxfp6_e2m3"),
        (True, False),
        ("tensor", "channel", "token", "group", "block"),
        (None, 16, 32),
        get_args(ScaleFormat),
        get_args(RangeRule),
        get_args(ExponentRule),
    )
    for scheme in itertools.starmap(TensorScheme, parts):
        try:
            FORMATS[scheme.format].check(scheme)
        except SchemeError as error:
            refused += 1
            hints.add(error.hint.removeprefix("nearest that works: "))
    assert refused > 1000
    for hint in hints:
        read(hint)


def test_every_format_keeps_the_contract() -> None:
    forms: list[Format] = [*FORMATS.values()]
    for name, form in zip(FORMATS, forms, strict=True):
        assert form.name == name
        assert form.defaults.format == name
        form.check(form.defaults)


@pytest.mark.parametrize("text", [*FORMATS, *WRITTEN])
def test_what_a_scheme_prints_reads_back(text: str) -> None:
    scheme = read(text)[1]
    assert read(str(scheme))[1] == scheme


@pytest.mark.parametrize(
    "text", ["int4-sym-g128-sbf16-c0.9", "int4-asym-token-sfp32-c0.95", "nvfp4-sym-g16-se4m3-c0.5"]
)
def test_a_clip_is_written_and_read_back(text: str) -> None:
    _, scheme = read(text)
    assert str(scheme) == text
    assert scheme.clip == float(text.rpartition("-c")[2])
    assert ModelScheme.from_json(ModelScheme(weights=scheme).to_json()).weights == scheme


@pytest.mark.parametrize("text", ["int4-c1.5", "fp8-c0", "mxfp4-c0.001"])
def test_a_clip_that_is_no_fraction_is_refused(text: str) -> None:
    with pytest.raises(SchemeError, match=r"the fraction of the range that is kept is from 0.01 to 1"):
        read(text)
    assert read(f"{text.partition('-')[0]}-c1")[1].clip == 1


@pytest.mark.parametrize(
    ("text", "threshold"), [("int8-sym-token-sfp32-full-o6", 6.0), ("nvfp4-sym-g16-se4m3-o2.5", 2.5)]
)
def test_a_threshold_of_outliers_is_written_and_read_back(text: str, threshold: float) -> None:
    _, scheme = read(text)
    assert str(scheme) == text
    assert scheme.outlier_threshold == threshold
    assert ModelScheme.from_json(ModelScheme(activations=scheme).to_json()).activations == scheme
    assert "-o" not in str(read(text.rpartition("-o")[0])[1])


@pytest.mark.parametrize("text", ["int8-o0.0009", "fp8-o0.0001", "nvfp4-o10000000"])
def test_a_threshold_of_no_magnitude_is_refused(text: str) -> None:
    with pytest.raises(SchemeError, match=r"outliers are of a magnitude from 0.001 to 1000000 on(.|\n)*-o6"):
        read(text)


@pytest.mark.parametrize("text", ["int8-sym-token-sfp32-full", "nvfp4-sym-g16-se4m3"])
def test_a_threshold_of_zero_sets_nothing_apart(text: str) -> None:
    assert read(f"{text}-o0")[1] == read(f"{text}-o0.0")[1] == read(text)[1]


@pytest.mark.parametrize("part", ["weights", "kv"])
def test_outlier_columns_are_of_activations_only(part: str) -> None:
    strategy = {"weights": "channel", "kv": "token-head"}[part]
    scheme = TensorScheme("int8", strategy=strategy, outlier_threshold=6.0)  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match=f"{part} have no outlier columns(.|\n)*--{part} int8-sym-{strategy}-sfp32$"):
        ModelScheme(**{part: scheme}).check()


def test_the_preset_of_llm_int8() -> None:
    scheme = preset_of("LLM-INT8")
    assert str(scheme.weights) == "int8-sym-channel-sfp32-full"
    assert str(scheme.activations) == "int8-sym-token-sfp32-full-o6"


def test_a_clip_of_all_is_not_written() -> None:
    assert "-c" not in str(read("int4-c1.0")[1]).replace("-channel", "")
    with pytest.raises(SchemeError, match="cannot read `c` in the scheme"):
        read("int4-c")
