"""FOEM, Zheng et al. 2025, arXiv:2507.11017: GPTQ with the first-order term that its expansion of the loss leaves out.

GPTQ takes the weight for a minimum of the loss, where the slope is 0. Once updates have moved it there is a slope; FOEM
takes it to be along the way from the full-precision weight. So later columns make up for ``(w_j − q_j) − beta (w_j −
w⁰_j)`` instead of ``w_j − q_j``. With ``beta=0`` it is GPTQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from qtool.builtin.mitigators.gptq import GPTQConfig, solve_siblings
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import UsageError
from qtool.numerics.triangular import InverseFactor, LinearTerm


@dataclass(frozen=True)
class FOEMConfig(GPTQConfig):
    """Options of FOEM: those of GPTQ, and the weight of the first-order term.

    Attributes:
        beta: Part of a column's drift that later columns do not make up for.
    """

    beta: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or two options exclude each other.
        """
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise UsageError(f"`beta` is from 0 to 1, not {self.beta}", hint="--set beta=0.2")


class FOEM:
    """Round column by column; later columns make up for the error of each, less a part of its drift."""

    version = 1
    needs: tuple[str, ...] = ("hessian",)
    Config = FOEMConfig

    def quantize(self, problem: LayerProblem, config: FOEMConfig) -> QuantizedLinear:
        """Solve one layer; falls back as GPTQ does.

        Raises:
            NumericalError: The weight or the Hessian is not finite.
            UsageError: Another method came first, or no Hessian was gathered.
        """
        return self.quantize_siblings([problem], config)[0]

    def quantize_siblings(self, problems: Sequence[LayerProblem], config: FOEMConfig) -> list[QuantizedLinear]:
        """Solve the layers of one site as one: they share the factor, and rows do not see each other."""

        def steer(problem: LayerProblem, factor: InverseFactor) -> tuple[Tensor, InverseFactor]:
            return problem.weight, replace(factor, term=LinearTerm(config.beta * factor.feedback(), drift=True))

        return solve_siblings(problems, config, "foem", steer)
