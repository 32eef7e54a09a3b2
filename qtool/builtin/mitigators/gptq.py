"""GPTQ, Frantar et al. 2023, arXiv:2210.17323: error feedback through the inverse Hessian.

Groups are fitted before the solver starts (``parameters=static``), so that columns can be visited by descending Hessian
diagonal while groups stay neighbours in storage; or when it reaches them, on the weights as they are then (``fresh``);
GPTQ's first code leaves out what is still pending in its lazy block (``stale``). ``order=groups`` is the order of Gafni
et al. 2025, arXiv:2505.14638, which visits group after group, so that it goes with all three. The paper ranks groups by
the largest diagonal entry or by the mean of all; here it is the mean. The defaults are what measured best
(``recipes/README.md``): static parameters in activation order, clipped by the Hessian's diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.builtin.mitigators.rtn import (
    ClipOptions,
    check_problem,
    clip_moments,
    clip_report,
    fit_groups,
    loss_report,
    refuse_previous,
    refuse_unknown,
    round_nearest,
    tensor_multipliers,
)
from qtool.engine.grid import GridPart
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import NumericalError, ShapeError, UsageError
from qtool.numerics.gptq import ColumnGrid, GPTQResult, factorize_visits, gptq_round
from qtool.numerics.groups import combine_parameters, each_parameter
from qtool.numerics.second_moments import diagonal_blocks
from qtool.numerics.triangular import InverseFactor
from qtool.scheme import GroupParameters

CROSS = "cross"
"""Name of the second moment of what a layer reads in the full-precision model and in the quantized one."""

Steer: TypeAlias = Callable[[LayerProblem, InverseFactor], tuple[Tensor, InverseFactor]]
"""``steer(problem, factor)`` returns the weight to start from, and the factor with a linear term."""

# 2 to this power, and to its negative, are normal float32 numbers.
_LARGEST_EXPONENT = 126


@dataclass(frozen=True)
class GPTQConfig(ClipOptions):
    """Options of GPTQ; those of the clip search come with them, on by default.

    Attributes:
        dampening_frac: Added to the Hessian diagonal, as a fraction of its mean.
        block_size: Columns per lazy update.
        parameters: What the scales of a group are fitted on.
        order: Which column is next: from left to right (``natural``), by descending Hessian diagonal
            (``activation``), or group after group by descending mean of the diagonal and in a group by the diagonal
            (``groups``).
    """

    dampening_frac: float = 0.01
    block_size: int = 128
    parameters: Literal["fresh", "static", "stale"] = "static"
    order: Literal["natural", "activation", "groups"] = "activation"
    clip: Literal["none", "search"] = "search"
    clip_norm: float = 2.0
    clip_grid: int = 20
    clip_metric: Literal["mse", "hessian", "output"] = "hessian"

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or two options exclude each other.
        """
        super().__post_init__()
        refuse_unknown("parameters", self.parameters, ("fresh", "static", "stale"))
        if not 0 <= self.dampening_frac <= 10:
            given = f"`dampening_frac` is from 0 to 10, not {self.dampening_frac}"
            raise UsageError(given, hint="--set dampening_frac=0.01")
        if self.block_size < 1:
            raise UsageError(f"`block_size` is a number of columns, not {self.block_size}", hint="--set block_size=128")
        refuse_unknown("order", self.order, ("natural", "activation", "groups"))
        if self.order == "activation" and self.parameters != "static":
            raise UsageError(
                f"the order `activation` visits columns of all groups in turn, so it cannot fit {self.parameters} "
                "parameters",
                hint=f"--set parameters={self.parameters} --set order=groups",
            )


