"""Qronos, Zhang et al. 2025, arXiv:2505.11695: correct the past, then shape the future, which is one solve and GPTQ.

The objective is ``‖Ŵ x_q − W x_f‖²``. The first column that is visited is rounded where that is least with all others
as they are. Then the others are solved for anew, once, and rounded as in GPTQ. All that is GPTQ on another weight
(``qtool.numerics.deviation.deviation_target``), from which scales are fitted as well. Where both streams are the same,
that is the weight itself. The paper damps by 1e-6 of the largest eigenvalue; here it is ``dampening_frac``, which also
holds back how far the weight is moved. The first column is that of ``order``, by default the one of most energy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.builtin.mitigators.gptq import CROSS, GPTQConfig
from qtool.builtin.mitigators.streams import solve_with_cross, visited_deviation
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.numerics.deviation import deviation_target
from qtool.numerics.triangular import InverseFactor


class Qronos:
    """Round the first column, solve for the others once, and round them column by column."""

    version = 1
    needs: tuple[str, ...] = ("hessian", CROSS)
    Config = GPTQConfig

    def quantize(self, problem: LayerProblem, config: GPTQConfig) -> QuantizedLinear:
        """Solve one layer; falls back as GPTQ does.

        Raises:
            NumericalError: The weight or a moment is not finite.
            UsageError: Another method came first, or a moment was not gathered.
        """
        return self.quantize_siblings([problem], config)[0]

    def quantize_siblings(self, problems: Sequence[LayerProblem], config: GPTQConfig) -> list[QuantizedLinear]:
        """Solve the layers of one site as one: they share the factor, and rows do not see each other."""
        return solve_with_cross(problems, config, "qronos", _steer)


def _steer(problem: LayerProblem, factor: InverseFactor) -> tuple[Tensor, InverseFactor]:
    weight, diagonal = problem.weight, problem.need_hessian().diagonal().to(problem.weight.dtype)
    diagonal = torch.where(diagonal == 0, 1.0, diagonal)
    if factor.order is not None:
        weight, diagonal = weight.index_select(1, factor.order), diagonal.index_select(0, factor.order)
    target = deviation_target(weight, diagonal, visited_deviation(problem, factor), factor.upper)
    if factor.order is not None:
        target = target.index_select(1, torch.argsort(factor.order))
    return target, factor
