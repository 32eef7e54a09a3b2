"""Beam search over GPTQ's triangular system, K-best of arXiv:2602.05902.

GPTQ decides each column for good. Here the best ``beams`` partial rows go on, each to the two nearest values of the
grid, and at the end the one with the least loss is taken. Scales are those that GPTQ fits on its way, and a row whose
search ended with more loss than GPTQ's keeps GPTQ's codes. Chen et al. 2025, arXiv:2507.18553, show that GPTQ, with
columns in the opposite order, is Babai's nearest plane: ``beams=1`` is both, so no method is called ``babai``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.builtin.mitigators.cd import encoded, frozen_columns
from qtool.builtin.mitigators.gptq import GPTQConfig, factor_key, solve_siblings
from qtool.builtin.mitigators.rtn import loss_report
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import UsageError
from qtool.numerics.beam import BranchingColumns, beam_round
from qtool.numerics.levels import level_codes
from qtool.numerics.triangular import InverseFactor


@dataclass(frozen=True)
class BeamConfig(GPTQConfig):
    """Options of the beam search: those of GPTQ, and how wide it is.

    Attributes:
        beams: Partial rows that are kept; time and memory grow with it.
    """

    beams: int = 4

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or two options exclude each other.
        """
        super().__post_init__()
        if not 1 <= self.beams <= 256:
            raise UsageError(f"`beams` is from 1 to 256, not {self.beams}", hint="--set beams=4")


class Beam:
    """Round column by column, with several candidates for each row."""

    version = 1
    needs: tuple[str, ...] = ("hessian",)
    Config = BeamConfig

    def quantize(self, problem: LayerProblem, config: BeamConfig) -> QuantizedLinear:
        """Solve one layer; falls back as GPTQ does.

        Raises:
            NumericalError: The weight or the Hessian is not finite.
            UsageError: Another method came first, or no Hessian was gathered.
        """
        return self.quantize_siblings([problem], config)[0]

    def quantize_siblings(self, problems: Sequence[LayerProblem], config: BeamConfig) -> list[QuantizedLinear]:
        """Solve the layers of one site; they share the factor."""
        results = solve_siblings(problems, config, "beam")
        return [_searched(*one, config) for one in zip(problems, results, strict=True)]


def _searched(problem: LayerProblem, start: QuantizedLinear, config: BeamConfig) -> QuantizedLinear:
    """Search on from what GPTQ made, unless it fell back."""
    if start.counters["fallback_rtn"]:
        return start
    factor: InverseFactor = problem.memory[factor_key(problem, config)]
    weight = problem.weight.masked_fill(problem.need_hessian().diagonal() == 0, 0.0)
    formats = [
        part.format
        for columns, part in problem.grid.places(weight.shape[1])
        for _ in part.runs(columns.stop - columns.start)
    ]
    frozen = frozen_columns(problem, start.parameters)
    grid = [
        BranchingColumns(own, level_codes(fmt).to(weight.device), fmt.decode)
        for own, fmt in zip(frozen, formats, strict=True)
    ]
    values = beam_round(weight, factor, grid=grid, beams=config.beams)

    def loss(found: Tensor) -> Tensor:
        errors = (weight - found.to(weight.dtype)).T
        return factor.loss(errors if factor.order is None else errors.index_select(0, factor.order))

    better = loss(values) < loss(start.weight(problem.grid))
    codes = torch.where(better.unsqueeze(-1), encoded(problem, values, start.parameters), start.codes)
    solved = replace(start, codes=codes)
    report = {
        **start.report,
        **loss_report(problem, solved.weight(problem.grid), None),
        "improved_rows": float(better.double().mean()),
    }
    return replace(solved, report=report)