class GPTQ:
    """Round column by column; later columns make up for the error of each."""

    version = 1
    needs: tuple[str, ...] = ("hessian",)
    Config = GPTQConfig

    def quantize(self, problem: LayerProblem, config: GPTQConfig) -> QuantizedLinear:
        """Solve one layer; where its Hessian says nothing or cannot be factorized, round to nearest and count it.

        Raises:
            NumericalError: The weight or the Hessian is not finite.
            UsageError: Another method came first, or no Hessian was gathered.
        """
        return self.quantize_siblings([problem], config)[0]

    def quantize_siblings(self, problems: Sequence[LayerProblem], config: GPTQConfig) -> list[QuantizedLinear]:
        """Solve the layers of one site as one: they share the factor, and rows do not see each other."""
        return solve_siblings(problems, config, "gptq")


def solve_siblings(
    problems: Sequence[LayerProblem], config: GPTQConfig, method: str, steer: Steer | None = None
) -> list[QuantizedLinear]:
    """Solve the layers of one site as one.

    Args:
        problems: They differ in name, weight and seed only.
        config: Options.
        method: What the user calls it.
        steer: Says what the solver starts from, given the problem and the factor: another weight, a linear term.

    Returns:
        A result for each problem; where the Hessian says nothing or cannot be factorized, what rounding to nearest
        gives, which the counter ``fallback_rtn`` tells.

    Raises:
        NumericalError: The weight or the Hessian is not finite.
        UsageError: Another method came first, or no Hessian was gathered.
    """
    if len(problems) > 1 and any(part.shares_rows for part in problems[0].grid.parts):  # each has its own
        return [solve_siblings([problem], config, method, steer)[0] for problem in problems]
    for problem in problems:
        refuse_previous(problem, method)
        problem.need_hessian()
        check_problem(problem)
    stacked = replace(problems[0], weight=torch.cat([problem.weight for problem in problems]))
    ratios: list[Tensor] = []
    solved: GPTQResult | None = None
    try:
        solved = _solve(normalized(stacked), config, ratios, steer)
    except ShapeError:
        raise
    except NumericalError:
        # The model is more useful with plainly rounded layers than not at all; the counter tells.
        results = [round_nearest(problem, replace(config, clip_metric="mse")) for problem in problems]
    else:
        results = _apart(problems, solved, ratios)
    counters = _counters(config, stacked.need_hessian(), solved)
    return [
        replace(result, report={**_losses(problem, result), **result.report}, counters=counters)
        for problem, result in zip(problems, results, strict=True)
    ]


def _apart(problems: Sequence[LayerProblem], solved: GPTQResult, ratios: Sequence[Tensor]) -> list[QuantizedLinear]:
    """Give each layer its rows of what was solved as one."""
    results, stop = [], 0
    for problem in problems:
        start, stop = stop, stop + len(problem.weight)
        solved_parts = (_rows(own, start, stop) for own in solved.parameters)
        parameters = tuple(
            _as_stored(
                combine_parameters([next(solved_parts) for _ in part.runs(columns.stop - columns.start)], _beside), part
            )
            for columns, part in problem.grid.places(problem.weight.shape[1])
        )
        report = {"dampening_frac": solved.dampening_frac, **clip_report([ratio[start:stop] for ratio in ratios])}
        codes = solved.codes[start:stop].clone()
        results.append(QuantizedLinear(codes, parameters, report=report))
    return results


_beside = partial(torch.cat, dim=-1)


def _rows(parameters: GroupParameters, start: int, stop: int) -> GroupParameters:
    return each_parameter(parameters, lambda own: own[start:stop].clone())


def _losses(problem: LayerProblem, result: QuantizedLinear) -> dict[str, float]:
    """Measure a result beside rounding to nearest without clipping."""
    decoded, plain = (one.weight(problem.grid) for one in (result, round_nearest(problem)))
    return loss_report(problem, decoded, plain)


