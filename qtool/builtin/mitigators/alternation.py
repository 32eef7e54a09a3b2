"""What methods share that choose codes and a low-rank correction together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from qtool.builtin.mitigators.gptq import GPTQConfig
from qtool.builtin.mitigators.lorc import LoRCConfig, with_adapter
from qtool.builtin.mitigators.rtn import round_nearest
from qtool.engine.problem import Adapter, LayerProblem, QuantizedLinear
from qtool.errors import UsageError
from qtool.numerics.losses import output_energy

Iterate = tuple[QuantizedLinear, Adapter]


@dataclass(frozen=True)
class JointConfig(LoRCConfig, GPTQConfig):
    """Options of a correction, and those of GPTQ, which chooses the codes beside it."""

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or two options exclude each other.
        """
        LoRCConfig.__post_init__(self)
        GPTQConfig.__post_init__(self)


@dataclass(frozen=True)
class AlternatingConfig(JointConfig):
    """Options of a method that chooses codes and correction in turn.

    Attributes:
        iterations: How often both are chosen; the best of all is kept.
    """

    iterations: int = 10

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or two options exclude each other.
        """
        super().__post_init__()
        if not 1 <= self.iterations <= 1000:
            raise UsageError(f"`iterations` is from 1 to 1000, not {self.iterations}", hint="--set iterations=10")


def keep_best(
    problem: LayerProblem, iterates: Iterable[Iterate], objective: Callable[[QuantizedLinear, Adapter], float]
) -> QuantizedLinear:
    """Return the codes and the correction with the least objective; of equal ones the first.

    With scales that are fitted anew each time, no such sequence is monotone.

    Args:
        problem: One layer, as it was given to the method.
        iterates: Codes and the correction beside them, as it is stored.
        objective: What is to be small.

    Returns:
        The best; its report has in addition ``iterations``, how many there were, and ``best_iteration``, from 1.
    """
    least, best, count = math.inf, None, 0
    for iterate in iterates:
        count += 1
        loss = objective(*iterate)
        if best is None or loss < least:
            least, best, place = loss, iterate, count
    if best is None:
        raise LookupError("no iterates")
    found = solved_beside(problem, *best)
    return replace(found, report={**found.report, "iterations": float(count), "best_iteration": float(place)})


def output_error(problem: LayerProblem) -> Callable[[QuantizedLinear, Adapter], float]:
    """Return what measures ``tr(E H Eᵀ)`` of codes and the correction beside them."""

    def measure(solved: QuantizedLinear, adapter: Adapter) -> float:
        return output_energy(problem.weight - solved.weight(problem.grid) - adapter.product(), problem.hessian)

    return measure


def solved_beside(problem: LayerProblem, solved: QuantizedLinear, adapter: Adapter) -> QuantizedLinear:
    """Put a correction beside codes that were chosen with it, for another weight or Hessian, and measure both together.

    Such methods start from the weight: what came before them is rounding to nearest, not their codes alone.
    """
    found = with_adapter(problem, solved, adapter, before=round_nearest(problem).weight(problem.grid))
    return replace(found, report={**found.report, "loss_rtn": found.report["loss_before"]})
