"""SINQ: balanced columns from the weights alone, folded wherever something in front can hold them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.builtin.transforms.sinq import SINQ, SINQConfig, by_repeat
from qtool.errors import UsageError
from qtool.model.plan import TransformContext
from qtool.numerics.operators import Diag
from qtool.numerics.sinkhorn import sinkhorn_scales
from qtool.steps.transform import context_of
from qtool.testing import TinyModel, check_transform, plan_of, tiny_model


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("qwen2_moe") as made:
        yield made


@pytest.fixture
def context(tiny: TinyModel) -> TransformContext:
    return context_of(tiny.subject, None)


def scales(context: TransformContext, changed: str = "", weight: Tensor | None = None) -> dict[str, Tensor]:
    """Scale by site, with one weight of the first block replaced."""

    def weights(name: str) -> Tensor:
        return weight if weight is not None and name == f"model.layers.0.{changed}" else context.weights(name)

    found = {}
    for site, (diag,) in SINQ().plan(replace(context, weights=weights), SINQConfig()).operators.items():
        assert isinstance(diag, Diag)
        found[site] = diag.s
    return found


class TestInvariance:
    def test_families_tied_and_untied(self) -> None:
        check_transform(SINQ(), families=("llama", "olmo2", "qwen2-moe"))

    @pytest.mark.slow
    def test_every_family(self) -> None:
        check_transform(SINQ())


class TestPlan:
    def test_where(self, context: TransformContext) -> None:
        inputs = {f"layers.{i}.{name}" for i in range(2) for name in context.graph.input_sites_of(i)}
        expected = {site.replace("o_in", "vo") for site in inputs}
        assert set(SINQ().plan(context, SINQConfig()).operators) == expected
        assert {"layers.0.vo", "layers.1.experts.3.up_down"} < expected

    def test_all_of_it_is_folded_where_a_norm_is_in_front(self, tiny: TinyModel) -> None:
        assert not any(site.online for site in plan_of(SINQ(), SINQConfig(), tiny)[1].sites.values())
        with tiny_model("olmo2") as bare:
            plan = plan_of(SINQ(), SINQConfig(), bare)[1]
        online = {site.rpartition(".")[2] for site, at in plan.sites.items() if at.online}
        assert online == {"attn_in", "mlp_in"}

    def test_linears_that_share_an_input_are_stacked(self, context: TransformContext) -> None:
        weights = [context.weights(f"model.layers.0.self_attn.{name}_proj") for name in "qkv"]
        expected = sinkhorn_scales(torch.cat(weights)[:, None])[1]
        found = scales(context)
        torch.testing.assert_close(found["layers.0.attn_in"], expected)
        louder = scales(context, "self_attn.k_proj", weights[1] * torch.linspace(0.1, 10, 24))
        changed = {site for site in found if not torch.equal(found[site], louder[site])}
        assert changed == {"layers.0.attn_in"}

    def test_query_heads_share_the_scale_of_their_value_head(self, context: TransformContext) -> None:
        """Four query heads read two value heads of 8 channels: column ``8 h + c`` is channel ``c`` of ``h // 2``."""
        weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
        loud = {(0, 3), (1, 6)}
        for head in range(4):
            for channel in range(8):
                if (head // 2, channel) in loud:
                    weight[:, 8 * head + channel] *= 50
        site = context.graph.site("layers.0.vo")
        arranged = by_repeat(weight, site)
        for head in range(4):
            for channel in range(8):
                column = arranged[:, head % 2, 8 * (head // 2) + channel]
                assert torch.equal(column, weight[:, 8 * head + channel])
        scale = scales(context, "self_attn.o_proj", weight)["layers.0.vo"]
        assert scale.shape == (2, 8)
        largest = scale.flatten().topk(2).indices.tolist()
        assert {divmod(one, 8) for one in largest} == loud

    def test_columns_behind_it_are_alike(self, tiny: TinyModel) -> None:
        subject, plan = plan_of(SINQ(), SINQConfig(), tiny)

        def spread(state: dict[str, Tensor]) -> float:
            weight = state["mlp.down_proj.weight"].double()
            rows = weight / weight.std(1, correction=0, keepdim=True)
            return float(rows.std(0).max() / rows.std(0).min())

        assert spread(replace(subject, plan=plan).folded(0)) < 0.8 * spread(subject.folded(0))

    def test_no_iterations_change_nothing(self, context: TransformContext) -> None:
        for (diag,) in SINQ().plan(context, SINQConfig(iterations=0)).operators.values():
            assert isinstance(diag, Diag)
            assert torch.equal(diag.s, torch.ones_like(diag.s))
        with pytest.raises(UsageError, match="`iterations` must not be negative"):
            SINQConfig(iterations=-1)

    def test_dead_columns_and_weights_keep_their_scale(self, context: TransformContext) -> None:
        dead = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
        dead[:, 4] = 0
        found = scales(context, "mlp.down_proj", dead)["layers.0.up_down"]
        assert float(found[4]) == 1.0
        assert bool(found.isfinite().all())
        nothing = scales(context, "mlp.down_proj", torch.zeros(24, 40))["layers.0.up_down"]
        assert torch.equal(nothing, torch.ones(40))


def test_a_weight_of_uneven_columns_is_rounded_with_less_error() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=g) * torch.randn(96, generator=g).exp()
    scale = sinkhorn_scales(weight[:, None])[1]

    def rounded(w: Tensor) -> Tensor:
        step = w.abs().amax(1, keepdim=True) / 7
        return (w / step).round() * step

    plain = float((rounded(weight) - weight).norm())
    assert float((rounded(weight / scale) * scale - weight).norm()) < 0.8 * plain
