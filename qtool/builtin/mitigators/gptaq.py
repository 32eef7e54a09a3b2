"""GPTAQ, Li et al. 2025, arXiv:2504.02692: GPTQ that also makes up for what the layer reads.

The objective is ``‖Ŵ x_q − W x_f‖²``: the outputs of the full-precision model from inputs of the quantized one. When
a column is rounded, those after it make up for its error as in GPTQ, and for a part ``alpha`` of what the deviation of
its own input does, times the column as it is just before it is rounded. The paper's code takes the rounded value where
the later column is in another lazy block; here the block size does not matter. Without deviation, or with ``alpha=0``,
it is GPTQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from qtool.builtin.mitigators.gptq import CROSS, GPTQConfig, factor_key
from qtool.builtin.mitigators.streams import solve_with_cross, visited_deviation
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import UsageError
from qtool.numerics.deviation import carried_deviation
from qtool.numerics.triangular import InverseFactor, LinearTerm


@dataclass(frozen=True)
class GPTAQConfig(GPTQConfig):
    """Options of GPTAQ: those of GPTQ, and how much of the deviation to make up for.

    Attributes:
        alpha: Part of the deviation; all of it fits the calibration tokens too closely.
    """

    alpha: float = 0.25

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or two options exclude each other.
        """
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"`alpha` is from 0 to 1, not {self.alpha}", hint="--set alpha=0.25")


class GPTAQ:
    """Round column by column; later columns make up for the error of each, and for its input's deviation."""

    version = 1
    needs: tuple[str, ...] = ("hessian", CROSS)
    rounded_inputs = True
    Config = GPTAQConfig

    def quantize(self, problem: LayerProblem, config: GPTAQConfig) -> QuantizedLinear:
        """Solve one layer; falls back as GPTQ does.

        Raises:
            NumericalError: The weight or a moment is not finite.
            UsageError: Another method came first, or a moment was not gathered.
        """
        return self.quantize_siblings([problem], config)[0]

    def quantize_siblings(self, problems: Sequence[LayerProblem], config: GPTAQConfig) -> list[QuantizedLinear]:
        """Solve the layers of one site as one: they share the factor, and rows do not see each other."""

        def steer(problem: LayerProblem, factor: InverseFactor) -> tuple[Tensor, InverseFactor]:
            key = ("gptaq", factor_key(problem, config))
            if key not in problem.memory:
                problem.memory[key] = carried_deviation(visited_deviation(problem, factor), factor.upper)
            return problem.weight, replace(factor, term=LinearTerm(config.alpha * problem.memory[key]))

        return solve_with_cross(problems, config, "gptaq", steer)
