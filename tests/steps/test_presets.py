"""A preset says what users do not; nothing that they say is changed. Schemes are read part by part."""

from __future__ import annotations

import pytest

from qtool.errors import SchemeError, UsageError
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, Preset, TensorScheme, parse_tensor_scheme
from qtool.steps.options import configure
from qtool.steps.presets import PRESETS, MitigateSettings, mitigate_settings
from qtool.steps.schemes import parse_model_scheme, read_scheme


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover()


def test_without_a_preset_nothing_is_set() -> None:
    settings = mitigate_settings("")
    assert settings == MitigateSettings()
    assert settings.options("gptq+lorc", {"rank": "4"}) == {"rank": "4"}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_option_of_a_preset_is_one_that_its_method_has(preset: str, plugins: Plugins) -> None:
    settings = mitigate_settings(preset)
    for method, options in settings.methods.items():
        (configured,) = configure("mitigators", method, settings.options(method, {}), plugins)
        assert {name: str(getattr(configured.config, name)).lower() for name in options} == options
    assert settings.scheme("", {}, plugins).weights is not None


@pytest.mark.parametrize(
    "given",
    [
        {"block_size": "32"}, {"block-size": "32"}, {"gptq.block_size": "32"}, {"gptq.block-size": "32"},
    ],
)  # fmt: skip
def test_an_option_of_ones_own_wins_however_it_is_spelled(given: dict[str, str], plugins: Plugins) -> None:
    options = mitigate_settings("survey").options("gptq", given)
    (gptq,) = configure("mitigators", "gptq", options, plugins)
    assert (gptq.config.block_size, gptq.config.parameters, gptq.config.clip) == (32, "stale", "search")


def test_options_of_methods_that_are_not_used_are_left_out() -> None:
    survey = mitigate_settings("survey")
    assert not [option for option in survey.options("rtn", {}) if not option.startswith("rtn.")]
    assert {option.partition(".")[0] for option in survey.options("gptq + lorc", {})} == {"gptq", "lorc"}


def test_the_survey_s_options_are_those_of_its_code() -> None:
    """What the authors' code does where ours has a choice (arXiv:2507.17417)."""
    survey = mitigate_settings("survey")
    clip = {"clip": "search", "clip_norm": "2.4", "clip_grid": "80", "clip_metric": "mse"}
    gptq = {**clip, "parameters": "stale", "dampening_frac": "0.01", "block_size": "128", "order": "natural"}
    assert survey.methods == {"rtn": clip, "gptq": gptq, "lorc": {"rank": "32", "dtype": "bf16"}}
    assert (survey.seed, survey.token_weight, survey.true_sequential, survey.round_activations) == (
        42,
        "uniform",
        True,
        False,
    )


def test_values_that_are_given_override_and_none_does_not() -> None:
    settings = mitigate_settings("survey").overridden(seed=0, true_sequential=False, token_weight=None)
    assert (settings.seed, settings.true_sequential, settings.token_weight) == (0, False, "uniform")


def test_parts_of_a_presets_scheme_are_replaced_one_by_one_and_by_a_scheme_all_at_once(plugins: Plugins) -> None:
    survey = mitigate_settings("survey")
    own = survey.scheme("", {"weights": "", "activations": "", "kv": ""}, plugins)
    assert own.activations == read("int4-asym-token-sfp32", plugins)
    assert (own.kv, own.name, own.scale_per_head) == (None, "W4A4 (survey)", True)
    mixed = survey.scheme("", {"weights": "int8", "activations": "", "kv": ""}, plugins)
    assert (mixed.weights, mixed.activations, mixed.name) == (read("int8", plugins), own.activations, "")
    assert not mixed.scale_per_head
    whole = survey.scheme("W4A16", {"weights": "", "kv": "int8"}, plugins)
    assert (whole.activations, whole.kv) == (None, read("int8-token-head", plugins))


def read(text: str, plugins: Plugins) -> TensorScheme:
    return parse_tensor_scheme(text, plugins.format)


