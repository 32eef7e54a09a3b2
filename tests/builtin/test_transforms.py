"""Every transform leaves every family's model as it is, and proposes what its paper says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.builtin.plugin import register_transforms
from qtool.builtin.transforms.none import NoTransform
from qtool.builtin.transforms.quarot import QuaRot, QuaRotConfig
from qtool.builtin.transforms.smoothquant import SmoothQuant, SmoothQuantConfig, smoothing_scale
from qtool.engine.carry import CarriedStatistics
from qtool.engine.planner import extend
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, UsageError
from qtool.model.graph import RESIDUAL
from qtool.model.plan import Plan, TransformContext
from qtool.model.statistics import SiteStatistics
from qtool.numerics.hadamard import hadamard_rotate
from qtool.numerics.operators import Diag, Hadamard
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, parse_model_scheme, parse_tensor_scheme
from qtool.steps.transform import TransformRequest, context_of, transform
from qtool.testing import EXACT, TinyModel, check_transform, double_precision, exact_logits, plan_of, tiny_model

FAMILIES = ("llama", "qwen2", "qwen3", "deepseek", "qwen2-moe")
"""What differs most; the slow tests go through all."""
METHODS: dict[str, tuple[Any, Any]] = {
    "none": (NoTransform(), None),
    "smoothquant": (SmoothQuant(), None),
    "quarot-r3": (QuaRot(), QuaRotConfig(r3="on")),
}
"""Every method, with all that it can do."""
OPTIONS: tuple[tuple[Any, Any], ...] = (
    (SmoothQuant(), SmoothQuantConfig(alpha=0.0)),
    (SmoothQuant(), SmoothQuantConfig(alpha=1.0)),
    (QuaRot(), None),
    (QuaRot(), QuaRotConfig(r2=False, r4=False)),
    (QuaRot(), QuaRotConfig(r1=False, r4=False)),
    (QuaRot(), QuaRotConfig(r1=False, r2=False)),
)


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("qwen2") as made, double_precision():
        yield made


@pytest.fixture
def subject(tiny: TinyModel) -> Subject:
    return Subject(tiny.workspace.model(str(tiny.path)), tiny.workspace.plugins)


@pytest.fixture
def context(subject: Subject, tiny: TinyModel) -> TransformContext:
    return context_of(subject, tiny.statistics)


class TestInvariance:
    @pytest.mark.parametrize("name", METHODS)
    def test_families_tied_and_untied(self, name: str) -> None:
        check_transform(*METHODS[name], families=FAMILIES)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", METHODS)
    def test_every_family(self, name: str) -> None:
        check_transform(*METHODS[name])

    @pytest.mark.parametrize(("method", "config"), OPTIONS)
    def test_every_option(self, method: Any, config: Any) -> None:  # noqa: ANN401 - each method has its Config
        check_transform(method, config, families=("qwen2",))

    def test_no_method_is_left_out(self) -> None:
        assert {type(method) for method, _ in METHODS.values()} == {
            type(Plugins.discover().load("transforms", entry.name)) for entry in register_transforms()
        }

    @pytest.mark.parametrize(
        "composition", ["smoothquant+quarot", "quarot+smoothquant", "quarot+quarot", "smoothquant+none+smoothquant"]
    )
    def test_compositions(self, tiny: TinyModel, subject: Subject, composition: str) -> None:
        plan = composed(subject, tiny, composition)
        before, after = exact_logits(subject), exact_logits(replace(subject, plan=plan))
        assert float((after - before).abs().max() / before.abs().max()) < EXACT


class TestNone:
    def test_it_proposes_nothing(self, context: TransformContext) -> None:
        assert NoTransform().plan(context, NoTransform.Config()) == {}


class TestSmoothQuant:
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

    def test_activations_and_weights_meet_in_the_middle(self, context: TransformContext) -> None:
        """With alpha 1/2 the largest activation and the largest weight of a channel become equal (eq. 4)."""
        for site_id, (diag,) in SmoothQuant().plan(context, SmoothQuantConfig()).items():
            assert isinstance(diag, Diag)
            site = context.graph.site(site_id)
            absmax = context.statistics[site_id].entries["absmax"]
            weights = [context.weights(linear.name) for linear in context.graph.consumers(site)]
            activation = diag.act(absmax)
            weight = torch.stack([diag.weight_in(one).abs().amax(0) for one in weights]).amax(0)
            torch.testing.assert_close(activation, weight, rtol=1e-4, atol=1e-6)

    def test_all_consumers_count(self, context: TransformContext) -> None:
        assert set(SmoothQuant().plan(context, SmoothQuantConfig())) == {
            f"layers.{layer}.{name}" for layer in range(2) for name in ("attn_in", "mlp_in")
        }
        loud = dict[str, float]()

        def weights(name: str) -> Tensor:
            return context.weights(name) * loud.get(name.rpartition(".")[2], 1.0)

        plain = SmoothQuant().plan(replace(context, weights=weights), SmoothQuantConfig())
        for member, site in (("k_proj", "attn_in"), ("v_proj", "attn_in"), ("up_proj", "mlp_in")):
            loud.clear()
            loud[member] = 1e4
            found = SmoothQuant().plan(replace(context, weights=weights), SmoothQuantConfig())
            for name in ("attn_in", "mlp_in"):
                (left,), (right,) = plain[f"layers.0.{name}"], found[f"layers.0.{name}"]
                same = torch.equal(left.state()[0]["s"], right.state()[0]["s"])
                assert same == (name != site)

    def test_without_absmax_it_says_what_to_gather(self, context: TransformContext) -> None:
        bare = {site: SiteStatistics(1, {"hessian": torch.eye(24)}) for site in context.statistics}
        with pytest.raises(ArtifactError, match=r"lack `absmax` at `layers\.0\.attn_in`") as refused:
            SmoothQuant().plan(replace(context, statistics=bare), SmoothQuantConfig())
        assert refused.value.hint == "qtool calibrate MODEL --gather absmax,hessian,sample"

    @pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan")])
    def test_alpha_is_a_share(self, alpha: float) -> None:
        with pytest.raises(UsageError, match="`alpha` must lie between 0 and 1"):
            SmoothQuantConfig(alpha)


class TestQuaRot:
    def test_which_rotations(self, context: TransformContext) -> None:
        def sites(**options: Any) -> set[str]:  # noqa: ANN401 - options of different types
            return {name.rpartition(".")[2] for name in QuaRot().plan(context, QuaRotConfig(**options))}

        assert sites() == {"residual", "vo", "up_down"}
        assert sites(r1=False) == {"vo", "up_down"}
        assert sites(r2=False) == {"residual", "up_down"}
        assert sites(r4=False) == {"residual", "vo"}
        assert sites(r3="on") == {"residual", "vo", "up_down", "qk_post"}

    def test_r3_follows_the_cache(self, context: TransformContext, subject: Subject) -> None:
        kv = ModelScheme(kv=parse_tensor_scheme("int4-asym-token", subject.plugins.format))
        quantized = replace(context, scheme=kv)
        assert "layers.1.qk_post" in QuaRot().plan(quantized, QuaRotConfig())
        assert "layers.1.qk_post" not in QuaRot().plan(quantized, QuaRotConfig(r3="off"))
        weights = parse_model_scheme("W4A4", subject.plugins.format, subject.plugins.presets)
        assert "layers.1.qk_post" not in QuaRot().plan(replace(context, scheme=weights), QuaRotConfig())

    def test_one_randomised_hadamard_for_the_whole_stream(self, context: TransformContext) -> None:
        (first,), (again,), (other,) = (
            QuaRot().plan(replace(context, seed=seed), QuaRotConfig())[RESIDUAL] for seed in (0, 0, 1)
        )
        assert isinstance(first, Hadamard)
        assert first.signs is not None
        assert again.signs is not None
        assert other.signs is not None
        assert torch.equal(first.signs, again.signs)
        assert not torch.equal(first.signs, other.signs)
        x = torch.randn(3, 24, dtype=torch.float64)
        torch.testing.assert_close(first.act(x), hadamard_rotate(x, signs=first.signs.double()))

    def test_only_r3_and_r4_run_online(self, subject: Subject, tiny: TinyModel) -> None:
        plan = plan_of(QuaRot(), QuaRotConfig(r3="on"), tiny)[1]
        online = {site.rpartition(".")[2] for site, at in plan.sites.items() if at.online}
        assert online == {"qk_post", "up_down"}
        assert plan.fold_norms

    def test_outliers_spread_over_channels(self, context: TransformContext, tiny: TinyModel) -> None:
        """One loud channel in front of every linear is no louder than the others behind R1."""
        plan = extend(Plan(), QuaRot().plan(context, QuaRotConfig()), context.graph, method="quarot")
        outlier = torch.zeros(24)
        outlier[5] = 100.0
        rotated = plan.at(RESIDUAL).operators[0].act(outlier)
        torch.testing.assert_close(rotated.abs(), torch.full((24,), 100.0 / 24**0.5))


class TestComposition:
    def test_smoothing_in_front_of_a_rotation_is_for_nothing_and_the_user_is_told(
        self, tiny: TinyModel, subject: Subject, tmp_path: Path
    ) -> None:
        told: list[str] = []
        workspace = replace(tiny.workspace, home=tmp_path, warn=told.append)
        both, _ = transform(TransformRequest(str(tiny.statistics.path), "smoothquant+quarot"), workspace)
        note = "scales at attn_in, mlp_in vanish: the rotation that follows folds the norms they live in"
        assert told == [note]
        assert both.manifest.details["notes"] == [note]
        alone, _ = transform(TransformRequest(str(tiny.statistics.path), "quarot"), workspace)
        assert told == [note]
        left, right = (
            replace(subject, plan=Plan.from_state({n: one.tensor(n) for n in one.names()}, one.manifest.details))
            for one in (both, alone)
        )
        for layer in range(2):
            expected = right.folded(layer)
            for name, tensor in left.folded(layer).items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)

    def test_a_method_sees_the_model_of_those_to_its_left(self, tiny: TinyModel, subject: Subject) -> None:
        first = composed(subject, tiny, "quarot")
        whole = composed(subject, tiny, "quarot+smoothquant")
        model = subject.model
        carried = CarriedStatistics(tiny.statistics, model, first)
        state = replace(subject, plan=first).folded(1)
        maxima = [state[f"mlp.{name}.weight"].abs().amax(0).float() for name in ("gate_proj", "up_proj")]
        absmax = carried["layers.1.mlp_in"].entries["absmax"]
        expected = 1 / smoothing_scale(absmax, torch.stack(maxima).amax(0), 0.5)
        (diag,) = whole.at("layers.1.mlp_in").operators
        assert isinstance(diag, Diag)
        torch.testing.assert_close(diag.s, expected)


def composed(subject: Subject, tiny: TinyModel, composition: str) -> Plan:
    """The plan of a composition of built-in methods with their defaults."""
    plan = Plan()
    for name in composition.split("+"):
        method = subject.plugins.load("transforms", name)
        context = context_of(replace(subject, plan=plan), tiny.statistics)
        plan = extend(plan, method.plan(context, method.Config()), subject.model.graph, method=name)
    return plan
