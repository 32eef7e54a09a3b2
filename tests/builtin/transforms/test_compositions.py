"""Methods one after the other: exact, and each sees the model of those to its left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qtool.builtin.plugin import register_transforms
from qtool.builtin.transforms.smoothquant import smoothing_scale
from qtool.engine.carry import CarriedStatistics
from qtool.engine.planner import extend
from qtool.engine.subject import Subject
from qtool.model.plan import Plan
from qtool.numerics.operators import Diag
from qtool.steps.schemes import parse_model_scheme
from qtool.steps.transform import TransformRequest, context_of, transform
from qtool.testing import EXACT, TinyModel, double_precision, exact_logits, tiny_model

COMPOSITIONS = (
    "smoothquant+quarot",
    "quarot+smoothquant",
    "quarot+quarot",
    "smoothquant+identity+smoothquant",
    "sinq+quip",
    "quarot+duquant",
    "smoothquant+quip-sharp",
    "quip+quip-sharp",
)


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("qwen2") as made, double_precision():
        yield made


@pytest.fixture
def subject(tiny: TinyModel) -> Subject:
    return tiny.subject


def composed(subject: Subject, tiny: TinyModel, composition: str) -> Plan:
    """The plan of a composition of built-in methods with their defaults, for a scheme that some of them ask for."""
    plan, scheme = Plan(), parse_model_scheme("W4A4", subject.plugins.format, subject.plugins.presets)
    for name in composition.split("+"):
        method = subject.plugins.load("transforms", name)
        context = context_of(replace(subject, plan=plan), tiny.statistics, scheme=scheme)
        plan = extend(plan, method.plan(context, method.Config()), subject.model.graph, method=name)
    return plan


class TestInvariance:
    @pytest.mark.parametrize("composition", [*(entry.name for entry in register_transforms()), *COMPOSITIONS])
    def test_every_method_alone_and_some_together(self, tiny: TinyModel, subject: Subject, composition: str) -> None:
        plan = composed(subject, tiny, composition)
        before, after = exact_logits(subject), exact_logits(replace(subject, plan=plan))
        assert float((after - before).abs().max() / before.abs().max()) < EXACT


class TestOrder:
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
        carried = CarriedStatistics(tiny.statistics, subject.model, first)
        state = replace(subject, plan=first).folded(1)
        maxima = [state[f"mlp.{name}.weight"].abs().amax(0).float() for name in ("gate_proj", "up_proj")]
        absmax = carried["layers.1.mlp_in"].entries["absmax"]
        expected = 1 / smoothing_scale(absmax, torch.stack(maxima).amax(0), 0.5)
        (diag,) = whole.at("layers.1.mlp_in").operators
        assert isinstance(diag, Diag)
        torch.testing.assert_close(diag.s, expected)
