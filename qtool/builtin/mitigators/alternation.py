"""What methods share that choose codes and a low-rank correction together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from qtool.builtin.mitigators.gptq import GPTQConfig
from qtool.builtin.mitigators.lorc import LoRCConfig, check_correction, is_left_out, with_adapter
from qtool.builtin.mitigators.rtn import refuse_previous, round_nearest
from qtool.engine.problem import Adapter, LayerProblem, QuantizedLinear
from qtool.errors import UsageError
from qtool.numerics.losses import output_energy

Iterate: TypeAlias = tuple[QuantizedLinear, Adapter]
Objective: TypeAlias = Callable[[QuantizedLinear, Adapter], float]
Solve: TypeAlias = Callable[[Sequence[LayerProblem]], Sequence[QuantizedLinear]]


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
        iterations: How often both are chosen; the best of all is kept. CALDERA's code has 20, SVDQuant's up to 100
            with an early end.
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


def solve_corrected(
    problems: Sequence[LayerProblem], config: JointConfig, method: str, *, codes_alone: Solve, together: Solve
) -> list[QuantizedLinear]:
    """Solve the layers of one site: experts that get no correction have codes alone, the others both together.

    Args:
        problems: They differ in name, weight and seed only.
        config: Says who gets a correction.
        method: What the user calls it.
        codes_alone: Solves those that get none.
        together: Solves the others.

    Raises:
        NumericalError: The weight or the Hessian is not finite, or a factor overflows its storage format.
        UsageError: The rank is larger than a weight, another method came first, or no Hessian was gathered.
    """
    for problem in problems:
        refuse_previous(problem, method)
        problem.need_hessian()
        if not is_left_out(problem, config):
            check_correction(problem, config)
    found: dict[str, QuantizedLinear] = {}
    for left_out, solve in ((True, codes_alone), (False, together)):
        own = [problem for problem in problems if is_left_out(problem, config) == left_out]
        if own:
            found |= zip((problem.name for problem in own), solve(own), strict=True)
    return [found[problem.name] for problem in problems]


def solve_in_turn(
    problems: Sequence[LayerProblem],
    config: AlternatingConfig,
    method: str,
    *,
    codes_alone: Solve,
    rounds: Callable[[Sequence[LayerProblem]], Iterable[Sequence[Iterate]]],
    objective: Callable[[LayerProblem], Objective],
) -> list[QuantizedLinear]:
    """Solve the layers of one site as ``solve_corrected`` does, codes and corrections in turn, and keep the best.

    ``rounds`` yields codes and the correction beside them, as it is stored, of all the layers that it is given;
    ``objective`` returns what is to be small of a layer.
    """

    def together(corrected: Sequence[LayerProblem]) -> list[QuantizedLinear]:
        return keep_best(corrected, rounds(corrected), [objective(problem) for problem in corrected])

    return solve_corrected(problems, config, method, codes_alone=codes_alone, together=together)


def keep_best(
    problems: Sequence[LayerProblem], rounds: Iterable[Sequence[Iterate]], objectives: Sequence[Objective]
) -> list[QuantizedLinear]:
    """Return the codes and the correction with the least objective of each layer; of equal ones the first.

    With scales that are fitted anew each time, no such sequence is monotone.

    Args:
        problems: Layers, as they were given to the method.
        rounds: Codes and the correction beside them, as it is stored, of each layer.
        objectives: What is to be small, of each layer.

    Returns:
        The best of each; its report has in addition ``iterations``, how many there were, and ``best_iteration``, from
        1.
    """
    best: dict[int, tuple[float, Iterate, int]] = {}
    count = 0
    for count, iterates in enumerate(rounds, start=1):
        for place, (iterate, objective) in enumerate(zip(iterates, objectives, strict=True)):
            loss = objective(*iterate)
            if place not in best or loss < best[place][0]:
                best[place] = loss, iterate, count
    if not count:
        raise LookupError("no iterates")
    results = []
    for place, problem in enumerate(problems):
        _, iterate, first = best[place]
        found = solved_beside(problem, *iterate)
        told = {"iterations": float(count), "best_iteration": float(first)}
        results.append(replace(found, report={**found.report, **told}))
    return results


def output_error(problem: LayerProblem) -> Objective:
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
