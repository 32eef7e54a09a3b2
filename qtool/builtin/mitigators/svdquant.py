"""SVDQuant, Li et al. 2024, arXiv:2411.05007: a low-rank branch takes the large part of the weight before quantization.

``LR = SVD_r(W)``, codes for ``W - LR``; then ``LR = SVD_r(W - Ŵ)`` and codes for what that leaves, and so on. Codes are
chosen for what the branch leaves as it is stored, so that they make up for its rounding. The branch reads what is not
rounded, as in the paper. Its smoothing in front is a transform here (``smoothquant``); GPTQ, which it offers in place
of nearest rounding, is the default; the search that stops at the first iterate that is no better goes on here, up to
``iterations``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

from qtool.builtin.mitigators.alternation import AlternatingConfig, Iterate, output_error, solve_in_turn
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.lorc import stored_adapter
from qtool.builtin.mitigators.rtn import (
    ClipOptions,
    loss_report,
    refuse_unknown,
    round_nearest,
)
from qtool.engine.problem import LayerProblem, QuantizedLinear, Reads
from qtool.errors import UsageError
from qtool.numerics.lowrank import truncated_svd


@dataclass(frozen=True)
class SVDQuantConfig(AlternatingConfig):
    """Options of SVDQuant; those of GPTQ's clip search hold for either solver.

    Attributes:
        solver: What chooses the codes of the remainder.
    """

    reads: Reads = "full"
    solver: Literal["rtn", "gptq"] = "gptq"

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or an option would have no effect.
        """
        super().__post_init__()
        refuse_unknown("solver", self.solver, ("rtn", "gptq"))
        clip = {one.name for one in fields(ClipOptions)}
        own = [one for one in fields(GPTQConfig) if one.name not in clip]
        idle = next((one.name for one in own if getattr(self, one.name) != one.default), None)
        if self.solver == "rtn" and idle is not None:
            raise UsageError(f"`{idle}` has no effect on the solver `rtn`", hint="--set solver=gptq")


class SVDQuant:
    """Take the leading part of the weight in a low-rank branch, and quantize the remainder."""

    version = 3
    needs: tuple[str, ...] = ("hessian",)
    Config = SVDQuantConfig

    def quantize(self, problem: LayerProblem, config: SVDQuantConfig) -> QuantizedLinear:
        """Solve one layer.

        Raises:
            NumericalError: The weight or the Hessian is not finite, or a factor overflows its storage format.
            UsageError: The rank is larger than the weight, another method came first, or no Hessian was gathered.
        """
        return self.quantize_siblings([problem], config)[0]

    def quantize_siblings(self, problems: Sequence[LayerProblem], config: SVDQuantConfig) -> list[QuantizedLinear]:
        """Solve the layers of one site together: they share the factor of the Hessian."""
        return solve_in_turn(
            problems,
            config,
            "svdquant",
            codes_alone=partial(_solved, config=config),
            rounds=partial(_rounds, config=config),
            objective=output_error,
        )


def _rounds(problems: Sequence[LayerProblem], config: SVDQuantConfig) -> Iterator[Sequence[Iterate]]:
    """Yield codes and branches; each branch is chosen before its codes."""
    large = [problem.weight for problem in problems]
    for _ in range(config.iterations):
        adapters = [
            stored_adapter(problem, config, truncated_svd(part, config.rank, seed=problem.seed))
            for problem, part in zip(problems, large, strict=True)
        ]
        rest = [
            replace(problem, weight=problem.weight - adapter.product())
            for problem, adapter in zip(problems, adapters, strict=True)
        ]
        solved = _solved(rest, config)
        yield list(zip(solved, adapters, strict=True))
        large = [problem.weight - codes.weight(problem.grid) for problem, codes in zip(problems, solved, strict=True)]


def _solved(problems: Sequence[LayerProblem], config: SVDQuantConfig) -> list[QuantizedLinear]:
    """Choose the codes of weights."""
    if config.solver == "gptq":
        return GPTQ().quantize_siblings(problems, config)
    return [_nearest(problem, config) for problem in problems]


def _nearest(problem: LayerProblem, config: SVDQuantConfig) -> QuantizedLinear:
    nearest = round_nearest(problem, config)
    plain = round_nearest(problem).weight(problem.grid)
    return replace(nearest, report={**loss_report(problem, nearest.weight(problem.grid), plain), **nearest.report})
