"""The check of methods that learn from a whole model passes what qtool ships, and fails what breaks one promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qtool.builtin.mitigators.e2e_qp import E2EQP, E2EQPConfig
from qtool.engine.model_problem import ModelProblem, ModelResult
from qtool.testing import CheckError, check_model_mitigator, model_problem

Change = Callable[[ModelProblem, ModelResult], ModelResult]


class Changing(E2EQP):
    """E2E-QP, whose result is changed, or the problem, or what it says it runs."""

    def __init__(self, change: Change, *, more: int = 0) -> None:
        self.change, self.more = change, more

    def tune(self, model: ModelProblem, config: E2EQPConfig) -> ModelResult:
        return self.change(model, super().tune(model, config))

    def windows_run(self, windows: int, config: E2EQPConfig) -> int:
        return super().windows_run(windows, config) + self.more


def fails(change: Change, match: str, *, more: int = 0) -> None:
    with pytest.raises(CheckError, match=match):
        check_model_mitigator(Changing(change, more=more))


def with_values(result: ModelResult, **values: torch.Tensor) -> ModelResult:
    return replace(result, values={**result.values, **{name.replace("_", "."): one for name, one in values.items()}})


@pytest.mark.parametrize(
    "config",
    [E2EQPConfig(), E2EQPConfig(epochs=0), E2EQPConfig(rate=0.0, batch=3), E2EQPConfig(norm_rate=0.0)],
)
def test_what_is_shipped_passes(config: E2EQPConfig) -> None:
    check_model_mitigator(E2EQP(), config)


@pytest.mark.parametrize(("kind", "label"), [("norms", "gain"), ("scales", "scale")])
def test_what_is_modified(kind: str, label: str) -> None:
    def change(model: ModelProblem, result: ModelResult) -> ModelResult:
        next(iter(getattr(model, kind).values())).mul_(1.001)
        return result

    fails(change, f"Changing modifies the {label} that it is given")


def test_other_values_each_time() -> None:
    calls = iter(range(100))

    def change(_: ModelProblem, result: ModelResult) -> ModelResult:
        return replace(result, values={name: value * (1 + next(calls)) for name, value in result.values.items()})

    fails(change, "gives other values when it is asked again")
    fails(lambda _, result: replace(result, values={} if next(calls) % 2 else result.values), "when it is asked again")


def test_values_that_do_not_fit() -> None:
    fails(lambda _, result: with_values(result, head_bias=torch.ones(3)), "gives `head.bias`, which the model has not")
    fails(lambda _, result: with_values(result, head_scale=torch.ones(48, 1)), "gives `head.scale` another shape")
    wrong = torch.full((32,), torch.inf)
    fails(lambda _, result: with_values(result, norm_weight=wrong), "gives `norm.weight` values that are not finite")


@pytest.mark.parametrize("more", [-1, 1])
def test_another_number_of_windows(more: int) -> None:
    fails(lambda _, result: result, r"says that \d+ windows run, and \d+ do", more=more)


@pytest.mark.parametrize("label", ["kl", "kl_before"])
@pytest.mark.parametrize("factor", [0.99, 1.01, torch.nan])
def test_divergences_that_are_not_so(label: str, factor: float) -> None:
    def change(_: ModelProblem, result: ModelResult) -> ModelResult:
        return replace(result, report={**result.report, label: result.report[label] * factor})

    fails(change, "reports `kl` as .*, which no windows have")


def test_no_divergences_at_all() -> None:
    fails(lambda _, result: replace(result, report={}), "reports `kl` as nan")


def test_further_away_than_before() -> None:
    def change(model: ModelProblem, result: ModelResult) -> ModelResult:
        values, rows = {"norm.weight": model.norms["norm.weight"] * 1.5}, range(model.windows)
        return ModelResult(values, {"kl": model.loss(rows, values), "kl_before": model.loss(rows, {})})

    class Away(Changing):
        def tune(self, model: ModelProblem, config: E2EQPConfig) -> ModelResult:
            return change(model, ModelResult({}))

        def windows_run(self, windows: int, config: E2EQPConfig) -> int:
            return 2 * windows

    with pytest.raises(CheckError, match="Away makes the divergence larger"):
        check_model_mitigator(Away(change))


def test_there_is_something_to_learn() -> None:
    """Otherwise a method that does nothing could not be told from one that learns."""
    problem = model_problem()
    assert 1e-3 < problem.loss(range(16), {}) < 0.5
    _, gradients = problem.descend(range(16), {**problem.norms, **problem.scales})
    assert all(float(one.abs().max()) > 1e-5 for one in gradients.values())
