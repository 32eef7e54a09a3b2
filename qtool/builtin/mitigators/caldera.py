"""CALDERA, Saha et al. 2024, arXiv:2405.18886: codes and a low-rank correction in turn, both under the Hessian.

Codes by LDLQ, which is GPTQ, for the weight less the correction; then the correction of what they lose, by LPLR: from
the best factors in full precision (``qera``), each is solved for anew beside the other as it is stored. So rounding one
factor is made up for by the other, and the next codes make up for both. The first of the iterates is ``gptq+qera``
with such factors; the best is kept.

Differences from the paper's code: that starts with the correction, of the whole weight, and judges behind each half of
a round. Roots of the Hessian and their inverses, which it divides by without a floor, do not occur. Left out are its
lattice codebook, its incoherence processing, which is a transform (``quip-sharp``), and factors of 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from jaxtyping import Float
from torch import Tensor

from qtool.builtin.mitigators.alternation import AlternatingConfig, Iterate, output_error, solve_in_turn
from qtool.builtin.mitigators.gptq import GPTQ
from qtool.builtin.mitigators.lorc import checked_adapter, rounded_adapter
from qtool.engine.problem import Adapter, LayerProblem, QuantizedLinear
from qtool.errors import UsageError
from qtool.numerics.losses import output_energies
from qtool.numerics.lowrank import best_down, best_up, weighted_truncation


@dataclass(frozen=True)
class CalderaConfig(AlternatingConfig):
    """Options of CALDERA.

    Attributes:
        factor_iterations: How often each factor is solved for beside the other as it is stored.
    """

    factor_iterations: int = 5

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or two options exclude each other.
        """
        super().__post_init__()
        if not 0 <= self.factor_iterations <= 1000:
            given = f"`factor_iterations` is from 0 to 1000, not {self.factor_iterations}"
            raise UsageError(given, hint="--set factor-iterations=5")


class Caldera:
    """Choose codes and a low-rank correction in turn, and keep the best pair."""

    version = 2
    needs: tuple[str, ...] = ("hessian",)
    Config = CalderaConfig

    def quantize(self, problem: LayerProblem, config: CalderaConfig) -> QuantizedLinear:
        """Solve one layer.

        Raises:
            NumericalError: The weight or the Hessian is not finite, or a factor overflows its storage format.
            UsageError: The rank is larger than the weight, another method came first, or no Hessian was gathered.
        """
        return self.quantize_siblings([problem], config)[0]

    def quantize_siblings(self, problems: Sequence[LayerProblem], config: CalderaConfig) -> list[QuantizedLinear]:
        """Solve the layers of one site together: they share the factor of the Hessian."""
        return solve_in_turn(
            problems,
            config,
            "caldera",
            codes_alone=partial(GPTQ().quantize_siblings, config=config),
            rounds=partial(_rounds, config=config),
            objective=output_error,
        )


def _rounds(problems: Sequence[LayerProblem], config: CalderaConfig) -> Iterator[Sequence[Iterate]]:
    """Yield codes and corrections; each correction is chosen behind its codes."""
    rest = [problem.weight for problem in problems]
    for _ in range(config.iterations):
        solved = GPTQ().quantize_siblings(
            [replace(problem, weight=weight) for problem, weight in zip(problems, rest, strict=True)], config
        )
        adapters = [
            _factors(problem, config, problem.weight - codes.weight(problem.grid))
            for problem, codes in zip(problems, solved, strict=True)
        ]
        yield list(zip(solved, adapters, strict=True))
        rest = [problem.weight - adapter.product() for problem, adapter in zip(problems, adapters, strict=True)]


def _factors(problem: LayerProblem, config: CalderaConfig, error: Float[Tensor, "out in"]) -> Adapter:
    """Return the best of the corrections that LPLR goes through."""
    hessian = problem.need_hessian()
    up, down = weighted_truncation(error, hessian, config.rank, seed=problem.seed)
    found = [rounded_adapter(config, (up, down))]
    for _ in range(config.factor_iterations):
        down, _ = found[-1].factors()
        _, up = rounded_adapter(config, (best_up(error, down, hessian), down)).factors()
        found.append(rounded_adapter(config, (up, best_down(error, up))))
    losses = output_energies([error - adapter.product() for adapter in found], hessian)
    return checked_adapter(problem, config, found[losses.index(min(losses))])
