"""Descent on a block's output: which windows, which loss, which step is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from qtool.engine.block_problem import BlockProblem
from qtool.engine.tuning import Schedule, block_loss, judged_windows, tune
from qtool.errors import NumericalError
from qtool.numerics.token_weights import parse_token_weight

CPU = torch.device("cpu")
TOKENS, HIDDEN = 5, 4


@dataclass
class Seen:
    """Which windows were asked for."""

    inputs: list[list[int]] = field(default_factory=list)
    passes: int = 0


def block(windows: int = 6, seed: int = 0, seen: Seen | None = None) -> BlockProblem:
    """A block that multiplies by one weight; in full precision that is the identity times 3."""
    watched = seen or Seen()
    states = torch.randn(windows, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    states = states * torch.linspace(0.5, 3, windows * TOKENS).view(windows, TOKENS, 1)

    def inputs(rows: Sequence[int]) -> Tensor:
        watched.inputs.append(list(rows))
        return states[list(rows)]

    def forward(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        watched.passes += 1
        return hidden @ weights["w"].T

    return BlockProblem(0, {}, inputs, lambda rows: 3 * states[list(rows)], forward, windows, True, CPU, seed)


class Scripted:
    """A multiple of the identity that takes one value after the other, whatever the gradients are."""

    def __init__(self, *values: float) -> None:
        self.values = list(values[1:])
        self.factor = torch.tensor(values[0], requires_grad=True)
        self.told: list[tuple[float, float]] = []

    @property
    def leaves(self) -> list[Tensor]:
        return [self.factor]

    def weights(self) -> dict[str, Tensor]:
        return {"w": torch.eye(HIDDEN) * self.factor}

    def update(self, gradients: Sequence[Tensor], left: Tensor) -> None:
        self.told.append((float(gradients[0]), float(left)))
        self.factor.fill_(self.values.pop(0))


def relative(factor: float) -> float:
    return ((factor - 3) / 3) ** 2


def test_the_best_of_the_judged_steps_is_kept() -> None:
    tuned = Scripted(1.0, 0.0, 2.0, 2.9, 4.0, 5.0, 9.0)
    report = tune(block(), tuned, Schedule(steps=6, batch=2))
    assert float(tuned.factor.detach()) == pytest.approx(2.9)
    assert report["best_step"] == 3.0
    assert report["block_loss_before"] == pytest.approx(relative(1.0), rel=1e-6)
    assert report["block_loss"] == pytest.approx(relative(2.9), rel=1e-4)


def test_the_start_is_kept_where_nothing_is_better() -> None:
    tuned = Scripted(2.5, 3.6, 2.4, 2.5)
    report = tune(block(), tuned, Schedule(steps=3, batch=2))
    assert float(tuned.factor.detach()) == 2.5
    assert report["best_step"] == 0.0
    assert report["block_loss"] == report["block_loss_before"]


@pytest.mark.parametrize(("steps", "judgements", "judged"), [(7, 3, (2, 4, 6, 7)), (6, 2, (3, 6)), (2, 10, (1, 2))])
def test_steps_are_judged_at_even_distances_and_at_the_end(
    steps: int, judgements: int, judged: tuple[int, ...]
) -> None:
    for good in range(1, steps + 1):
        tuned = Scripted(1.0, *(2.9 if step == good else 0.0 for step in range(1, steps + 1)))
        report = tune(block(), tuned, Schedule(steps, batch=1, judgements=judgements))
        assert report["best_step"] == (good if good in judged else 0.0)


def test_no_steps_are_no_work() -> None:
    seen, tuned = Seen(), Scripted(2.0)
    report = tune(block(seen=seen), tuned, Schedule(steps=0, batch=2))
    assert seen.passes == 1
    assert tuned.told == []
    assert report["block_loss"] == report["block_loss_before"] == pytest.approx(relative(2.0), rel=1e-6)
    assert report["best_step"] == 0.0


def test_updates_get_the_gradient_of_their_batch_and_what_is_left() -> None:
    seen = Seen()
    of = block(seen=seen)
    values = [1.0, 2.0, 2.5, 4.0, 3.5]
    tuned = Scripted(*values)
    tune(of, tuned, Schedule(steps=4, batch=2, judged=3))
    batches = [rows for rows in seen.inputs if len(rows) == 2][1:]  # the first made the buffers
    assert len(batches) == 4
    for (gradient, _), rows, factor in zip(tuned.told, batches, values, strict=False):
        expected = 2 * (factor - 3) * float(of.inputs(rows).double().square().mean())
        assert gradient == pytest.approx(expected, rel=1e-5)
    assert [left for _, left in tuned.told] == [1.0, 0.75, 0.5, 0.25]


def test_every_window_comes_once_before_any_comes_again() -> None:
    def order(seed: int) -> list[int]:
        seen = Seen()
        tune(block(6, seed, seen), Scripted(*[1.0] * 10), Schedule(steps=9, batch=4, judged=5))
        return [row for rows in [rows for rows in seen.inputs if len(rows) == 4][1:] for row in rows]

    rows = order(0)
    assert len(rows) == 36
    for start in range(0, 36, 6):
        assert sorted(rows[start : start + 6]) == list(range(6))
    assert rows == order(0)
    assert rows != order(1)
    assert rows != list(range(6)) * 6


def test_a_batch_is_no_larger_than_what_there_is() -> None:
    seen = Seen()
    tune(block(3, seen=seen), Scripted(1.0, 1.0), Schedule(steps=1, batch=8))
    assert max(len(rows) for rows in seen.inputs) == 3


@pytest.mark.parametrize("rule", ["uniform", "inverse-norm", "inverse-norm:0.5", "clip:1.1"])
def test_the_loss_weighs_tokens_by_the_norms_of_the_targets(rule: str) -> None:
    of, weight = block(), torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(2))
    rows = [0, 2, 3]
    error = energy = 0.0
    for row in rows:
        x = of.inputs([row])[0].double()
        target = 3 * x
        norms = target.norm(dim=-1)
        factors = {
            "uniform": torch.ones(TOKENS).double(),
            "inverse-norm": 1 / norms,
            "inverse-norm:0.5": norms**-0.5,
            "clip:1.1": (1.1 * norms.median() / norms).clamp(max=1),
        }[rule]
        error += float((factors.square() * (x @ weight.double().T - target).square().sum(-1)).sum())
        energy += float((factors.square() * target.square().sum(-1)).sum())
    found = block_loss(of, {"w": weight}, rows, parse_token_weight(rule))
    assert found == pytest.approx(error / energy, rel=1e-5)


def test_the_loss_does_not_depend_on_how_many_windows_come_at_once() -> None:
    of, weight = block(windows=21), torch.eye(HIDDEN)
    x = torch.cat([of.inputs([row]) for row in range(21)]).double()
    weight = weight + 0.3 * torch.ones(HIDDEN, HIDDEN)
    expected = float((x @ weight.double().T - 3 * x).square().sum() / (3 * x).square().sum())
    assert block_loss(of, {"w": weight}, range(21)) == pytest.approx(expected, rel=1e-5)


def test_judged_windows_are_spread_over_all() -> None:
    assert judged_windows(block(100), 4) == [0, 25, 50, 75]
    assert judged_windows(block(6), 16) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    broken = replace(block(), layer=7, forward=lambda weights, hidden: hidden * bad)
    with pytest.raises(NumericalError, match=r"the outputs of block 7 are not finite\nhint: .*--dtype float32"):
        tune(broken, Scripted(1.0, 1.0), Schedule(steps=1, batch=1))
