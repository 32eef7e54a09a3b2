"""Outlier Suppression+ chooses what a sweep by hand over a block of transformers chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from qtool.builtin.transforms.outlier_suppression_plus import (
    OutlierSuppressionPlus,
    OutlierSuppressionPlusConfig,
    best_threshold,
    middle,
    threshold_scale,
)
from qtool.engine.planner import extend
from qtool.errors import ArtifactError, UsageError
from qtool.model.plan import Plan, Proposal, TransformContext
from qtool.model.statistics import SiteStatistics
from qtool.numerics.operators import Diag, Shift
from qtool.scheme import ModelScheme, TensorScheme
from qtool.steps.calibrate import WINDOWS
from qtool.steps.transform import context_of
from qtool.testing import TinyModel, check_transform, plan_of, tiny_model

SMALL = OutlierSuppressionPlusConfig(tokens=64, steps=6, search="linear")
W3A4 = ModelScheme(
    weights=TensorScheme("int3", symmetric=False),
    activations=TensorScheme("int4", symmetric=False, strategy="token"),
)


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("llama") as made:
        yield made


@pytest.fixture(scope="module")
def neox() -> Iterator[TinyModel]:
    with tiny_model("gpt_neox") as made:
        yield made


@pytest.fixture
def context(tiny: TinyModel) -> TransformContext:
    return context_of(tiny.subject, tiny.statistics, scheme=W3A4)


def by_hand(x: Tensor, levels: int) -> Tensor:
    """Round each row to an asymmetric grid that holds zero."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low) / (levels - 1)
    return ((x / scale).round().clamp((low / scale).round(), (low / scale).round() + levels - 1)) * scale


class TestFormulas:
    def test_only_channels_above_the_threshold_are_scaled(self) -> None:
        scale = threshold_scale(torch.tensor([8.0, 2.0, 1.0, 0.0]), 2.0)
        assert scale.tolist() == [4, 1, 1, 1]

    def test_the_middle_makes_extremes_opposite(self) -> None:
        low, high = torch.tensor([-1.0, 2.0, -6.0]), torch.tensor([3.0, 4.0, -2.0])
        z = middle(low, high)
        assert z.tolist() == [1, 3, -4]
        torch.testing.assert_close(high - z, z - low)


class TestThresholds:
    def test_the_papers_sweep(self) -> None:
        asked: list[float] = []
        config = OutlierSuppressionPlusConfig(search="linear", steps=4, lowest=1.0)
        assert best_threshold(1.6, lambda t: asked.append(t) or t, config) == pytest.approx(1.0)  # type: ignore[func-returns-value]
        assert asked == pytest.approx([1.6, 1.4, 1.2, 1.0])

    def test_wide_ranges_are_swept_in_more_steps(self) -> None:
        asked: list[float] = []
        config = OutlierSuppressionPlusConfig(search="linear", steps=4)
        assert best_threshold(100.0, lambda t: asked.append(t) or -t, config) == 100.0  # type: ignore[func-returns-value]
        assert len(asked) == 200

    @pytest.mark.parametrize("optimum", [0.1, 0.13, 3.0, 47.0, 900.0])
    def test_coarse_to_fine_finds_what_a_long_sweep_finds(self, optimum: float) -> None:
        asked: list[float] = []

        def error(t: float) -> float:
            asked.append(t)
            return log(t / optimum) ** 2

        found = best_threshold(900.0, error, OutlierSuppressionPlusConfig())
        assert found == pytest.approx(optimum, rel=0.06)
        assert len(asked) == len(set(asked)) <= 46
        assert error(found) == min(map(error, list(asked)))

    def test_a_range_below_the_lowest_is_not_scaled(self) -> None:
        found = best_threshold(0.05, lambda _: pytest.fail("asked"), OutlierSuppressionPlusConfig())
        assert threshold_scale(torch.tensor([0.05, 0.01]), found).tolist() == [1, 1]


