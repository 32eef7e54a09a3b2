"""What the refusal of a scheme names is carried: another scheme by that exporter, or the same numbers by another."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from qtool.builtin.exporters import gguf
from qtool.engine.subject import Subject
from qtool.errors import SchemeError, UsageError
from qtool.plugins import Plugins
from qtool.scheme import parse_tensor_scheme
from qtool.steps.schemes import read_scheme
from tests.builtin.layouts.conftest import Make

EXPORTERS = ("awq", "compressed-tensors", "gguf", "gptq", "gptq-v2", "modelopt", "peft")
INT8, INT4, FP8 = "int8-sym-token-sfp32-half", "int4-asym-token-sfp32", "fp8-token"
SCHEMES = [
    *((f"int{bits}-sym-g32", "") for bits in range(2, 9)),
    *((f"int{bits}-asym-channel", "") for bits in range(2, 9)),
    *(("int8-sym-channel", INT8), ("int4-sym-g32", INT8), ("int4-sym-channel", INT4), ("int8-sym-g16", "fp8-token")),
    *(("int4-sym-tensor", ""), ("int4-sym-g32-sfp32", ""), ("int3-sym-g16-sfp16", ""), ("int5-sym-g32", INT8)),
    *((text, "") for text in ("fp4", "fp4_e1m2", "fp4_e3m0", "fp6_e2m3", "fp6_e3m2", "fp8", "fp8_e5m2", "nf4")),
    *((text, "") for text in ("nvfp4", "mxfp4", "amxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8")),
    *((f"fp4-g16-s{scale}", "") for scale in ("e2m1", "ue5m3", "int4", "fp32", "e8m0", "bf16")),
    *(("fp4-asym-g16-sfp16", ""), ("fp4-g64-se8m0", ""), ("fp4-tensor", ""), ("fp6_e2m3-g32-sfp16", "")),
    *(("fp8-tensor", ""), ("fp8-g32", ""), ("fp8-b32", ""), ("fp8_e5m2-b32", ""), ("nf4-g32-se8m0", "")),
    *(("fp8-channel", FP8), ("fp8-tensor", "fp8-tensor"), ("fp8-tensor", FP8), ("fp8-b32", "fp8-g32")),
    *(("fp8_e5m2", "fp8_e5m2-token"), ("fp8-channel", "nvfp4"), ("nvfp4", "nvfp4"), ("nvfp4", INT8)),
    *(("mxfp4", "mxfp4"), ("mxfp6_e2m3", "mxfp6_e2m3"), ("mxfp6_e3m2", "mxfp6_e3m2"), ("mxfp8", "mxfp8-rceil")),
    *(("mxfp8", "mxfp8"), ("amxfp4", "amxfp4"), ("nf4", INT8), ("fp4_e1m2", "fp4_e1m2-tensor")),
    *(("fp4-g16-se2m1", "fp4-g16-se2m1"), ("fp8-channel", INT8), ("mxfp6_e3m2", "")),
]


def refusal(plugins: Plugins, exporter: str, subject: Subject) -> UsageError | None:
    """Return why an exporter refuses a subject, apart from what is no matter of its scheme."""
    try:
        plugins.load("exporters", exporter).check(subject)
    except UsageError as error:
        if "not calibrated" in error.message or "no low-rank corrections to make" in error.message:
            return None
        return error
    return None


@pytest.fixture(autouse=True)
def _any_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let GGUF look at schemes and values only: the model has no tokenizer."""
    monkeypatch.setattr(gguf, "_check_model", lambda subject: None)


@pytest.fixture(scope="module")
def subjects(make: Make, plugins: Plugins) -> Make:
    """Make a subject of a model of one block, whose sizes all groups and blocks divide."""

    def made(weights: str, activations: str = "") -> Subject:
        subject = make(weights, name="block")
        inputs = parse_tensor_scheme(activations, plugins.format, vector="token") if activations else None
        return replace(subject, scheme=replace(subject.scheme, activations=inputs))

    return made


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_what_a_refusal_names_is_carried(subjects: Make, plugins: Plugins, exporter: str) -> None:
    refused = 0
    for weights, activations in SCHEMES:
        subject = subjects(weights, activations)
        error = refusal(plugins, exporter, subject)
        if error is None:
            continue
        refused += 1
        asked = f"{exporter} of {weights} {activations}: {error}"
        options = dict(re.findall(r"--(weights|activations) ([^\s;,]+)", error.hint))
        kept = re.search(r"--to ([\w-]+)", error.hint)
        assert options or kept, asked
        if kept is not None:
            assert refusal(plugins, kept[1], subject) is None, asked
        if options:
            whole = "--weights" in error.hint and kept is not None
            named = (options.get("weights", weights), options.get("activations", "" if whole else activations))
            assert refusal(plugins, exporter, subjects(*named)) is None, asked
            bits = [plugins.format(text.split("-")[0]).bits for text in (weights, named[0])]
            assert bits[1] >= min(bits[0], {"awq": 4}.get(exporter, 8)), asked
    assert refused > 5


