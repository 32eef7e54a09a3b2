"""LDLQ of QuIP, Chee et al. 2023, arXiv:2307.13304: adaptive rounding with linear feedback, and greedy passes.

LDLQ chooses the codes of GPTQ (theorem 6), so it is GPTQ's solver here. What QuIP adds: the LDL decomposition predicts
the gain over nearest rounding, and after the last column greedy passes go over all of them again, which is coordinate
descent. Left out is its range of 2.4 root mean squares of a weight, in place of which the clip search stands.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qtool.builtin.mitigators.cd import CDConfig, descend
from qtool.builtin.mitigators.gptq import GPTQConfig, factor_key, solve_siblings
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import UsageError
from qtool.numerics.ldl import linear_feedback


@dataclass(frozen=True)
class LDLQConfig(GPTQConfig):
    """Options of LDLQ: those of GPTQ, and passes behind it.

    Attributes:
        greedy_passes: Passes of coordinate descent, at most; QuIP's LDLQ-RG has 9.
    """

    greedy_passes: int = 0

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or two options exclude each other.
        """
        super().__post_init__()
        if not 0 <= self.greedy_passes <= 1000:
            given = f"`greedy_passes` is from 0 to 1000, not {self.greedy_passes}"
            raise UsageError(given, hint="--set greedy-passes=9")


class LDLQ:
    """Round column by column with linear feedback, then go over the columns again."""

    version = 1
    needs: tuple[str, ...] = ("hessian",)
    Config = LDLQConfig

    def quantize(self, problem: LayerProblem, config: LDLQConfig) -> QuantizedLinear:
        """Solve one layer; where its Hessian says nothing or cannot be factorized, round to nearest and count it.

        Raises:
            NumericalError: The weight or the Hessian is not finite.
            UsageError: Another method came first, or no Hessian was gathered.
        """
        return self.quantize_siblings([problem], config)[0]

    def quantize_siblings(self, problems: Sequence[LayerProblem], config: LDLQConfig) -> list[QuantizedLinear]:
        """Solve the layers of one site as one: they share the factor, and rows do not see each other."""
        results = solve_siblings(problems, config, "ldlq")
        return [self._finished(*one, config) for one in zip(problems, results, strict=True)]

    def _finished(self, problem: LayerProblem, solved: QuantizedLinear, config: LDLQConfig) -> QuantizedLinear:
        if solved.counters["fallback_rtn"]:
            return solved
        gain = _predicted_gain(problem.memory, factor_key(problem, config))
        solved = replace(solved, report={**solved.report, "ldl_trace_fraction": gain})
        if not config.greedy_passes:
            return solved
        passes = CDConfig(
            sweeps=config.greedy_passes,
            dampening_frac=solved.report["dampening_frac"],
            visits="natural" if config.order == "natural" else "activation",
            block_size=config.block_size,
        )
        return descend(problem, solved, passes)


def _predicted_gain(memory: dict[Any, Any], factor: Hashable) -> float:
    """Return ``tr(D) / tr(H)`` of the factor that GPTQ left in memory, and remember it beside that."""
    key = ("ldl_trace_fraction", factor)
    if key not in memory:
        memory[key] = linear_feedback(memory[factor].upper).trace_fraction()
    gain: float = memory[key]
    return gain
