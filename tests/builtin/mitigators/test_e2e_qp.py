"""E2E-QP on a model of one norm and one linear."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.builtin.mitigators.e2e_qp import E2EQP, E2EQPConfig
from qtool.engine.model_problem import ModelProblem
from qtool.errors import NumericalError, UsageError
from qtool.testing import model_problem

NORM, SCALE = "norm.weight", "head.scale"


@pytest.mark.parametrize("windows", [8, 16, 33])
def test_the_divergence_of_all_windows_is_lower(windows: int) -> None:
    problem = model_problem(windows=windows)
    result = E2EQP().tune(problem, E2EQPConfig(epochs=4, rate=1e-2))
    assert result.values.keys() == {NORM, SCALE}
    held = [0, 16] if windows == 33 else [0]
    assert result.report["kl_before"] == problem.loss(held, {})
    assert result.report["kl"] == problem.loss(held, result.values)
    assert result.report["kl"] < 0.98 * result.report["kl_before"]
    assert problem.loss(range(windows), result.values) < 0.98 * problem.loss(range(windows), {})


@pytest.mark.parametrize(("option", "left", "moved"), [("rate", SCALE, NORM), ("norm_rate", NORM, SCALE)])
def test_a_rate_of_nothing_leaves_a_kind_as_it_is(option: str, left: str, moved: str) -> None:
    problem = model_problem()
    start = {**problem.norms, **problem.scales}
    options: dict[str, Any] = {"rate": 1e-2, "norm_rate": 1e-2, option: 0.0}
    result = E2EQP().tune(problem, E2EQPConfig(**options))
    assert torch.equal(result.values.get(left, start[left]), start[left])
    assert not torch.equal(result.values[moved], start[moved])
    both = E2EQP().tune(problem, E2EQPConfig(rate=0.0, norm_rate=0.0))
    assert (both.values, both.report["kl"]) == ({}, both.report["kl_before"])


def test_without_scales_norms_are_learned() -> None:
    result = E2EQP().tune(replace(model_problem(), scales={}), E2EQPConfig())
    assert result.values.keys() == {NORM}
    assert result.report["kl"] < result.report["kl_before"]


def test_a_descent_that_diverges_is_told() -> None:
    problem = model_problem()
    result = E2EQP().tune(problem, E2EQPConfig(rate=0.9, norm_rate=0.9))
    assert result.report["kl"] == problem.loss([0], result.values) > result.report["kl_before"]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_an_error(wrong: float) -> None:
    problem = model_problem()

    def loss(rows: Any, values: Any) -> float:  # noqa: ANN401 - passed through
        return wrong if values else problem.loss(rows, values)

    with pytest.raises(NumericalError) as refused:
        E2EQP().tune(replace(problem, loss=loss), E2EQPConfig())
    assert "learn less at a step" in refused.value.hint
    with pytest.raises(NumericalError) as refused:
        E2EQP().tune(replace(problem, loss=lambda *_: wrong), E2EQPConfig())
    assert "--dtype float32" in refused.value.hint


def test_one_window_is_learned_from_and_judged_by() -> None:
    problem = model_problem(windows=1)
    seen: list[list[int]] = []

    def descend(rows: Any, values: Any) -> tuple[float, dict[str, Tensor]]:  # noqa: ANN401 - passed through
        seen.append(list(rows))
        return problem.descend(rows, values)

    result = E2EQP().tune(replace(problem, descend=descend), E2EQPConfig(epochs=3))
    assert seen == [[0]] * 3
    assert result.report["kl"] == problem.loss([0], result.values) < result.report["kl_before"]


@pytest.mark.parametrize(("windows", "batch"), [(16, 4), (40, 7), (3, 8)])
def test_every_window_is_learned_from_once_an_epoch(windows: int, batch: int) -> None:
    problem = model_problem(windows=windows)
    seen: list[list[int]] = []

    def descend(rows: Any, values: Any) -> tuple[float, dict[str, Tensor]]:  # noqa: ANN401 - passed through
        seen.append(list(rows))
        return problem.descend(rows, values)

    E2EQP().tune(replace(problem, descend=descend), E2EQPConfig(epochs=2, batch=batch))
    steps = -(-windows // batch)
    assert len(seen) == 2 * steps
    for epoch in (seen[:steps], seen[steps:]):
        assert sorted(row for rows in epoch for row in rows) == [*range(windows)]
        assert all(len(rows) == batch for rows in epoch[:-1])
    assert seen[:steps] != seen[steps:] or steps == 1


def test_a_step_is_that_of_adam_on_factors() -> None:
    """Adam's first step has the size of its rate, against the sign of the gradient, whatever a value's own size."""
    problem = model_problem(windows=1)
    tried: list[dict[str, Tensor]] = []

    def loss(rows: Any, values: Any) -> float:  # noqa: ANN401 - passed through
        tried.append(dict(values))
        return problem.loss(rows, values)

    E2EQP().tune(replace(problem, loss=loss), E2EQPConfig(epochs=1, batch=1, rate=1e-3, norm_rate=2e-3))
    assert tried[0] == {}
    for start, rate in ((problem.norms, 2e-3), (problem.scales, 1e-3)):
        for name, value in start.items():
            _, gradients = problem.descend([0], {**problem.norms, **problem.scales})
            clear = (gradients[name] * value).abs() > 1e-6
            expected = 1 - rate * (gradients[name] * value).sign()
            torch.testing.assert_close((tried[1][name] / value)[clear], expected[clear], rtol=0, atol=0.02 * rate)


def test_every_step_is_adams_on_factors_and_falls_to_nothing() -> None:
    """Kingma and Ba 2015, algorithm 1, with a step that falls linearly; scales of either sign."""
    problem = model_problem(windows=4)
    signs = torch.randn(problem.scales[SCALE].shape, generator=torch.Generator().manual_seed(5)).sign()
    start = {NORM: problem.norms[NORM], SCALE: problem.scales[SCALE] * signs}
    seen: list[tuple[list[int], dict[str, Tensor]]] = []

    def signed(rows: Any, values: Any) -> tuple[float, dict[str, Tensor]]:  # noqa: ANN401 - passed through
        loss, gradients = problem.descend(rows, {**values, SCALE: values[SCALE] * signs})
        return loss, {**gradients, SCALE: gradients[SCALE] * signs}

    def descend(rows: Any, values: Any) -> tuple[float, dict[str, Tensor]]:  # noqa: ANN401 - passed through
        seen.append((list(rows), {name: value.clone() for name, value in values.items()}))
        return signed(rows, values)

    ours = replace(problem, scales={SCALE: start[SCALE]}, descend=descend)
    result = E2EQP().tune(ours, E2EQPConfig(epochs=3, batch=2, rate=1e-2, norm_rate=2e-2))
    assert len(seen) == 6
    factors = {name: torch.ones_like(value) for name, value in start.items()}
    first = {name: torch.zeros_like(value) for name, value in start.items()}
    second = {name: torch.zeros_like(value) for name, value in start.items()}
    for step, (rows, tried) in enumerate(seen):
        _, gradients = signed(rows, tried)
        for name, rate in ((NORM, 2e-2), (SCALE, 1e-2)):
            torch.testing.assert_close(tried[name], start[name] * factors[name], rtol=1e-4, atol=1e-6)
            gradient = gradients[name] * start[name]
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
            factors[name] = factors[name] - rate * (1 - step / 6) * mean / (square.sqrt() + 1e-8)
    for name, value in start.items():
        torch.testing.assert_close(result.values[name], value * factors[name], rtol=1e-4, atol=1e-6)


def test_the_seed_is_that_of_the_order() -> None:
    found = []
    for seed in (0, 0, 1):
        problem: ModelProblem = replace(model_problem(), seed=seed)
        found.append(E2EQP().tune(problem, E2EQPConfig(epochs=1)).values[SCALE])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("option", "value"),
    [("epochs", -1), ("batch", 0), ("rate", -1e-3), ("rate", 1.0), ("norm_rate", -0.1), ("norm_rate", 2.0)],
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"`{option}` is") as refused:
        E2EQPConfig(**{option: value})  # type: ignore[arg-type]
    assert option in refused.value.hint