def test_an_unknown_preset_is_met_with_the_nearest() -> None:
    with pytest.raises(UsageError) as error:
        mitigate_settings("survy")
    assert str(error.value) == "unknown preset `survy`\n  known  survey\nhint: did you mean `survey`?"


def test_an_option_of_one_method_goes_before_one_for_all(plugins: Plugins) -> None:
    settings = {"clip": "search", "gptq.clip": "none", "gptq.clip-grid": "7", "clip-grid": "9"}
    (gptq,) = configure("mitigators", "gptq", settings, plugins)
    assert (gptq.config.clip, gptq.config.clip_grid) == ("none", 7)


def test_a_scheme_is_a_preset_or_parts_or_a_preset_with_other_parts(plugins: Plugins) -> None:
    assert read_scheme("", {}, plugins) == ModelScheme()
    whole = read_scheme("W4A8", {"weights": "", "kv": None}, plugins)
    assert whole == parse_model_scheme("W4A8", plugins.format, plugins.presets)
    mixed = read_scheme("W4A8", {"weights": "int3-g64", "activations": "none", "kv": "int8"}, plugins)
    expected = [read(text, plugins) for text in ("int3-g64", "int8-token-head")]
    assert [mixed.weights, mixed.kv] == expected
    assert (mixed.activations, mixed.name) == (None, "")


@pytest.mark.parametrize("parts", [{"weights": "int4-wrong"}, {"kv": "int4-g0"}])
def test_a_part_that_cannot_be_read_is_refused(parts: dict[str, str], plugins: Plugins) -> None:
    with pytest.raises(SchemeError, match="cannot read"):
        read_scheme("W4A16", parts, plugins)


def test_a_vector_is_a_row_of_weights_and_a_token_of_what_they_multiply(plugins: Plugins) -> None:
    scheme = read_scheme("", {"weights": "int4", "activations": "int8", "kv": "fp8"}, plugins)
    assert scheme == ModelScheme(*(read(text, plugins) for text in ("int4-channel", "int8-token", "fp8-token-head")))
    grouped = read_scheme("", {"weights": "nvfp4", "activations": "fp8-tensor"}, plugins)
    assert grouped == ModelScheme(read("nvfp4", plugins), read("fp8-tensor", plugins))


@pytest.mark.parametrize(
    ("part", "text", "message", "hint"),
    [
        ("weights", "int4-token", "`token` means nothing for weights", "--weights int4-sym-channel-sbf16"),
        ("weights", "fp8-token-sbf16", "`token` means nothing for weights", "--weights fp8-sym-channel-sbf16"),
        ("activations", "int8-asym-channel", "`channel` means nothing for activations",
         "--activations int8-asym-token-sbf16"),
        ("kv", "fp8-channel", "`channel` means nothing for keys without a number of tokens",
         "--kv keys=fp8-sym-channel-g32-sfp32,values=fp8-sym-token-head-sfp32"),
        ("kv", "int8-asym-token-sfp16", "`token` means nothing for kv", "--kv int8-asym-token-head-sfp16"),
    ],
)  # fmt: skip
def test_a_strategy_that_means_nothing_there_is_refused(
    part: str, text: str, message: str, hint: str, plugins: Plugins
) -> None:
    for preset in ("", "W4A4"):
        with pytest.raises(SchemeError, match=message) as refused:
            read_scheme(preset, {part: text}, plugins)
        assert refused.value.hint.startswith(f"nearest that works: {hint}")
        _, name, nearest = refused.value.hint.partition(": ")[2].replace("--", "-- ").split()
        read_scheme(preset, {name: nearest}, plugins)
    with pytest.raises(SchemeError, match=message):
        ModelScheme(**{part: read(text, plugins)}).check()


def test_a_preset_with_such_a_strategy_is_refused(plugins: Plugins) -> None:
    odd = Preset("ODD", "int4-g32", "int8-channel", None, "made up")
    with pytest.raises(SchemeError, match="`channel` means nothing for activations"):
        parse_model_scheme("ODD", plugins.format, {"ODD": odd})
