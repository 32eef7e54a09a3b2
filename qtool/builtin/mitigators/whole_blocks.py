"""What the methods share that look at whole blocks: where they start, how long they learn, what they report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from qtool.builtin.mitigators.rtn import check_problem, loss_report, round_nearest
from qtool.engine.block_problem import BlockProblem
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.engine.tuning import Schedule
from qtool.errors import UsageError
from qtool.numerics.losses import lasting
from qtool.numerics.token_weights import parse_token_weight


@dataclass(frozen=True)
class LearningOptions:
    """How long to learn from the outputs of a block.

    Attributes:
        steps: Steps of descent a block; 0 leaves everything as it was.
        batch: Windows to a step.
        judged: Windows by which the best step is chosen.
        loss_weight: How much the error of a token counts, by the norm of the block's output for it: as
            ``--token-weight``.
    """

    steps: int = 200
    batch: int = 8
    judged: int = 16
    loss_weight: str = "uniform"

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range.
        """
        if self.steps < 0:
            raise UsageError(f"`steps` is 0 or more, not {self.steps}", hint=f"--set steps={type(self).steps}")
        for name in ("batch", "judged"):
            if (value := getattr(self, name)) < 1:
                hint = f"--set {name}={getattr(type(self), name)}"
                raise UsageError(f"`{name}` is a number of windows, not {value}", hint=hint)
        parse_token_weight(self.loss_weight)

    @property
    def schedule(self) -> Schedule:
        """How long to learn."""
        return Schedule(self.steps, self.batch, self.judged, token_weight=parse_token_weight(self.loss_weight))


def starts_of(block: BlockProblem) -> dict[str, QuantizedLinear]:
    """Return what the method to the left made of each linear, or its weight rounded to nearest."""
    starts = {}
    for name, problem in block.problems.items():
        check_problem(problem)
        starts[name] = problem.previous or round_nearest(problem)
    return starts


def reported(
    problems: Mapping[str, LayerProblem], found: Mapping[str, QuantizedLinear], starts: Mapping[str, QuantizedLinear]
) -> dict[str, QuantizedLinear]:
    """Return quantized linears with their losses, and those that they had at the start."""
    results = {}
    for name, problem in problems.items():
        told = "loss_rtn" in starts[name].report
        nearest = None if told else round_nearest(problem).weight(problem.grid)
        losses = loss_report(problem, _stands(found[name], problem), nearest)
        before = loss_report(problem, _stands(starts[name], problem), None)
        changed = float((found[name].codes != starts[name].codes).double().mean())
        report = {
            **lasting(starts[name].report),
            **losses,
            **{f"{key}_before": value for key, value in before.items()},
            "changed_fraction": changed,
        }
        results[name] = replace(found[name], report=report)
    return results


def _stands(linear: QuantizedLinear, problem: LayerProblem) -> Float[Tensor, "out in"]:
    """Return what stands for a weight, low-rank correction included."""
    decoded = linear.weight(problem.grid)
    return decoded if linear.adapter is None else decoded + linear.adapter.product()