def normalized(problem: LayerProblem) -> LayerProblem:
    """Scale both moments by a power of two so that live inputs have a second moment of about 1.

    The solver gives dead inputs a second moment of 1, which is to be of the size of the others, whatever the unit.

    Raises:
        NumericalError: No input was ever live.
    """
    hessian = problem.need_hessian()
    diagonal = hessian.diagonal()
    live = diagonal[diagonal != 0].double()
    mean = float(live.mean()) if len(live) else 0.0
    if mean <= 0.0:
        raise NumericalError("the Hessian has no positive diagonal entry")
    unit = 2.0 ** -min(max(math.frexp(mean)[1], -_LARGEST_EXPONENT), _LARGEST_EXPONENT)
    cross = {CROSS: problem.entries[CROSS] * unit} if CROSS in problem.entries else {}
    return replace(problem, hessian=hessian * unit, entries={**problem.entries, **cross})


def _solve(problem: LayerProblem, config: GPTQConfig, ratios: list[Tensor], steer: Steer | None) -> GPTQResult:
    """Run the solver on the problem's grid; collects the clip ratios of the groups."""
    hessian = problem.need_hessian()
    places = problem.grid.places(len(hessian))
    grid = [
        ColumnGrid(
            group_size=size,
            fit=partial(_fitted_columns, part, multiplier, hessian, config, ratios),
            round=part.format.round,
            encode=part.format.encode,
            columns=width,
        )
        for (columns, part), multiplier in zip(places, tensor_multipliers(problem), strict=True)
        for width, size in part.runs(columns.stop - columns.start)
    ]
    key = factor_key(problem, config)
    if key not in problem.memory:
        problem.memory[key] = factorize_visits(
            hessian.to(problem.weight.dtype), grid, dampening_frac=config.dampening_frac, order=config.order
        )
    start, factor = problem.weight, problem.memory[key]
    if steer is not None:
        start, factor = steer(problem, factor)
    return gptq_round(
        start, hessian, grid=grid, block_size=config.block_size, parameters=config.parameters, factor=factor
    )


def factor_key(problem: LayerProblem, config: GPTQConfig) -> Hashable:
    """Return what the factor of a solved problem is called in its memory."""
    groups = [(part.channels, part.scheme.group_size) for part in problem.grid.parts if config.order == "groups"]
    return "gptq", config.dampening_frac, config.order, *groups


def _fitted_columns(
    part: GridPart,
    multiplier: Tensor | None,
    hessian: Float[Tensor, "in in"],
    config: GPTQConfig,
    ratios: list[Tensor],
    values: Tensor,
    start: int,
) -> GroupParameters:
    """Fit groups of columns: one scale a row and group, also where all rows share it. Notes their clip ratios."""
    whole, columns = _is_whole(part), slice(start, start + values[0].numel())
    groups = values.reshape(1, -1) if whole else values
    moments = clip_moments(part, columns, config, lambda own, size: diagonal_blocks(hessian[own, own], size))
    fitted = fit_groups(part, groups, config, global_scale=multiplier, moments=moments)
    ratios.append(fitted.ratio)
    return _a_row_each(fitted.parameters, len(values)) if whole else fitted.parameters


def _is_whole(part: GridPart) -> bool:
    """Say whether all rows of a layer share one scale."""
    return part.scheme.strategy == "tensor"


def _a_row_each(parameters: GroupParameters, rows: int) -> GroupParameters:
    """Repeat a tensor's parameters for each row of its only group."""
    return each_parameter(parameters, lambda own: own.expand(rows, 1))


def _as_stored(parameters: GroupParameters, part: GridPart) -> GroupParameters:
    """Undo ``_a_row_each``; other parameters are already as the codes' groups need them."""
    if not _is_whole(part):
        return parameters
    return each_parameter(parameters, lambda own: own[0].clone())


def _counters(config: GPTQConfig, hessian: Float[Tensor, "in in"], solved: GPTQResult | None) -> dict[str, int]:
    """Count what was not as usual; ``None`` stands for a layer that was rounded to nearest."""
    return {
        "dead_columns": int((hessian.diagonal() == 0).sum()),
        "raised_dampening": int(solved is not None and solved.dampening_frac > config.dampening_frac),
        "float64_factors": int(solved is not None and solved.wide),
        "fallback_rtn": int(solved is None),
    }
