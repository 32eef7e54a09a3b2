"""What GPTQ, AWQ and ModelOpt checkpoints cannot hold, or nobody reads, is refused before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtool.builtin.exporters.awq import AWQ
from qtool.builtin.exporters.gptq import GPTQ, GPTQv2
from qtool.builtin.exporters.modelopt import ModelOpt
from qtool.engine.exporter import UNREADABLE, Exporter
from qtool.engine.planner import extend
from qtool.errors import NumericalError, SchemeError, UsageError
from qtool.model.plan import Plan, Proposal
from qtool.numerics.operators import Diag, Hadamard
from qtool.plugins import Plugins
from qtool.scheme import parse_tensor_scheme
from qtool.steps.schemes import read_scheme
from tests.builtin.layouts.conftest import NAME, Make, changed
from tests.builtin.packed import written

REFUSED = [
    (GPTQ(), ("int5-sym-g32",), "codes of 2, 3, 4, 8 bits", "--weights int8-sym-g32-sfp16"),
    (GPTQ(), ("nvfp4",), "integers only", "--weights int4-sym-g16-sfp16"),
    (GPTQ(), ("int4-sym-tensor",), "no scale for a whole tensor", "--weights int4-sym-channel-sbf16"),
    (GPTQ(), ("int4-sym-g32-sfp32",), "float16 scales", "--weights int4-sym-g32-sfp16"),
    (GPTQ(), ("int4-sym-g32", "int8-sym-token"), "for weights only", "--weights int4-sym-g32-sbf16"),
    (GPTQ(), ("int4-sym-g32", "", "fp8-tensor"), "for weights only", "--weights int4-sym-g32-sbf16"),
    (AWQ(), ("int3-sym-g32",), "codes of 4 bits", "--weights int4-sym-g32-sfp16"),
    (AWQ(), ("int8-asym-g32",), "codes of 4 bits", "--weights int4-asym-g32-sfp16"),
    (ModelOpt(), ("int4-sym-g32",), "NVFP4 and FP8", "--weights nvfp4"),
    (ModelOpt(), ("mxfp4",), "NVFP4 and FP8", "--weights nvfp4"),
    (ModelOpt(), ("fp8-tensor", "fp8-token"), "one a tensor likewise", "--activations fp8-tensor"),
    (ModelOpt(), ("fp8-channel", "fp8-tensor"), "one a tensor likewise", "--activations fp8-token"),
    (ModelOpt(), ("fp8-tensor", "fp8-tensor-c0.9"), "one a tensor likewise", "--activations fp8-tensor"),
    (ModelOpt(), ("fp8-channel",), "one a tensor likewise", "--activations fp8-token"),
    (ModelOpt(), ("fp8-b32", "fp8-g32"), "one a tensor likewise", "--activations fp8-token"),
    (ModelOpt(), ("nvfp4", "mxfp4"), "NVFP4 activations", "--activations nvfp4"),
    (
        ModelOpt(),
        ("nvfp4", "", "fp8-tensor"),
        "FP8 cache with static",
        "--weights nvfp4 --kv fp8-sym-tensor-sfp32-static",
    ),
]


@pytest.mark.parametrize(("exporter", "scheme", "reason", "hint"), REFUSED)
def test_a_scheme_without_a_place_is_refused_with_the_nearest(
    make: Make, exporter: Exporter, scheme: tuple[str, ...], reason: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=reason) as refused:
        exporter.check(make(*scheme))
    assert refused.value.hint.partition(";")[0].endswith(hint)
    if "--weights int" in hint:
        exporter.check(make(hint.rpartition(" ")[2]))


def test_version_one_refuses_a_zero_point_of_zero_and_names_version_two(make: Make, tmp_path: Path) -> None:
    subject = make("int4-asym-g32")
    assert subject.quantized is not None
    zeros = subject.quantized.tensor(f"{NAME}.zero_point")
    GPTQ().check(changed(subject, tmp_path / "ones", **{f"{NAME}.zero_point": torch.full_like(zeros, 0x11)}))
    with_one = torch.full_like(zeros, 0x11)
    with_one[3, 0] = 0x10
    odd = changed(subject, tmp_path / "zero", **{f"{NAME}.zero_point": with_one})
    with pytest.raises(UsageError, match="less one") as refused:
        GPTQ().check(odd)
    assert refused.value.facts == (("first", NAME), ("groups", "1 of 128"))
    assert "--to gptq-v2" in refused.value.hint
    written(GPTQv2(), odd, tmp_path / "out")
    written(AWQ(), odd, tmp_path / "awq")


@pytest.mark.parametrize("exporter", [GPTQ(), AWQ()])
@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_scales_that_float16_cannot_hold_are_refused_by_name(
    make: Make, tmp_path: Path, exporter: Exporter, scale: float
) -> None:
    subject = make("int4-sym-g32")
    assert subject.quantized is not None
    scales = subject.quantized.tensor(f"{NAME}.scale").clone()
    scales[5, 1] = scale
    odd = changed(subject, tmp_path / "odd", **{f"{NAME}.scale": scales})
    with pytest.raises(NumericalError, match=f"cannot hold scales of `{NAME}`") as refused:
        exporter.check(odd)
    assert refused.value.facts[0] == ("scales", 1)
    assert refused.value.hint.endswith("--weights int4-sym-g32-sfp16")


def test_small_scales_that_float16_holds_exactly_are_written(make: Make, tmp_path: Path) -> None:
    subject = make("int4-sym-g32")
    assert subject.quantized is not None
    scales = subject.quantized.tensor(f"{NAME}.scale").clone()
    scales[5, 1] = 2.0**-20  # subnormal in float16
    written(GPTQ(), changed(subject, tmp_path / "odd", **{f"{NAME}.scale": scales}), tmp_path / "out")


@pytest.mark.parametrize(("weights", "divides"), [("int3-sym-channel", 32), ("int2-sym-channel", 16)])
def test_codes_that_do_not_fill_words_are_refused_by_name(make: Make, weights: str, divides: int) -> None:
    with pytest.raises(UsageError, match=r"whole words, which the codes of `model\.layers\.0\.mlp") as refused:
        GPTQ().check(make(weights, name="narrow"))
    assert ("codes to fill them", divides) in refused.value.facts
    assert refused.value.hint == "qtool pack SOURCE --to compressed-tensors"
    GPTQ().check(make("int4-sym-channel", name="narrow"))


@pytest.mark.parametrize(
    ("exporter", "weights"), [(GPTQ(), "int4-sym-g32"), (AWQ(), "int4-sym-g32"), (ModelOpt(), "nvfp4")]
)
def test_what_goes_beyond_codes_is_refused_in_the_name_of_the_layout(
    make: Make, exporter: Exporter, weights: str
) -> None:
    subject = make(weights)
    dims = subject.model.graph.dims
    online = [Diag(torch.rand(dims.intermediate) + 0.5), Hadamard(dims.intermediate)]
    plan = extend(Plan(), Proposal({"layers.0.up_down": online}), subject.model.graph, method="test")
    with pytest.raises(UsageError, match="forward pass"):
        exporter.check(replace(subject, plan=plan))
    with pytest.raises(UsageError, match="has no low-rank corrections") as refused:
        exporter.check(make(weights, method="rtn+lorc"))
    assert str(refused.value).startswith(getattr(exporter, "layout", "modelopt"))
    with pytest.raises(UsageError, match="no codes"):
        exporter.check(replace(subject, quantized=None))


@pytest.mark.parametrize(
    ("exporter", "scheme"),
    [(GPTQ(), ("int4-sym-g32",)), (AWQ(), ("int4-asym-g32",)), (ModelOpt(), ("nvfp4",))],
)
def test_experts_are_written_for_the_consumer_that_reads_them(
    make: Make, tmp_path: Path, exporter: Exporter, scheme: tuple[str, ...]
) -> None:
    exported = written(exporter, make(*scheme, name="mixtral"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    leaf = "weight" if isinstance(exporter, ModelOpt) else "qweight"
    assert f"model.layers.1.block_sparse_moe.experts.1.w2.{leaf}" in stored
    assert exported.consumers["transformers"].startswith(UNREADABLE)
    assert exported.consumers["vllm"].startswith("W4A16")


@pytest.mark.parametrize(
    ("exporter", "scheme"),
    [
        (GPTQv2(), ("int4-asym-g32",)),
        (GPTQ(), ("int3-sym-g32",)),
        (GPTQ(), ("int4-sym-g16",)),
        (ModelOpt(), ("fp8-channel", "fp8-token")),
        (ModelOpt(), ("fp8-tensor", "fp8-tensor")),
    ],
)
def test_experts_that_no_consumer_reads_are_refused(make: Make, exporter: Exporter, scheme: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="no consumer reads") as refused:
        exporter.check(make(*scheme, name="mixtral"))
    assert refused.value.hint == "qtool pack SOURCE --to compressed-tensors"


@pytest.mark.parametrize(
    ("exporter", "weights", "said"),
    [
        (GPTQ(), "int4-sym-g32", "W4A16: activations are not quantized (by"),
        (GPTQ(), "int8-sym-channel", "W8A16: activations are not quantized (by"),
        (GPTQ(), "int4-sym-g32-sfp16", "W4A16: activations are not quantized; scales are rounded to bfloat16 unless"),
        (GPTQ(), "int4-sym-g16", "refused: it wants groups of 32, 64 or 128"),
        (GPTQv2(), "int4-asym-g32", "refused: it wants symmetric weights of 4 or 8 bits"),
        (GPTQ(), "int3-sym-g32", "refused: it wants symmetric weights of 4 or 8 bits"),
        (AWQ(), "int4-asym-g32", "W4A16: activations are not quantized (by"),
    ],
)
def test_what_vllm_does_is_said(make: Make, tmp_path: Path, exporter: Exporter, weights: str, said: str) -> None:
    assert written(exporter, make(weights), tmp_path / "out").consumers["vllm"].startswith(said)


def test_modelopt_inputs_must_be_calibrated(make: Make, plugins: Plugins) -> None:
    subject = make("nvfp4")
    scheme = replace(subject.scheme, activations=parse_tensor_scheme("nvfp4", plugins.format))
    with pytest.raises(UsageError, match="not calibrated"):
        ModelOpt().check(replace(subject, scheme=scheme))


@pytest.mark.parametrize("word", ["real", "offset"])
@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "gptq-v2", "awq"])
def test_real_zero_points_are_refused_and_the_nearest_is_named(
    make: Make, plugins: Plugins, to: str, word: str
) -> None:
    exporter = plugins.load("exporters", to)
    with pytest.raises(UsageError, match=r"zero points of .* whole numbers") as refused:
        exporter.check(make(f"int4-asym-g32-{word}-sbf16"))
    nearest = refused.value.hint.partition("--weights ")[2]
    assert nearest == "int4-asym-g32-sbf16"
    exporter.check(make(nearest))


@pytest.mark.parametrize("word", ["real", "offset"])
def test_real_zero_points_of_inputs_are_refused(make: Make, plugins: Plugins, word: str) -> None:
    with pytest.raises(UsageError, match="whole numbers") as refused:
        plugins.load("exporters", "compressed-tensors").check(make("int4-sym-g32", f"int8-asym-token-{word}"))
    assert refused.value.hint == "nearest that fits: --activations int8-asym-token-sbf16"


@pytest.mark.parametrize(
    ("kv", "nearest"),
    [
        ("int4-asym-token-head", "int4-asym-token-head-sfp32"),
        ("int4-sym-token-head", "int4-sym-token-head-sfp32-half"),
        ("int4-asym-token-head-real-sfp32", "int4-asym-token-head-sfp32"),
        ("int4-asym-token-head-offset-sfp32", "int4-asym-token-head-sfp32"),
        ("keys=fp8-channel-g32,values=fp8-tensor", "fp8-tensor"),
    ],
)
def test_caches_of_other_schemes_are_refused(
    make: Make, plugins: Plugins, kv: str, nearest: str, tmp_path: Path
) -> None:
    subject = make("int4-sym-g32")
    scheme = replace(subject.scheme, kv=read_scheme("", {"kv": kv}, plugins).kv)
    with pytest.raises(SchemeError) as refused:
        plugins.load("exporters", "compressed-tensors").check(changed(subject, tmp_path / "other", scheme))
    assert refused.value.hint == f"nearest that fits: --kv {nearest}"
