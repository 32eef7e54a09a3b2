"""The check of mitigators that learn from the output of a whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.model_problem import ModelMitigator, ModelProblem, ModelResult, Values
from qtool.numerics.likelihood import divergence
from qtool.testing.promise import CheckError, refuse_changes

NORM, SCALE = "norm.weight", "head.scale"
_GROUP = 8
_TOLERANCE = 1e-5


def model_problem(
    *, seed: int = 0, windows: int = 16, tokens: int = 24, hidden: int = 32, vocab: int = 48
) -> ModelProblem:
    """Return a model of one norm and one linear in 3 bits: logits are ``(gain ∘ x) (scale · codes)ᵀ``.

    Args:
        seed: Seeds everything.
        windows: Number of windows.
        tokens: Tokens to a window.
        hidden: Size of the hidden states, a multiple of 8.
        vocab: Number of logits.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(windows, tokens, hidden, generator=generator)
    weight = torch.randn(vocab, hidden, generator=generator) / hidden**0.5
    gain = 0.5 + torch.rand(hidden, generator=generator)
    groups = weight.unflatten(1, (-1, _GROUP))
    scale = groups.abs().amax(-1) / 3
    codes = (groups / scale[..., None]).round()
    targets = x * gain @ weight.T
    start = {NORM: gain, SCALE: scale}

    def lost(rows: Sequence[int], values: Values) -> Float[Tensor, ""]:
        own = {**start, **values}
        logits = x[list(rows)] * own[NORM] @ (codes * own[SCALE][..., None]).flatten(1).T
        return divergence(targets[list(rows)], logits)[0].mean()

    def loss(rows: Sequence[int], values: Values) -> float:
        with torch.no_grad():
            return float(lost(rows, values))

    def descend(rows: Sequence[int], values: Values) -> tuple[float, dict[str, Tensor]]:
        leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
        with torch.enable_grad():
            found = lost(rows, leaves)
            gradients = torch.autograd.grad(found, list(leaves.values())) if leaves else ()
        return float(found.detach()), dict(zip(leaves, gradients, strict=True))

    return ModelProblem({NORM: gain}, {SCALE: scale}, loss, descend, windows, torch.device("cpu"), seed)


def check_model_mitigator(mitigator: ModelMitigator, config: object = None) -> None:
    """Check a mitigator that learns from a model's output, on small random models.

    It must not modify what it is given, give the same values twice, none but those it was given and in their shapes,
    finite; run as many windows as it says; and report as ``kl`` and ``kl_before`` what is measured with its values and
    with none, on the same windows, the first of which is not above the second.

    Args:
        mitigator: The method.
        config: Its options; None for its defaults.

    Raises:
        CheckError: A promise is broken.
    """
    options = mitigator.Config() if config is None else config
    name = type(mitigator).__name__
    for seed, windows in enumerate((16, 40, 1)):
        problem = model_problem(seed=seed, windows=windows)
        given = {"gain": problem.norms[NORM], "scale": problem.scales[SCALE]}
        kept = {label: tensor.clone() for label, tensor in given.items()}
        counted = _Counted(problem)
        result = mitigator.tune(counted.problem, options)
        again = mitigator.tune(model_problem(seed=seed, windows=windows), options)
        refuse_changes(name, kept, given)
        _check_values(name, problem, result.values)
        same = result.values.keys() == again.values.keys()
        if not same or any(not torch.equal(value, again.values[label]) for label, value in result.values.items()):
            raise CheckError(f"{name} gives other values when it is asked again")
        told = mitigator.windows_run(windows, options)
        if counted.windows != told:
            raise CheckError(f"{name} says that {told} windows run, and {counted.windows} do")
        _check_report(name, problem, result, counted.judged)


class _Counted:
    """A problem that counts the windows that run, and remembers which ones losses were asked for."""

    def __init__(self, problem: ModelProblem) -> None:
        self.windows, self.judged, self._inner = 0, list[tuple[int, ...]](), problem
        self.problem = ModelProblem(
            problem.norms, problem.scales, self._loss, self._descend, problem.windows, problem.device, problem.seed
        )

    def _loss(self, rows: Sequence[int], values: Values) -> float:
        self._count(rows, 1)
        return self._inner.loss(rows, values)

    def _descend(self, rows: Sequence[int], values: Values) -> tuple[float, dict[str, Tensor]]:
        self._count(rows, 4)
        return self._inner.descend(rows, values)

    def _count(self, rows: Sequence[int], times: int) -> None:
        self.windows += times * len(rows)
        if (found := tuple(rows)) not in self.judged:
            self.judged.append(found)


def _check_values(name: str, problem: ModelProblem, values: Values) -> None:
    start = {**problem.norms, **problem.scales}
    for label, value in values.items():
        if label not in start:
            raise CheckError(f"{name} gives `{label}`, which the model has not")
        if value.shape != start[label].shape:
            raise CheckError(f"{name} gives `{label}` another shape")
        if not bool(value.isfinite().all()):
            raise CheckError(f"{name} gives `{label}` values that are not finite")


def _check_report(name: str, problem: ModelProblem, result: ModelResult, judged: Sequence[Sequence[int]]) -> None:
    """Check what is reported, on one of the sets of windows that the method asked about, or on all of them."""
    reported = {label: result.report.get(label, math.nan) for label in ("kl", "kl_before")}
    ways: list[Mapping[str, float]] = [
        {"kl": problem.loss(rows, result.values), "kl_before": problem.loss(rows, {})}
        for rows in (range(problem.windows), *judged)
    ]
    if not any(all(_same(reported[label], way[label]) for label in way) for way in ways):
        told = ", ".join(f"`{label}` as {value:.6g}" for label, value in reported.items())
        raise CheckError(f"{name} reports {told}, which no windows have: all of them {ways[0]['kl']:.6g}")
    if reported["kl"] > reported["kl_before"]:
        raise CheckError(f"{name} makes the divergence larger: {reported['kl']:.6g} of {reported['kl_before']:.6g}")


def _same(reported: float, measured: float) -> bool:
    return abs(reported - measured) <= _TOLERANCE * max(measured, 1e-6)
