"""QoQ's parts one by one, each by what it promises."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from qtool.builtin.transforms.qserve import QServe, QServeConfig, key_scale
from qtool.errors import ArtifactError, UsageError
from qtool.model.graph import RESIDUAL
from qtool.model.plan import Plan, TransformContext
from qtool.model.statistics import SiteStatistics
from qtool.numerics.hadamard import hadamard_matrix
from qtool.numerics.operators import Diag, Perm
from qtool.scheme import ModelScheme, TensorScheme
from qtool.steps.transform import context_of
from qtool.testing import TinyModel, check_transform, plan_of, tiny_model

KV4 = TensorScheme("int4", symmetric=False, strategy="token")
W4 = ModelScheme(weights=TensorScheme("int4"))
EVERYTHING = QServeConfig(smooth_attention="on", reorder="on")


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("llama") as made:
        yield made


@pytest.fixture
def context(tiny: TinyModel) -> TransformContext:
    return context_of(tiny.subject, tiny.statistics, scheme=W4)


def planned(tiny: TinyModel, scheme: ModelScheme = W4, **options: Any) -> Plan:  # noqa: ANN401 - values of options
    return plan_of(QServe(), QServeConfig(**options), tiny, scheme=scheme)[1]


def factors(plan: Plan, site: str) -> Tensor:
    diag = plan.at(site).operators[0]
    assert isinstance(diag, Diag)
    return diag.s


class TestRotation:
    def test_it_has_no_random_signs(self, tiny: TinyModel) -> None:
        (rotation,) = planned(tiny).at(RESIDUAL).operators
        torch.testing.assert_close(rotation.to_dense(), hadamard_matrix(24).double() / 24**0.5)
        assert planned(tiny, r1=False).at(RESIDUAL).operators == ()

    def test_where_it_is_refused(self) -> None:
        with tiny_model("gemma2") as sandwich:
            with pytest.raises(UsageError, match="cannot be rotated") as refused:
                planned(sandwich)
            assert refused.value.hint == "--set r1=false"
            assert planned(sandwich, r1=False).sites


class TestSmoothAttention:
    TIES = ((0, 2), (1, 3))

    def test_the_formula_by_hand(self) -> None:
        keys = torch.zeros(2, 1, 6)
        keys[0, 0] = torch.tensor([3.0, 0.0, 4.0, 0.0, -9.0, 0.0])
        keys[1, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0, 4.0, 0.0])
        scale = key_scale(keys, self.TIES, 0.5)
        torch.testing.assert_close(scale, torch.tensor([[5**0.5, 1, 5**0.5, 1, 3, 1]], dtype=torch.float64))
        torch.testing.assert_close(key_scale(keys, (), 1.0)[0, :3], torch.tensor([3.0, 1, 4], dtype=torch.float64))

    def test_it_bounds_keys_at_every_position(self) -> None:
        keys = torch.randn(200, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        bound = key_scale(keys, self.TIES, 1.0)
        largest = torch.zeros_like(bound)
        for angle in torch.linspace(0, 6.28, 100, dtype=torch.float64):
            for one, other in self.TIES:
                turned = keys[..., one] * angle.cos() - keys[..., other] * angle.sin()
                largest[:, one] = torch.maximum(largest[:, one], turned.abs().amax(0))
                largest[:, other] = largest[:, one]
        assert bool((largest <= bound).all())
        torch.testing.assert_close(largest, bound, rtol=1e-2, atol=0)

    def test_keys_with_outliers_lose_their_error(self) -> None:
        """A cache with a scale a token: outliers take the resolution of the other channels."""
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(64, 1, 16, generator=generator, dtype=torch.float64)
        keys[..., [2, 10]] *= 30
        queries = torch.randn(64, 16, generator=generator, dtype=torch.float64)
        scale = key_scale(keys, tuple((i, i + 8) for i in range(8)), 0.5)

        def error(factor: Tensor) -> float:
            k, q = keys[:, 0] / factor, queries * factor
            step = (k.amax(1, keepdim=True) - k.amin(1, keepdim=True)) / 15
            rounded = (k / step).round() * step
            return float((q @ rounded.T - q @ k.T).square().mean())

        assert error(scale) < 0.5 * error(torch.ones_like(scale))

    def test_the_keys_are_the_models_own(self, tiny: TinyModel) -> None:
        found = factors(planned(tiny, smooth_attention="on", attention_alpha=1.0), "layers.1.qk_pre")
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float64)
        sample = tiny.statistics.tensor("layers.1.attn_in.sample").double()
        keys = model.model.layers[1].self_attn.k_proj(sample).detach().unflatten(-1, (2, 8))
        pairs = (keys[..., :4].square() + keys[..., 4:].square()).sqrt().amax(0)
        torch.testing.assert_close(1 / found, torch.cat([pairs, pairs], dim=-1), rtol=1e-5, atol=1e-6)

    def test_auto_looks_at_the_cache(self, tiny: TinyModel) -> None:
        assert "layers.0.qk_pre" not in planned(tiny).sites
        assert "layers.0.qk_pre" in planned(tiny, replace(W4, kv=KV4)).sites
        assert "layers.0.qk_pre" not in planned(tiny, replace(W4, kv=KV4), smooth_attention="off").sites

    def test_keys_behind_a_norm_stay(self) -> None:
        with tiny_model("qwen3") as normed:
            cached = replace(W4, kv=TensorScheme("int4", strategy="token"))
            assert not [one for one in planned(normed, cached, smooth_attention="auto").sites if one.endswith("qk_pre")]
            with pytest.raises(UsageError, match="no site of this model takes `smooth_attention`") as refused:
                planned(normed, smooth_attention="on")
            assert refused.value.hint == "--set smooth_attention=auto"


class TestOutputs:
    @pytest.mark.parametrize("r1", [True, False])
    @pytest.mark.parametrize("kind", ["up_down", "vo"])
    def test_activations_and_folded_weights_meet_in_the_middle(self, tiny: TinyModel, kind: str, *, r1: bool) -> None:
        """With a share of 1/2 both have the same largest magnitude in each channel, in the weights that are rounded."""
        plan = planned(tiny, output_alpha=0.5, r1=r1)
        reads, module = {"up_down": ("up_down", "mlp.down_proj"), "vo": ("o_in", "self_attn.o_proj")}[kind]
        for layer in range(2):
            absmax = tiny.statistics.tensor(f"layers.{layer}.{reads}.absmax")
            weight = replace(tiny.subject, plan=plan).folded(layer)[f"{module}.weight"].abs().amax(0).float()
            activations = plan.at(f"layers.{layer}.{kind}").operators[0].act(absmax)
            if kind == "vo":
                activations, weight = (x.view(2, 2, 8).amax(1) for x in (activations, weight))
            torch.testing.assert_close(activations, weight, rtol=1e-4, atol=1e-5)

    def test_everything_folds(self, tiny: TinyModel) -> None:
        plan = plan_of(QServe(), EVERYTHING, tiny, scheme=W4)[1]
        kinds = {site.rpartition(".")[2] for site in plan.sites}
        assert kinds == {"residual", "qk_pre", "vo", "up_down"}
        assert all(site.online == () for site in plan.sites.values())

    def test_off(self, tiny: TinyModel) -> None:
        assert planned(tiny, smooth_outputs=False).sites.keys() == {RESIDUAL}

    def test_an_expert_without_statistics_is_left_alone(self) -> None:
        with tiny_model("mixtral") as sparse:
            context = context_of(sparse.subject, sparse.statistics, scheme=W4)
            known = ChainMap({"layers.0.experts.1.up_down": SiteStatistics(0, {})}, context.statistics)  # type: ignore[arg-type]
            found = QServe().plan(replace(context, statistics=known), EVERYTHING).operators
            assert len([site for site in found if site.endswith("up_down")]) == 7
            assert "layers.0.experts.1.up_down" not in found


class TestOrder:
    GROUPS = replace(W4, weights=TensorScheme("int4", strategy="group", group_size=8))

    @pytest.mark.parametrize("smooth", [True, False])
    def test_channels_are_sorted_by_what_they_reach(self, tiny: TinyModel, *, smooth: bool) -> None:
        plan = planned(tiny, self.GROUPS, smooth_outputs=smooth)
        for layer in range(2):
            operators = plan.at(f"layers.{layer}.up_down").operators
            assert [one.kind for one in operators] == (["diag", "perm"] if smooth else ["perm"])
            absmax = tiny.statistics.tensor(f"layers.{layer}.up_down.absmax")
            for operator in operators:
                absmax = operator.act(absmax)
            assert bool((absmax.diff() <= 0).all())

    def test_auto_looks_for_groups(self, tiny: TinyModel) -> None:
        def orders(plan: Plan) -> int:
            return sum(isinstance(one, Perm) for site in plan.sites.values() for one in site.operators)

        assert orders(planned(tiny)) == 0
        assert orders(planned(tiny, self.GROUPS)) == orders(planned(tiny, reorder="on")) == 2
        assert orders(planned(tiny, self.GROUPS, reorder="off")) == 0


class TestRefusals:
    @pytest.mark.parametrize("name", ["attention_alpha", "output_alpha"])
    @pytest.mark.parametrize("value", [-0.1, 1.5])
    def test_shares(self, name: str, value: float) -> None:
        with pytest.raises(UsageError, match="between 0 and 1"):
            QServeConfig(**{name: value})

    @pytest.mark.parametrize(("site", "entry"), [("attn_in", "sample"), ("vo", "absmax"), ("up_down", "absmax")])
    def test_statistics_that_are_missing(self, context: TransformContext, site: str, entry: str) -> None:
        known = ChainMap({f"layers.1.{site}": SiteStatistics(1, {})}, context.statistics)  # type: ignore[arg-type]
        with pytest.raises(ArtifactError, match=f"lack `{entry}` at `layers.1.{site}`"):
            QServe().plan(replace(context, statistics=known), EVERYTHING)


class TestInvariance:
    def test_families(self) -> None:
        check_transform(QServe(), EVERYTHING, families=("qwen2", "qwen2-moe", "phi3"))

    def test_without_the_rotation(self) -> None:
        check_transform(
            QServe(), replace(EVERYTHING, r1=False, smooth_attention="off"), families=("gemma2", "gpt-neox")
        )

    @pytest.mark.slow
    def test_every_family(self) -> None:
        check_transform(QServe(), EVERYTHING)
        check_transform(QServe(), replace(EVERYTHING, r1=False, smooth_attention="auto", reorder="auto"))
