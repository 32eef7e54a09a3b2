"""Channels that a plan sets apart, through the whole pipeline: solved, stored, executed, counted and exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qtool.artifacts.store import Artifact
from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding
from qtool.errors import SchemeError, UsageError
from qtool.scheme import ModelScheme
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.labels import labels_of
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.schemes import read_scheme
from qtool.steps.storage import stored_bits
from qtool.steps.subjects import open_subject
from qtool.steps.transform import TransformRequest, transform
from qtool.testing.tiny_models import double_precision, exact_logits
from tests.steps.conftest import Desk

CPU = torch.device("cpu")
W4A4 = {"weights": "int4-g8", "activations": "int4-asym-g8-sfp32"}


def quantized(desk: Desk, transforms: str = "atom", method: str = "gptq", **parts: str) -> Artifact:
    """Plan and quantize in groups of 8: at every input of 24 or 40 channels, 8 or 16 are set apart."""
    scheme = read_scheme("", {**W4A4, **parts}, desk.workspace.plugins)
    statistics = str(desk.calibrate().path)
    plan, _ = transform(TransformRequest(statistics, transforms, scheme=scheme), desk.workspace)
    return mitigate(MitigateRequest(str(plan.path), method, scheme), desk.workspace)[0]


@pytest.mark.parametrize("transforms", ["atom", "resq"])
def test_what_is_evaluated_is_what_is_stored(desk: Desk, transforms: str) -> None:
    artifact = quantized(desk, transforms)
    opened = open_subject(str(artifact.path), desk.workspace)
    subject, graph = opened.subject, opened.model.graph
    segments = {site: plan.segments for site, plan in subject.plan.sites.items() if plan.segments}
    kinds = {site.rpartition(".")[2] for site in segments}
    assert kinds == {"attn_in", "mlp_in", "o_in"} | ({"up_down"} if transforms == "atom" else set())
    assert all(one.channels % 8 == 0 and one.format == "int8" for (one,) in segments.values())
    for linear in graph.linears:
        names = {name.removeprefix(f"{linear.name}.") for name in artifact.names(f"{linear.name}.")}
        expected = {"codes", "scale"}
        if linear.reads in segments:
            expected |= {f"segments.0.{name}" for name in expected}
        assert names == expected
        executed = subject.block(linear.layer, torch.float64).state[f"{linear.spec.module}.weight"]
        assert torch.equal(executed, subject.linear(linear).weight(subject.weight_grid(linear)))
        rounding = subject.rounding(linear.layer, linear.spec.reads, CPU)
        assert isinstance(rounding, Rounding)
        formats = [part.scheme.format for part in rounding.grid.parts]
        assert formats == (["int4", "int8"] if linear.reads in segments else ["int4"])
    metrics, _ = evaluate(EvalRequest(str(artifact.path), (str(desk.text),), seq_len=32, max_windows=2), desk.workspace)
    measured = next(iter(metrics.manifest.details["values"].values()))
    assert 0 < measured < float("inf")


def test_bits_per_weight_count_the_parts(desk: Desk) -> None:
    opened = open_subject(str(quantized(desk, method="rtn").path), desk.workspace)
    graph = opened.model.graph
    bits = weights = 0.0
    for linear in graph.linears:
        rows, n = opened.model.places[f"{linear.name}.weight"].shape
        apart = sum(segment.channels for segment in opened.subject.plan.at(linear.reads).segments)
        bits += rows * (4 * (n - apart) + 8 * apart + 16 * n / 8)
        weights += rows * n
        assert apart in (8, 16)
    online = [plan.online for plan in opened.subject.plan.sites.values()]
    kept = sum(t.nbytes for operators in online for one in operators for t in one.state()[0].values())
    assert kept > 0, "channels that are set apart are permuted to the end"
    assert stored_bits(opened)["linears"] == pytest.approx((bits + kept * 8) / weights, rel=1e-12)
    assert labels_of(opened, desk.workspace)["segments"] == "8 int8 at attn_in, mlp_in, o_in; 16 int8 at up_down"


def test_segments_bring_the_outputs_nearer(desk: Desk) -> None:
    def distance(transforms: str) -> float:
        subject = open_subject(str(quantized(desk, transforms).path), desk.workspace).subject
        plain = replace(subject, quantized=None, scheme=ModelScheme())
        with double_precision():
            ours, exact = exact_logits(subject), exact_logits(plain)
        return float((ours - exact).square().mean() / exact.square().mean())

    assert distance("atom") < distance("identity")


def test_multipliers_belong_to_their_parts(desk: Desk) -> None:
    artifact = quantized(desk, method="rtn", weights="int4-g8", activations="fp4-sym-g8-se4m3")
    assert "layers.0.attn_in.input_global_scale" in artifact.names()
    assert not any("segments" in name for name in artifact.names() if name.endswith("input_global_scale"))
    subject = open_subject(str(artifact.path), desk.workspace).subject
    rounding = subject.rounding(0, "attn_in", CPU)
    assert rounding is not None
    first, second = rounding.global_scales
    assert first is not None
    assert second is None
    assert not rounding.shared


def test_other_groups_than_those_of_the_plan_are_refused_before_any_work(desk: Desk) -> None:
    plugins = desk.workspace.plugins
    planned = read_scheme("", W4A4, plugins)
    plan, _ = transform(TransformRequest(str(desk.calibrate().path), "atom", scheme=planned), desk.workspace)
    coarse = read_scheme("", {"weights": "int4-g12"}, plugins)
    with pytest.raises(SchemeError, match=r"sets channels apart in the input of `model\.layers\.0\.self_attn\.q_proj`"):
        mitigate(MitigateRequest(str(plan.path), "rtn", coarse), desk.workspace)


def test_exporters_write_dense_weights_or_refuse(desk: Desk, tmp_path: Path) -> None:
    artifact = quantized(desk, method="rtn")
    with pytest.raises(UsageError, match="compressed-tensors has one format for all inputs of a linear"):
        pack(PackRequest(str(artifact.path), "compressed-tensors", output=tmp_path / "no"), desk.workspace)
    packed, _ = pack(PackRequest(str(artifact.path), "hf", output=tmp_path / "dense"), desk.workspace)
    assert packed.manifest.kind == "checkpoint"


def test_a_clip_of_activations_is_not_exported_where_consumers_would_not_clip(desk: Desk, tmp_path: Path) -> None:
    scheme = read_scheme(
        "", {"weights": "int8-sym-channel", "activations": "int8-sym-token-c0.9"}, desk.workspace.plugins
    )
    artifact, _ = mitigate(MitigateRequest(str(desk.model), "rtn", scheme), desk.workspace)
    with pytest.raises(SchemeError, match=r"hint: nearest that fits: --activations int8-sym-token-sbf16$"):
        pack(PackRequest(str(artifact.path), "compressed-tensors", output=tmp_path / "no"), desk.workspace)


def test_grids_follow_the_plan_and_the_scheme(desk: Desk) -> None:
    subject = open_subject(str(quantized(desk, method="rtn").path), desk.workspace).subject
    linear = subject.model.graph.linears[0]
    weights, inputs = subject.weight_grid(linear), subject.input_grid(linear)
    assert isinstance(weights, Grid)
    assert inputs is not None
    assert [str(part.scheme) for part in weights.parts] == ["int4-sym-g8-sbf16", "int8-sym-g8-sbf16"]
    assert [str(part.scheme) for part in inputs.parts] == ["int4-asym-g8-sfp32", "int8-asym-g8-sfp32"]
    with pytest.raises(LookupError):
        replace(subject, scheme=replace(subject.scheme, weights=None)).weight_grid(linear)
