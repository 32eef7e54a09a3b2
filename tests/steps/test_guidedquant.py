"""mitigate with saliency: Hessians of the quantized stream, weighed by what calibrate found in full precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.artifacts.store import Artifact
from qtool.builtin.mitigators.gptq import GPTQ
from qtool.builtin.mitigators.guidedquant import GUIDED, GuidedQuant
from qtool.builtin.statistics.cross import Cross, FullHessian, HeldOut
from qtool.builtin.statistics.hessian import Hessian
from qtool.engine.gather import Gathering
from qtool.engine.problem import LayerProblem
from qtool.errors import ArtifactError, UsageError
from qtool.numerics.token_weights import TokenWeight
from qtool.steps.foresee import foresee
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import Workspace
from tests.oracles.guidedquant import guided_hessians_oracle
from tests.steps.conftest import Desk

TOKENS = 3 * 32
AT_ATTENTION = "uniform,attn_in=gradient"
Problems = dict[str, LayerProblem]


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> Problems:
    """What methods are asked, by linear."""
    seen: Problems = {}
    whole, siblings = GuidedQuant.quantize, GPTQ.quantize_siblings

    def quantize(self: GuidedQuant, problem: LayerProblem, config: Any) -> Any:  # noqa: ANN401 - a method's own
        seen[problem.name] = problem
        return whole(self, problem, config)

    def quantize_siblings(self: GPTQ, asked: list[LayerProblem], config: Any) -> Any:  # noqa: ANN401 - a method's own
        for problem in asked:
            seen.setdefault(problem.name, problem)
        return siblings(self, asked, config)

    monkeypatch.setattr(GuidedQuant, "quantize", quantize)
    monkeypatch.setattr(GPTQ, "quantize_siblings", quantize_siblings)
    return seen


def asked(desk: Desk, source: Artifact, method: str = "guidedquant", **changes: Any) -> MitigateRequest:  # noqa: ANN401 - of the request
    scheme = read_scheme("", {"weights": "int3-g8"}, desk.workspace.plugins)
    return replace(MitigateRequest(str(source.path), method, scheme), **changes)


def samples(desk: Desk, source: Artifact) -> Artifact:
    """What the linears of a model read, all tokens in order, in bfloat16."""
    return desk.calibrate(source=str(source.path), gather=("sample",), sample_size=TOKENS)


def near(received: Tensor, expected: Tensor) -> None:
    """Compare up to the rounding of activations and saliency to bfloat16."""
    torch.testing.assert_close(received.double(), expected.double(), rtol=0, atol=0.01 * float(expected.abs().max()))


@pytest.mark.parametrize("batch", [0, 2])
def test_hessians_are_of_the_quantized_stream(desk: Desk, problems: Problems, batch: int) -> None:
    statistics = desk.calibrate(gather=("hessian", "saliency"))
    quantized, _ = mitigate(asked(desk, statistics, batch=batch), desk.workspace)
    exact, rounded = samples(desk, statistics), samples(desk, quantized)
    assert len(problems) == 14
    for layer, seen in ((0, exact), (1, rounded)):
        x = seen.tensor(f"layers.{layer}.attn_in.sample")
        for module in ("q_proj", "k_proj", "v_proj"):
            saliency = statistics.tensor(f"layers.{layer}.self_attn.{module}.saliency")
            entries = problems[f"model.layers.{layer}.self_attn.{module}"].entries
            near(entries[GUIDED], guided_hessians_oracle(x, saliency))
            other = guided_hessians_oracle(x, saliency.roll(1, 0))  # tokens in another order
            assert float((entries[GUIDED] - other).abs().max()) > 0.03 * float(other.abs().max())
    stale = guided_hessians_oracle(exact.tensor("layers.1.attn_in.sample"), saliency)
    assert float((entries[GUIDED] - stale).abs().max()) > 0.03 * float(stale.abs().max())
    for layer, site, module in ((0, "up_down", "mlp.down_proj"), (0, "o_in", "self_attn.o_proj")):
        saliency = statistics.tensor(f"layers.{layer}.{module}.saliency")
        entries = problems[f"model.layers.{layer}.{module}"].entries
        near(entries[GUIDED], guided_hessians_oracle(exact.tensor(f"layers.{layer}.{site}.sample"), saliency))
    assert all(report["loss_guided"] > 0 for report in quantized.manifest.details["layers"].values())


class WeighedMean:
    """A guided statistic of somebody else's: one row a group."""

    version = 1

    def start_guided(self, n: int, saliency: Tensor) -> Any:  # noqa: ANN401 - an accumulator
        class Kept:
            rows: list[Tensor]

            def __init__(self) -> None:
                self.rows = []

            def update(self, x: Tensor) -> None:
                assert x.shape[1] == n
                self.rows.append(x)

            def result(self) -> Tensor:
                return saliency.T @ torch.cat(self.rows) / saliency.sum(0)[:, None]

        return Kept()