@pytest.mark.parametrize(
    ("exporter", "weights", "activations", "nearest"),
    [
        ("compressed-tensors", "mxfp6_e3m2", "", "--weights mxfp6_e2m3"),
        ("compressed-tensors", "mxfp6_e3m2", "mxfp6_e3m2", "--weights mxfp6_e2m3 --activations mxfp6_e2m3"),
        ("compressed-tensors", "amxfp4", "amxfp4", "--weights nvfp4 --activations nvfp4"),
        ("compressed-tensors", "fp4-g16-se2m1", "", "--weights nvfp4"),
        ("compressed-tensors", "fp8_e5m2", "fp8_e5m2-token", "--weights fp8-channel-sbf16 --activations fp8-token"),
        ("modelopt", "int8-sym-channel", INT8, "--weights fp8-channel-sbf16 --activations fp8-token"),
        ("modelopt", "mxfp8", "", "--weights fp8-channel-sbf16 --activations fp8-token"),
        ("modelopt", "fp8_e5m2", "", "--weights fp8-channel-sbf16 --activations fp8-token"),
        ("modelopt", "int4-sym-g32", "", "--weights nvfp4"),
        ("modelopt", "mxfp4", "mxfp4", "--weights nvfp4 --activations nvfp4"),
        ("gptq", "mxfp8", "", "--weights int8-sym-g32-sfp16"),
        ("gptq", "fp6_e3m2", "", "--weights int8-sym-channel-sfp16"),
        ("gptq", "int5-asym-channel", "", "--weights int8-asym-channel-sfp16"),
        ("awq", "nf4", "", "--weights int4-sym-g64-sfp16"),
        ("compressed-tensors", "fp4-channel", "", "--weights nvfp4"),
        ("gguf", "nf4", "", "--weights nvfp4"),
        ("gguf", "fp8", "", "--weights int8-sym-channel-sfp16"),
        ("gguf", "int3-asym-channel", "", "--weights int4-asym-channel-offset-sfp16"),
        ("peft", "amxfp4", "", "--weights nvfp4"),
    ],
)
def test_the_nearest_has_no_fewer_bits_then_the_same_kind_then_the_nearest_group(
    subjects: Make, plugins: Plugins, exporter: str, weights: str, activations: str, nearest: str
) -> None:
    error = refusal(plugins, exporter, subjects(weights, activations))
    assert isinstance(error, SchemeError)
    assert error.hint.startswith(f"nearest that fits: {nearest}; or qtool pack SOURCE --to ")


def test_numbers_that_compressed_tensors_carries_are_sent_there(subjects: Make, plugins: Plugins) -> None:
    for weights, kept in (("mxfp8", "compressed-tensors"), ("amxfp4", "hf"), ("mxfp6_e2m3", "compressed-tensors")):
        for exporter in ("gptq", "awq", "modelopt"):
            error = refusal(plugins, exporter, subjects(weights))
            assert error is not None
            does = "decodes them" if kept == "hf" else "keeps these numbers"
            assert error.hint.endswith(f"; or qtool pack SOURCE --to {kept}, which {does}")


def test_exceptions_are_kept_and_replaced_one_by_one(make: Make, plugins: Plugins) -> None:
    subject = make("nvfp4", name="block")
    scheme = read_scheme(
        "", {"weights": "nvfp4,down_proj=fp8-channel-sbf16,q_proj=none", "activations": "nvfp4"}, plugins
    )
    error = refusal(plugins, "modelopt", replace(subject, scheme=scheme))
    assert error is not None
    nearest = "--weights nvfp4,down_proj=fp8-channel-sbf16,q_proj=none --activations nvfp4,down_proj=fp8-token"
    assert error.hint.startswith(f"nearest that fits: {nearest}; or qtool pack SOURCE --to ")


def test_exceptions_for_head_and_embedding_are_kept(make: Make, plugins: Plugins) -> None:
    weights = "nf4-g32,lm_head=int8-sym-channel-sbf16,embed_tokens=nf4-g32"
    scheme = read_scheme("", {"weights": weights}, plugins)
    error = refusal(plugins, "compressed-tensors", replace(make("nf4-g32", name="block"), scheme=scheme))
    assert error is not None
    nearest = "--weights nvfp4,lm_head=int8-sym-channel-sbf16,embed_tokens=nvfp4"
    assert error.hint.startswith(f"nearest that fits: {nearest}; or qtool pack SOURCE --to ")


def test_a_cache_that_is_not_carried_has_static_scales_or_is_left_out(make: Make, plugins: Plugins) -> None:
    for exporter in ("modelopt", "gptq"):
        weights = "nvfp4" if exporter == "modelopt" else "int4-sym-g32"
        error = refusal(plugins, exporter, make(weights, "", "fp8-tensor", name="block"))
        assert error is not None
        assert ("--kv fp8-sym-tensor-sfp32-static;" in error.hint) == (exporter == "modelopt")
        assert ("--kv" in error.hint) == (exporter == "modelopt")
        assert error.hint.startswith("nearest that fits: --weights ")
        assert "--to compressed-tensors" in error.hint