class TestSearch:
    @pytest.mark.parametrize(("kind", "norm"), [("attn_in", "input_layernorm"), ("mlp_in", "post_attention_layernorm")])
    def test_the_same_as_by_hand(self, neox: TinyModel, kind: str, norm: str) -> None:
        """The oracle: shift and scale put into the norm and the linear of transformers' own block."""
        context = context_of(neox.subject, neox.statistics, scheme=W3A4)
        found = OutlierSuppressionPlus().plan(context, replace(SMALL, sites=kind)).operators
        model = transformers.AutoModelForCausalLM.from_pretrained(neox.path, dtype=torch.float64).eval()
        windows = neox.statistics.tensor(WINDOWS).long()
        positions = torch.arange(windows.shape[1])[None]
        with torch.no_grad():
            states = model.gpt_neox(windows, output_hidden_states=True).hidden_states
            rotary = model.gpt_neox.rotary_emb(states[0], positions)
        for layer, block in enumerate(model.gpt_neox.layers):
            before, linear = (
                block.get_submodule(norm),
                block.attention.query_key_value if kind == "attn_in" else block.mlp.dense_h_to_4h,
            )
            seen: list[Tensor] = []
            hook = linear.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
            with torch.no_grad():
                block(states[layer], attention_mask=None, position_embeddings=rotary)
                hook.remove()
                exact = block(states[layer][:2], attention_mask=None, position_embeddings=rotary)
                rows = seen[0].flatten(0, 1)
                z = (rows.amax(0) + rows.amin(0)) / 2
                reach = (rows - z).abs().amax(0)
                amax = float(reach.max())
                kept = [p.data for p in (before.weight, before.bias, linear.weight, linear.bias)]
                steps = max(6, -int(-amax // 0.5))
                thresholds = [amax + (0.1 - amax) * step / (steps - 1) for step in range(steps)]
                errors = []
                for t in thresholds:
                    s = torch.maximum(torch.ones_like(reach), reach / t)
                    before.weight.data, before.bias.data = kept[0] / s, (kept[1] - z) / s
                    linear.bias.data = kept[3] + kept[2] @ z
                    linear.weight.data = by_hand(kept[2] * s, 8)
                    hook = linear.register_forward_pre_hook(lambda _, given: (by_hand(given[0], 16),))
                    output = block(states[layer][:2], attention_mask=None, position_embeddings=rotary)
                    hook.remove()
                    errors.append(float((output - exact).square().mean()))
                before.weight.data, before.bias.data, linear.weight.data, linear.bias.data = kept
            shift, diag = found[f"layers.{layer}.{kind}"]
            assert isinstance(shift, Shift)
            assert isinstance(diag, Diag)
            expected = torch.maximum(torch.ones_like(reach), reach / thresholds[errors.index(min(errors))])
            torch.testing.assert_close(shift.z, z.float(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(1 / diag.s, expected.float(), rtol=1e-4, atol=1e-5)

    def test_outliers_of_activations_lose_their_error(self, tiny: TinyModel) -> None:
        """A plan to the left makes outliers, which inputs with a scale a token suffer from."""
        outliers = torch.ones(24)
        outliers[[3, 11]] = 20
        kinds = ("attn_in", "mlp_in")
        made = {f"layers.{layer}.{kind}": [Diag(outliers)] for layer in range(2) for kind in kinds}
        subject = replace(tiny.subject, plan=extend(Plan(), Proposal(made), tiny.subject.model.graph, method="x"))
        context = context_of(subject, tiny.statistics, scheme=W3A4)
        config = replace(SMALL, sites=",".join(kinds), search="coarse", steps=20)
        found = OutlierSuppressionPlus().plan(context, config).operators
        assert context.trials is not None
        for trial in context.trials(64):
            here = {site: operators for site, operators in found.items() if site.startswith(f"layers.{trial.layer}.")}
            assert len(here) == 2
            assert trial.error(here) < 0.5 * trial.error(dict.fromkeys(here, ()))


class TestExperts:
    def test_they_share_a_threshold_and_have_their_own_extremes(self) -> None:
        with tiny_model("mixtral") as sparse:
            context = context_of(sparse.subject, sparse.statistics, scheme=W3A4)
            lacking = "layers.0.experts.1.up_down"
            known = Replaced(context.statistics, {lacking: SiteStatistics(0, {})})
            config = replace(SMALL, sites="up_down", search="coarse")
            found = OutlierSuppressionPlus().plan(replace(context, statistics=known), config).operators
            assert len(found) == 7
            for layer in range(2):
                tops = set()
                for site in context.graph.of_kind("up_down", layer):
                    if site.id != lacking:
                        entries = context.statistics[site.id].entries
                        behind = found[site.id][-1].act(torch.maximum(entries["max"], -entries["min"]))
                        scaled = found[site.id][-1].s < 1  # type: ignore[attr-defined]
                        tops |= {round(float(top), 4) for top in behind[scaled]}
                assert len(tops) <= 1


class Replaced(Mapping[str, SiteStatistics]):
    """Statistics of which some are replaced."""

    def __init__(self, known: Mapping[str, SiteStatistics], changes: Mapping[str, SiteStatistics]) -> None:
        self.known, self.changes = known, changes

    def __getitem__(self, key: str) -> SiteStatistics:
        return self.changes[key] if key in self.changes else self.known[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)


class TestShift:
    def test_a_bias_absorbs_it(self, neox: TinyModel) -> None:
        plan = plan_of(OutlierSuppressionPlus(), replace(SMALL, shift="on", tokens=16, steps=2), neox)[1]
        assert plan.sites.keys() == {f"layers.{layer}.{kind}" for layer in range(2) for kind in ("attn_in", "mlp_in")}
        for site in plan.sites.values():
            assert [one.kind for one in site.operators] == ["shift", "diag"]
            assert site.online == ()

    def test_off(self, neox: TinyModel) -> None:
        plan = plan_of(OutlierSuppressionPlus(), replace(SMALL, shift="off", tokens=16, steps=2), neox)[1]
        assert {one.kind for site in plan.sites.values() for one in site.operators} == {"diag"}

    def test_where_no_bias_absorbs_it(self, context: TransformContext) -> None:
        with pytest.raises(UsageError, match=r"no bias absorbs a shift at `layers.0.attn_in`") as refused:
            OutlierSuppressionPlus().plan(context, replace(SMALL, shift="on"))
        assert "only a weight" in str(dict(refused.value.facts)["because"])
        assert refused.value.hint == "--set shift=auto"

    def test_auto_shifts_nothing_there(self, tiny: TinyModel) -> None:
        plan = plan_of(OutlierSuppressionPlus(), replace(SMALL, tokens=16, steps=2), tiny)[1]
        assert {one.kind for site in plan.sites.values() for one in site.operators} == {"diag"}
        assert {name.rpartition(".")[2] for name in plan.sites} == {"attn_in", "mlp_in", "up_down"}


class TestRefusals:
    def test_without_a_scheme(self, tiny: TinyModel) -> None:
        with pytest.raises(UsageError, match="quantized") as refused:
            OutlierSuppressionPlus().plan(context_of(tiny.subject, tiny.statistics), SMALL)
        assert refused.value.hint == "--scheme W4A16"

    def test_value_heads(self, context: TransformContext) -> None:
        with pytest.raises(UsageError, match="`vo`") as refused:
            OutlierSuppressionPlus().plan(context, replace(SMALL, sites="vo"))
        assert refused.value.hint == "--set sites=attn_in,mlp_in,up_down"

    def test_without_extremes(self, context: TransformContext) -> None:
        known = Replaced(context.statistics, {"layers.0.attn_in": SiteStatistics(1, {})})
        with pytest.raises(ArtifactError, match="min"):
            OutlierSuppressionPlus().plan(replace(context, statistics=known), SMALL)

    @pytest.mark.parametrize("options", [{"tokens": 0}, {"steps": 0}, {"lowest": 0.0}])
    def test_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match=r"1 or more|above 0"):
            OutlierSuppressionPlusConfig(**options)


class TestInvariance:
    def test_families(self) -> None:
        config = OutlierSuppressionPlusConfig(tokens=16, steps=2)
        check_transform(OutlierSuppressionPlus(), config, families=("gpt-neox", "qwen2-moe"))

    @pytest.mark.slow
    def test_every_family(self) -> None:
        check_transform(OutlierSuppressionPlus(), replace(SMALL, search="coarse"))
