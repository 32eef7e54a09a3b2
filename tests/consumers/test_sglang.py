"""What SGLang does with checkpoints is what its code says, fact by fact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from qtool.consumers.case import Case
from qtool.consumers.config import ONLINE, cases_of
from qtool.consumers.table import answer
from tests.consumers.known import (
    AWQ,
    FP8,
    FP8_BLOCK,
    FP8_BLOCK_WEIGHTS,
    FP8_MIXED,
    FP8_MIXED_STATIC,
    FP8_STATIC,
    FP8_TENSOR,
    FP8_TENSOR_TOKEN,
    GPTQ,
    MODELOPT,
    MODELOPT_FP8,
    MXFP6,
    MXFP8,
    NO_BITS,
    NO_SCHEME,
    NVFP4,
    NVFP4_WEIGHTS,
    PER_ROW,
    STATIC_ASYMMETRIC,
    STATIC_W8A8,
    W3A16,
    W4A4,
    W4A16,
    W4AFP8,
    W8A8,
    W8A16_FP8,
    Config,
    asked,
    compressed,
)

SGLANG = ("sm80", "sm89", "sm90", "sm100")
FP8_ON = SGLANG[1:]
NO_W4A16 = "Other method (CompressedTensorsW4A16Sparse24) is not supported now"
NO_FP8 = "The quantization method modelopt_fp8 is not supported for the current GPU."
ONE_PLACE = "is out of bounds for dimension 0 with size 1"
ASYMMETRIC = compressed("int-quantized", "int8-sym-channel-static", "int8-asym-token-dynamic")


@pytest.mark.parametrize(
    ("config", "devices", "verdict", "says", "message"),
    [
        (W4A16, SGLANG, "loads", "W4A16: activations are not quantized", ""),
        (W3A16, SGLANG, "refuses", "refused: packed integers have 4 or 8 bits", NO_W4A16),
        (W4A4, SGLANG, "refuses", "refused: integers with quantized activations are INT8", NO_SCHEME + "."),
        (W4AFP8, SGLANG, "refuses", "refused: it has packed integers with FP8 activations of", NO_SCHEME + "."),
        (W8A8, SGLANG, "loads", "W8A8: dynamic INT8 activations per token", ""),
        (ASYMMETRIC, SGLANG, "executes-other", "W8A8: dynamic INT8 activations per token without zero points", ""),
        (STATIC_W8A8, SGLANG, "refuses", "refused: linears that it fuses have room for one", ONE_PLACE),
        (STATIC_ASYMMETRIC, SGLANG, "refuses", "refused: linears that it fuses have room for one", ONE_PLACE),
        (W8A16_FP8, SGLANG, "loads", "W8A16: activations are not quantized", ""),
        (FP8, FP8_ON, "loads", "W8A8: dynamic FP8 activations per token", ""),
        (FP8_MIXED, FP8_ON, "executes-other", "W8A8: dynamic FP8 activations per token, though", ""),
        (FP8_MIXED_STATIC, FP8_ON, "loads", "W8A8: static FP8 activations per tensor", ""),
        (FP8_TENSOR_TOKEN, FP8_ON, "loads", "W8A8: dynamic FP8 activations per token; linears that", ""),
        (FP8_TENSOR, FP8_ON, "executes-other", "W8A8: dynamic FP8 activations per token, though", ""),
        (FP8_STATIC, FP8_ON, "loads", "W8A8: static FP8 activations per tensor; linears that it fuses", ""),
        (FP8_STATIC, ("sm80",), "executes-other", "W8A16", ""),
        (FP8_BLOCK, ("sm80",), "refuses", "refused: before SM89", "Unsupported weight strategy=block"),
        (FP8_BLOCK_WEIGHTS, SGLANG, "refuses", "refused: FP8 weights in blocks go with FP8", NO_SCHEME + "."),
        (NVFP4_WEIGHTS, SGLANG, "loads", "W4A16: activations are not quantized", ""),
        (NVFP4, SGLANG[:3], "executes-other", "W4A16, with a warning", ""),
        (GPTQ, SGLANG, "loads", "W4A16: activations are not quantized", ""),
        ({**GPTQ, "sym": False}, SGLANG, "refuses", "refused: it wants symmetric", "Unknown quantization method: gptq"),
        (AWQ, SGLANG, "loads", "W4A16: activations are not quantized", ""),
        (MODELOPT, SGLANG[:3], "executes-other", "W4A16", ""),
        (MODELOPT_FP8, ("sm80",), "refuses", "refused: it runs FP8 of modelopt from SM89 on", NO_FP8),
        (MXFP8, SGLANG, "refuses", "refused: it has no MXFP8 of compressed-tensors", NO_SCHEME + "."),
        (MXFP6, SGLANG, "refuses", "refused: floats of compressed-tensors have 4 or 8", NO_BITS),
    ],
)  # fmt: skip
def test_what_sglang_does(config: Config, devices: Sequence[str], verdict: str, says: str, message: str) -> None:
    for device in devices:
        found = asked(config, "sglang", device)
        assert (found.verdict, found.says[: len(says)], found.message) == (verdict, says, message), device


@pytest.mark.parametrize("device", SGLANG)
def test_sglang_decodes_awq_that_marlin_has_not_in_float16(device: str) -> None:
    own, other = (asked({**AWQ, "group_size": size}, "sglang", device, dtype="float16") for size in (128, 16))
    assert (own.verdict, own.kernel, other.verdict, other.kernel) == ("loads", "Marlin", "loads", "")
    assert asked(GPTQ, "sglang", device).kernel == "Marlin"


@pytest.mark.parametrize(("inputs", "verdict"), [("static", "loads"), ("dynamic", "executes-other")])
def test_sglang_wants_calibrated_inputs_of_modelopts_fp8(inputs: str, verdict: str) -> None:
    for device in FP8_ON:
        assert asked(MODELOPT_FP8, "sglang", device, inputs=inputs).verdict == verdict


def test_sglang_on_a_cpu_runs_models_with_experts_and_decoded_ones() -> None:
    assert asked(None, "sglang", "cpu", experts=True).verdict == "loads"
    decoded = answer([Case("dense", "dense", bits=4, dtype="bfloat16")], "sglang", "cpu")
    assert (decoded.verdict, decoded.says[:42]) == ("loads", "W4A16: weights only, dequantized to bfloat")
    skipped = asked({**GPTQ, "dynamic": {"-:.*gate": {}}}, "sglang", "cpu")
    assert (skipped.verdict, skipped.says[:14]) == ("executes-other", "cannot be read")


@pytest.mark.parametrize(("device", "verdict"), [("sm80", "executes-other"), ("sm90", "loads")])
def test_sglang_runs_modelopts_fp8_beside_other_algorithms(device: str, verdict: str) -> None:
    found = asked(MODELOPT_FP8, "sglang", device, inputs="static", beside=True)
    assert (found.verdict, found.says[:4]) == (verdict, "W8A1" if device == "sm80" else "W8A8")
    rows = asked(PER_ROW, "sglang", device, beside=True)
    assert (rows.verdict, rows.says[:27]) == ("executes-other", "cannot be read: beside othe")


def test_sglang_has_one_scheme_for_linears_that_it_fuses() -> None:
    for config in (W4A16, GPTQ, MODELOPT):
        cases = [replace(case, apart=True) for case in cases_of(config)]
        for device in SGLANG:
            found = answer(cases, "sglang", device)
            assert (found.verdict, found.says[:24]) == ("refuses", "refused: q, k and v, and")


@pytest.mark.parametrize("device", ["sm80", "sm100"])
def test_sglang_rounds_inputs_of_integers_in_gguf_files(device: str) -> None:
    for layout, says in {
        "F16": "W16A16: weights only",
        "Q4_1": "W4A8: its kernels round",
        "Q8_0": "W8A8: its ke",
    }.items():
        found = answer([Case("gguf", layout, bits=int(says[1:].split("A")[0]))], "sglang", device)
        assert (found.verdict, found.says[: len(says)]) == ("loads", says)
    (cpu,) = {answer([Case("gguf", layout, bits=4)], "sglang", "cpu").says for layout in ("F16", "Q4_0", "NVFP4")}
    assert cpu == "refused: it has no gguf on a CPU"


@pytest.mark.parametrize("kind", ONLINE)
def test_sglang_rotates_no_inputs(kind: str) -> None:
    apply = [{"location": "input", "targets": ["model.layers.0.mlp.down_proj"]}]
    turned = {**W4A16, "transform_config": {"config_groups": {"a": {"type": kind, "apply": apply}}}}
    found = asked(turned, "sglang", "sm90")
    assert (found.verdict, found.says[:30]) == ("executes-other", "cannot be read: it does not lo")