def test_methods_may_need_guided_statistics_of_their_own(
    desk: Desk, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    offers, load = desk.workspace.plugins.offers["statistics"], type(desk.workspace.plugins).load
    name = "weighed_mean"

    def loaded(self: Any, kind: str, asked_for: str) -> Any:  # noqa: ANN401 - of plugins
        return WeighedMean() if asked_for == name else load(self, kind, asked_for)

    monkeypatch.setitem(offers, name, offers["saliency"])
    monkeypatch.setattr(type(desk.workspace.plugins), "load", loaded)
    monkeypatch.setattr(GuidedQuant, "needs", (*GuidedQuant.needs, name))
    statistics = desk.calibrate(gather=("hessian", "saliency"))
    mitigate(asked(desk, statistics), desk.workspace)
    x = samples(desk, statistics).tensor("layers.0.attn_in.sample").float()
    for module in ("q_proj", "k_proj"):
        saliency = statistics.tensor(f"layers.0.self_attn.{module}.saliency").float()
        found = problems[f"model.layers.0.self_attn.{module}"].entries[name]
        near(found, (saliency.T @ x / saliency.sum(0)[:, None]).double())


def test_constant_saliency_gives_the_codes_of_gptq(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = desk.calibrate(gather=("hessian", "saliency"), output=desk.workspace.home / "whole.safetensors")

    def constant(gradient: Tensor, groups: int) -> Tensor:
        return torch.ones(len(gradient), groups)

    monkeypatch.setattr("qtool.builtin.statistics.saliency.group_saliency", constant)
    statistics = desk.calibrate(gather=("hessian", "saliency"))
    guided, _ = mitigate(asked(desk, statistics), desk.workspace)
    uniform, _ = mitigate(asked(desk, statistics, "gptq", token_weight="uniform"), desk.workspace)
    gradient, _ = mitigate(asked(desk, statistics, "gptq", token_weight="gradient"), desk.workspace)
    assert guided.manifest.tensors == uniform.manifest.tensors == gradient.manifest.tensors
    other, _ = mitigate(asked(desk, whole), desk.workspace)
    assert other.manifest.tensors != guided.manifest.tensors


def test_token_weights_of_gradients(desk: Desk, problems: Problems) -> None:
    statistics = desk.calibrate(gather=("hessian", "saliency"))
    rule = "gradient,up_down=uniform"
    quantized, _ = mitigate(asked(desk, statistics, "gptq", token_weight=rule), desk.workspace)
    assert quantized.manifest.step.config["token_weight"] == rule
    exact = samples(desk, statistics)
    for site, modules in (
        ("attn_in", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp_in", ("mlp.gate_proj", "mlp.up_proj")),
        ("up_down", ("mlp.down_proj",)),
    ):
        found = [statistics.tensor(f"layers.0.{module}.saliency").double().mean(1) for module in modules]
        weights = torch.stack([one / one.sum() for one in found]).mean(0)
        weights = torch.ones(TOKENS) if site == "up_down" else weights
        expected = guided_hessians_oracle(exact.tensor(f"layers.0.{site}.sample"), weights[:, None])[0]
        for module in modules:
            hessian = problems[f"model.layers.0.{module}"].hessian
            assert hessian is not None
            near(hessian, expected)
            assert GUIDED not in problems[f"model.layers.0.{module}"].entries


def test_tokens_weigh_by_gradients_where_statistics_hold_them(desk: Desk) -> None:
    statistics = desk.calibrate(gather=("hessian", "saliency"))
    chosen, _ = mitigate(asked(desk, statistics, "gptq"), desk.workspace)
    asked_for, _ = mitigate(asked(desk, statistics, "gptq", token_weight=AT_ATTENTION), desk.workspace)
    assert chosen.manifest.step.config["token_weight"] == AT_ATTENTION
    assert chosen.manifest.id == asked_for.manifest.id
    everywhere, _ = mitigate(asked(desk, statistics, "gptq", token_weight="gradient"), desk.workspace)
    assert everywhere.manifest.tensors != chosen.manifest.tensors
    carried, _ = mitigate(asked(desk, statistics, "gptq", propagate="none"), desk.workspace)
    assert carried.manifest.step.config["token_weight"] == "uniform"
    plain = desk.calibrate(gather=("hessian",))
    without, _ = mitigate(asked(desk, plain, "gptq"), desk.workspace)
    assert without.manifest.step.config["token_weight"] == "inverse-norm:0.5"
    assert without.manifest.tensors != chosen.manifest.tensors


def test_methods_without_needs_weigh_tokens_by_gradients_too(desk: Desk) -> None:
    statistics = desk.calibrate(num_samples=12, gather=("absmax", "saliency"))
    request = asked(desk, statistics, "rtn+e2e-qp", settings={"epochs": "1"})
    assert foresee(mitigate, request, desk.workspace).to_json()["estimated_seconds"] > 0
    found, _ = mitigate(request, desk.workspace)
    assert found.manifest.step.config["token_weight"] == AT_ATTENTION
    other, _ = mitigate(replace(request, token_weight="uniform"), desk.workspace)
    losses, others = (one.manifest.details["layers"] for one in (found, other))
    weighed = {name for name in losses if losses[name]["loss"] != others[name]["loss"]}
    assert weighed == {name for name in losses if name.endswith(("q_proj", "k_proj", "v_proj"))}


@pytest.mark.parametrize(("method", "rule"), [("quarot", AT_ATTENTION), ("sinq", "inverse-norm:0.5")])
def test_tokens_weigh_by_gradients_where_plans_carry_them(desk: Desk, method: str, rule: str) -> None:
    statistics = desk.calibrate(gather=("hessian", "absmax", "saliency"))
    plan, _ = transform(TransformRequest(str(statistics.path), method), desk.workspace)
    found, _ = mitigate(asked(desk, plan, "gptq"), desk.workspace)
    assert found.manifest.step.config["token_weight"] == rule
    anew = desk.calibrate(source=str(plan.path), gather=("hessian", "saliency"))
    workspace = replace(desk.workspace, inputs={"statistics": anew.path})
    behind, _ = mitigate(asked(desk, plan, "gptq"), workspace)
    assert behind.manifest.step.config["token_weight"] == AT_ATTENTION


@pytest.mark.parametrize("behind", ["cd", "qera", "autoround", "e2e-qp"])
def test_its_own_loss_is_not_told_of_what_another_method_made_of_it(desk: Desk, behind: str) -> None:
    statistics = desk.calibrate(gather=("hessian", "saliency"))
    settings = {"qera": {"rank": "2"}, "autoround": {"steps": "2"}, "e2e-qp": {"epochs": "1"}}.get(behind, {})
    alone, _ = mitigate(asked(desk, statistics), desk.workspace)
    found, _ = mitigate(asked(desk, statistics, f"guidedquant+{behind}", settings=settings), desk.workspace)
    before, after = (one.manifest.details["layers"]["model.layers.0.self_attn.q_proj"] for one in (alone, found))
    assert set(before) - set(after) == {"loss_guided"}
    assert after["loss_before"] == pytest.approx(before["loss"], rel=1e-6)
    assert after["dampening_frac"] == before["dampening_frac"]


def test_a_family_that_calls_the_inputs_of_attention_otherwise_weighs_all_by_gradients(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = desk.workspace.plugins.load("families", "llama")
    linears = tuple(replace(one, reads=one.reads.replace("attn_in", "mixer_in")) for one in llama.linears)
    norms = {name.replace("attn_in", "mixer_in"): norm for name, norm in llama.norms.items()}
    other = replace(desk.workspace.model(str(desk.model)), family=replace(llama, linears=linears, norms=norms))
    monkeypatch.setattr(Workspace, "model", lambda *_: other)
    statistics = desk.calibrate(gather=("hessian", "saliency"))
    found, _ = mitigate(asked(desk, statistics, "gptq"), desk.workspace)
    assert found.manifest.step.config["token_weight"] == "gradient"


def test_interrupted_and_run_again(desk: Desk) -> None:
    statistics = desk.calibrate(gather=("hessian", "saliency"))
    whole, _ = mitigate(asked(desk, statistics, output=desk.workspace.home / "whole.safetensors"), desk.workspace)
    workspace, _ = desk.watched(stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        mitigate(asked(desk, statistics), workspace)
    resumed, _ = mitigate(asked(desk, statistics), desk.workspace)
    assert resumed.manifest.id == whole.manifest.id
    sequential, _ = mitigate(asked(desk, statistics, true_sequential=True), desk.workspace)
    assert sequential.manifest.tensors != whole.manifest.tensors


def test_behind_a_plan(desk: Desk, problems: Problems) -> None:
    """Statistics of the model serve a rotation of it: of the mean over rows they are those of the rotated model."""
    statistics = desk.calibrate(gather=("hessian", "saliency"))
    plan, _ = transform(TransformRequest(str(statistics.path), "quarot"), desk.workspace)
    mitigate(asked(desk, plan), desk.workspace)
    carried = {name: problem.entries[GUIDED] for name, problem in problems.items()}
    behind = desk.calibrate(source=str(plan.path), gather=("hessian", "saliency"))
    problems.clear()
    mitigate(asked(desk, plan), replace(desk.workspace, inputs={"statistics": behind.path}))
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"):
        name = f"model.layers.0.{module}"
        near(carried[name], problems[name].entries[GUIDED])
    for module in ("self_attn.o_proj", "mlp.down_proj"):
        name = f"model.layers.0.{module}"
        assert torch.equal(carried[name], carried[name][:1].expand_as(carried[name]))
        saliency = behind.tensor(f"layers.0.{module}.saliency").double().mean(0)
        own = (problems[name].entries[GUIDED] * (saliency / saliency.sum())[:, None, None]).sum(0)
        near(carried[name][0], own)


def test_what_scales_outputs_needs_its_own_statistics(desk: Desk) -> None:
    statistics = desk.calibrate(gather=("hessian", "absmax", "mean_abs", "sample", "saliency"))
    scheme = read_scheme("", {"weights": "int3-g8"}, desk.workspace.plugins)
    plan, _ = transform(TransformRequest(str(statistics.path), "awq", scheme=scheme), desk.workspace)
    with pytest.raises(ArtifactError, match="the plan changes the outputs") as refused:
        mitigate(asked(desk, plan), desk.workspace)
    assert "qtool calibrate PLAN --gather hessian,saliency" in str(refused.value)
    behind = desk.calibrate(source=str(plan.path), gather=("hessian", "saliency"))
    mitigate(asked(desk, plan), replace(desk.workspace, inputs={"statistics": behind.path}))


def test_what_is_missing_is_refused(desk: Desk) -> None:
    plain = desk.calibrate(gather=("absmax", "hessian"))
    for changes in ({}, {"method": "gptq", "token_weight": "gradient"}):
        with pytest.raises(ArtifactError, match=r"the statistics lack `saliency` at `model\.layers\.0\.") as refused:
            mitigate(asked(desk, plain, **changes), desk.workspace)
        assert "--gather absmax,hessian,saliency" in str(refused.value)
    statistics = desk.calibrate(gather=("hessian", "saliency"))
    with pytest.raises(UsageError, match="there are none"):
        mitigate(asked(desk, statistics, propagate="none"), desk.workspace)
    with pytest.raises(UsageError, match="no linear reads a site of the kind `down_in`"):
        mitigate(asked(desk, statistics, "gptq", token_weight="uniform,down_in=clip"), desk.workspace)
    with pytest.raises(UsageError, match="needs statistics"):
        mitigate(replace(asked(desk, statistics), source=str(desk.model)), desk.workspace)
    with pytest.raises(UsageError, match="carried statistics keep the token weight"):
        mitigate(asked(desk, statistics, "gptq", propagate="none", token_weight="gradient"), desk.workspace)
    weighed = desk.calibrate(gather=("hessian", "saliency"), token_weight="gradient")
    mitigate(asked(desk, weighed, "gptq", propagate="none", token_weight="gradient"), desk.workspace)


@pytest.mark.parametrize("rule", ["gradient", "uniform"])
def test_both_streams_have_the_same_weights(rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, saliency = torch.randn(40, 6, generator=generator), torch.rand(40, generator=generator)
    told = Gathering(40, TokenWeight(rule), window=4, saliency=saliency if rule == "gradient" else None)
    pairs = [one.start_pair(6, told, x.device) for one in (Cross(), FullHessian(), HeldOut())]
    alone = Hessian().start(6, told, x.device)
    for part in torch.split(x, 12):
        alone.update(part)
        for one in pairs:
            one.update_pair(part, part)
    weights = saliency if rule == "gradient" else torch.ones(40)
    expected = guided_hessians_oracle(x, weights[:, None])[0].float()
    for one in (alone, *pairs[:2]):
        torch.testing.assert_close(one.result(), expected)
    held = guided_hessians_oracle(x[36:], weights[36:, None])[0].float() * weights[36:].sum() / weights.sum()
    torch.testing.assert_close(pairs[2].result(), held.expand(2, -1, -1))
