"""QuaRot: which rotations, where they are folded, and what mixing heads adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from qtool.builtin.transforms.quarot import QuaRot, QuaRotConfig
from qtool.engine.fold import input_operators
from qtool.engine.planner import extend
from qtool.engine.subject import Subject
from qtool.errors import UsageError
from qtool.model.graph import RESIDUAL
from qtool.model.plan import Plan, TransformContext
from qtool.numerics.hadamard import hadamard_matrix, hadamard_rotate
from qtool.numerics.operators import Hadamard, HeadMix, compose_act
from qtool.scheme import ModelScheme, TensorScheme, parse_tensor_scheme
from qtool.steps.schemes import parse_model_scheme
from qtool.steps.transform import context_of
from qtool.testing import TinyModel, check_transform, plan_of, tiny_model

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"r2": False, "r4": False},
    {"r1": False, "r4": False},
    {"r1": False, "r2": False},
    {"r1": False, "head_mix": True},
    {"r2": False, "head_mix": True},
)


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("qwen2") as made:
        yield made


@pytest.fixture
def subject(tiny: TinyModel) -> Subject:
    return tiny.subject


@pytest.fixture
def context(subject: Subject, tiny: TinyModel) -> TransformContext:
    return context_of(subject, tiny.statistics)


class TestInvariance:
    def test_families_tied_and_untied(self) -> None:
        everything = QuaRotConfig(r3="on", head_mix=True)
        check_transform(QuaRot(), everything, families=("llama", "qwen3", "deepseek", "qwen2-moe"))

    @pytest.mark.slow
    def test_every_family(self) -> None:
        check_transform(QuaRot(), QuaRotConfig(r3="on"))

    @pytest.mark.slow
    def test_every_family_whose_heads_can_be_mixed(self) -> None:
        check_transform(QuaRot(), QuaRotConfig(r1=False, head_mix=True))

    @pytest.mark.parametrize("options", OPTIONS)
    def test_every_option(self, options: dict[str, Any]) -> None:
        check_transform(QuaRot(), QuaRotConfig(**options), families=("qwen2",))


class TestPlan:
    def test_which_rotations(self, context: TransformContext) -> None:
        def sites(**options: Any) -> set[str]:  # noqa: ANN401 - options of different types
            return {name.rpartition(".")[2] for name in QuaRot().plan(context, QuaRotConfig(**options)).operators}

        assert sites() == {"residual", "vo", "up_down"}
        assert sites(r1=False) == {"vo", "up_down"}
        assert sites(r2=False) == {"residual", "up_down"}
        assert sites(r4=False) == {"residual", "vo"}
        assert sites(r3="on") == {"residual", "vo", "up_down", "qk_post"}
        assert sites(head_mix=True) == {"residual", "vo", "up_down", "o_in"}

    def test_r3_follows_the_cache(self, context: TransformContext, subject: Subject) -> None:
        kv = ModelScheme(kv=parse_tensor_scheme("int4-asym-token", subject.plugins.format))
        quantized = replace(context, scheme=kv)
        assert "layers.1.qk_post" in QuaRot().plan(quantized, QuaRotConfig()).operators
        assert "layers.1.qk_post" not in QuaRot().plan(quantized, QuaRotConfig(r3="off")).operators
        weights = parse_model_scheme("W4A4", subject.plugins.format, subject.plugins.presets)
        assert "layers.1.qk_post" not in QuaRot().plan(replace(context, scheme=weights), QuaRotConfig()).operators

    def test_one_randomised_hadamard_for_the_whole_stream(self, context: TransformContext) -> None:
        (first,), (again,), (other,) = (
            QuaRot().plan(replace(context, seed=seed), QuaRotConfig()).operators[RESIDUAL] for seed in (0, 0, 1)
        )
        assert isinstance(first, Hadamard)
        assert isinstance(again, Hadamard)
        assert isinstance(other, Hadamard)
        assert first.signs is not None
        assert again.signs is not None
        assert other.signs is not None
        assert torch.equal(first.signs, again.signs)
        assert not torch.equal(first.signs, other.signs)
        x = torch.randn(3, 24, dtype=torch.float64)
        torch.testing.assert_close(first.act(x), hadamard_rotate(x, signs=first.signs.double()))

    def test_only_r3_r4_and_the_mixing_of_heads_run_online(self, tiny: TinyModel) -> None:
        plan = plan_of(QuaRot(), QuaRotConfig(r3="on", head_mix=True), tiny)[1]
        online = {site.rpartition(".")[2] for site, at in plan.sites.items() if at.online}
        assert online == {"qk_post", "up_down", "o_in"}
        assert plan.fold_norms

    def test_outliers_spread_over_channels(self, context: TransformContext) -> None:
        """One loud channel in front of every linear is no louder than the others behind R1."""
        plan = extend(Plan(), QuaRot().plan(context, QuaRotConfig()), context.graph, method="quarot")
        outlier = torch.zeros(24)
        outlier[5] = 100.0
        rotated = plan.at(RESIDUAL).operators[0].act(outlier)
        torch.testing.assert_close(rotated.abs(), torch.full((24,), 100.0 / 24**0.5))


class TestHeadMix:
    def test_with_r2_it_is_a_hadamard_rotation_of_the_whole_input(self, tiny: TinyModel) -> None:
        """``kron(I, H_8) kron(H_4, I)`` is ``H_32``; without R2 heads are mixed channel by channel."""
        subject, plan = plan_of(QuaRot(), QuaRotConfig(head_mix=True), tiny)
        operators = input_operators(subject.model.graph, plan, 1, "o_in")
        eye = torch.eye(32, dtype=torch.float64)
        whole = hadamard_matrix(32).double() / 32**0.5
        torch.testing.assert_close(compose_act(operators, eye), whole, rtol=0, atol=1e-14)
        (mixing,) = plan.at("layers.1.o_in").operators
        assert isinstance(mixing, HeadMix)
        by_hand = torch.kron(hadamard_matrix(4).double() / 2, torch.eye(8, dtype=torch.float64))
        torch.testing.assert_close(mixing.to_dense(), by_hand, rtol=0, atol=1e-14)

    def test_heads_that_no_hadamard_matrix_has_are_refused(self) -> None:
        with tiny_model("llama", num_attention_heads=6, num_key_value_heads=2) as six:
            plan_of(QuaRot(), QuaRotConfig(), six)
            with pytest.raises(UsageError, match="cannot mix 6 heads") as refused:
                plan_of(QuaRot(), QuaRotConfig(head_mix=True), six)
        assert refused.value.hint == "leave out `head_mix`"


def test_the_published_scheme(subject: Subject) -> None:
    scheme = parse_model_scheme("QuaRot-W4A4KV4", subject.plugins.format, subject.plugins.presets)
    assert scheme.weights is not None
    assert scheme.activations is not None
    assert isinstance(scheme.kv, TensorScheme)
    assert (scheme.weights.symmetric, scheme.weights.strategy, scheme.weights.clip) == (True, "channel", 1.0)
    assert (scheme.activations.symmetric, scheme.activations.strategy, scheme.activations.clip) == (True, "token", 0.9)
    assert (scheme.kv.symmetric, scheme.kv.strategy, scheme.kv.clip) == (False, "token-head", 0.95)
