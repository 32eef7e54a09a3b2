"""SmoothQuant: the paper's formula, over everything that reads an input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.builtin.transforms.smoothquant import SmoothQuant, SmoothQuantConfig, smoothing_scale
from qtool.errors import ArtifactError, UsageError
from qtool.model.plan import TransformContext
from qtool.model.statistics import SiteStatistics
from qtool.numerics.operators import Diag
from qtool.steps.transform import context_of
from qtool.testing import TinyModel, check_transform, tiny_model


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("qwen2") as made:
        yield made


@pytest.fixture
def context(tiny: TinyModel) -> TransformContext:
    return context_of(tiny.subject, tiny.statistics)


class TestInvariance:
    def test_families_tied_and_untied(self) -> None:
        check_transform(SmoothQuant(), families=("llama", "qwen2", "qwen3", "deepseek", "qwen2-moe"))

    @pytest.mark.slow
    def test_every_family(self) -> None:
        check_transform(SmoothQuant())

    @pytest.mark.parametrize("alpha", [0.0, 1.0])
    def test_every_option(self, alpha: float) -> None:
        check_transform(SmoothQuant(), SmoothQuantConfig(alpha), families=("qwen2",))


class TestScale:
    def test_the_formula_by_hand(self) -> None:
        scale = smoothing_scale(torch.tensor([4.0, 1.0, 16.0]), torch.tensor([1.0, 4.0, 1.0]), 0.5)
        torch.testing.assert_close(scale, torch.tensor([2.0, 0.5, 4.0]))
        scale = smoothing_scale(torch.tensor([4.0, 9.0]), torch.tensor([2.0, 5.0]), 1.0)
        torch.testing.assert_close(scale, torch.tensor([4.0, 9.0]))
        scale = smoothing_scale(torch.tensor([4.0, 9.0]), torch.tensor([2.0, 5.0]), 0.0)
        torch.testing.assert_close(scale, torch.tensor([1 / 2, 1 / 5]))

    def test_a_channel_that_is_never_active_keeps_its_scale(self) -> None:
        scale = smoothing_scale(torch.tensor([0.0, 4.0, 1.0]), torch.tensor([3.0, 0.0, 1.0]), 0.7)
        assert scale.tolist() == [1.0, 1.0, 1.0]

    @pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan")])
    def test_alpha_is_a_share(self, alpha: float) -> None:
        with pytest.raises(UsageError, match="`alpha` must lie between 0 and 1"):
            SmoothQuantConfig(alpha)


class TestPlan:
    def test_activations_and_weights_meet_in_the_middle(self, context: TransformContext) -> None:
        """With alpha 1/2 the largest activation and the largest weight of a channel become equal (eq. 4)."""
        for site_id, (diag,) in SmoothQuant().plan(context, SmoothQuantConfig()).operators.items():
            assert isinstance(diag, Diag)
            site = context.graph.site(site_id)
            absmax = context.statistics[site_id].entries["absmax"]
            weights = [context.weights(linear.name) for linear in context.graph.consumers(site)]
            activation = diag.act(absmax)
            weight = torch.stack([diag.weight_in(one).abs().amax(0) for one in weights]).amax(0)
            torch.testing.assert_close(activation, weight, rtol=1e-4, atol=1e-6)

    def test_all_consumers_count(self, context: TransformContext) -> None:
        assert set(SmoothQuant().plan(context, SmoothQuantConfig()).operators) == {
            f"layers.{layer}.{name}" for layer in range(2) for name in ("attn_in", "mlp_in")
        }
        loud = dict[str, float]()

        def weights(name: str) -> Tensor:
            return context.weights(name) * loud.get(name.rpartition(".")[2], 1.0)

        plain = SmoothQuant().plan(replace(context, weights=weights), SmoothQuantConfig()).operators
        for member, site in (("k_proj", "attn_in"), ("v_proj", "attn_in"), ("up_proj", "mlp_in")):
            loud.clear()
            loud[member] = 1e4
            found = SmoothQuant().plan(replace(context, weights=weights), SmoothQuantConfig()).operators
            for name in ("attn_in", "mlp_in"):
                (left,), (right,) = plain[f"layers.0.{name}"], found[f"layers.0.{name}"]
                same = torch.equal(left.state()[0]["s"], right.state()[0]["s"])
                assert same == (name != site)

    def test_without_absmax_it_says_what_to_gather(self, context: TransformContext) -> None:
        bare = {site: SiteStatistics(1, {"hessian": torch.eye(24)}) for site in context.statistics}
        with pytest.raises(ArtifactError, match=r"lack `absmax` at `layers\.0\.attn_in`") as refused:
            SmoothQuant().plan(replace(context, statistics=bare), SmoothQuantConfig())
        assert refused.value.hint == "qtool calibrate MODEL --gather absmax,hessian,sample"
