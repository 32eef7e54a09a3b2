"""LRC, Scetbon and Hensman 2024, arXiv:2412.07902: a low-rank branch that sees what activation rounding took away.

Codes multiply the rounded input ``x_q``, the branch that before rounding, ``x_f``. With ``R = E x_f x_fᵀ``,
``H = E x_q x_qᵀ`` and ``C = E x_f x_qᵀ``, what is to be small is ``E ‖W x_f - Ŵ x_q - LR x_f‖²``. In turn:

- given the branch, ``Ŵ`` is GPTQ's under ``H`` for the target ``(W - LR) C H⁻¹``;
- given the codes, ``LR`` is the rank-r part under ``R`` of ``T = (W R - Ŵ Cᵀ) R⁻¹``.

Both inverses are damped around the solution for equal inputs: ``C H⁻¹ = I + (C - H) H⁻¹``, and ``T = W - Ŵ -
Ŵ (Cᵀ - R) R⁻¹``. So where both inputs are the same the target is ``W - LR``, exactly, and the first iterate is
``gptq+qera``. The statistics are of the full-precision stream; what the branch multiplies in the quantized model is
its own stream before rounding, which they stand for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.builtin.mitigators.alternation import AlternatingConfig, Iterate, Objective, solve_in_turn
from qtool.builtin.mitigators.gptq import GPTQ
from qtool.builtin.mitigators.lorc import stored_adapter
from qtool.builtin.mitigators.rtn import round_nearest
from qtool.engine.problem import Adapter, LayerProblem, QuantizedLinear, Reads
from qtool.errors import NumericalError, UsageError
from qtool.numerics.losses import loss_ratio, output_energy
from qtool.numerics.lowrank import weighted_truncation
from qtool.numerics.two_streams import TwoStreams


@dataclass(frozen=True)
class LRCConfig(AlternatingConfig):
    """Options of LRC; the branch reads the input before rounding, or it is another method."""

    reads: Reads = "full"
    iterations: int = 5

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or two options exclude each other.
        """
        super().__post_init__()
        if self.reads != "full":
            raise UsageError("the branch of `lrc` reads what is not rounded", hint="--method caldera")


class LRC:
    """Choose codes for the rounded input and a low-rank branch for the other in turn."""

    version = 1
    needs: tuple[str, ...] = ("hessian", "cross", "full_hessian")
    rounded_inputs = True
    Config = LRCConfig

    def quantize(self, problem: LayerProblem, config: LRCConfig) -> QuantizedLinear:
        """Solve one layer.

        Returns:
            Codes and branch. Beside ``loss``, which is of the rounded input throughout, the report has ``target_loss``,
            what is minimized, over ``E ‖W x_f‖²``, and that of rounding to nearest, ``target_loss_before``.

        Raises:
            NumericalError: The weight or a statistic is not finite, or a factor overflows its storage format.
            UsageError: The rank is larger than the weight, another method came first, or a statistic was not gathered.
        """
        return self.quantize_siblings([problem], config)[0]

    def quantize_siblings(self, problems: Sequence[LayerProblem], config: LRCConfig) -> list[QuantizedLinear]:
        """Solve the layers of one site together: they share both streams and the factor of the Hessian."""
        found = solve_in_turn(
            problems,
            config,
            "lrc",
            codes_alone=partial(GPTQ().quantize_siblings, config=config),
            rounds=partial(_rounds, config=config),
            objective=partial(_objective, config=config),
        )
        return [
            one if one.adapter is None else _told(problem, one, one.adapter, config)
            for problem, one in zip(problems, found, strict=True)
        ]


def _rounds(problems: Sequence[LayerProblem], config: LRCConfig) -> Iterator[Sequence[Iterate]]:
    """Yield codes and branches; each branch is chosen behind its codes."""
    streams = _streams(problems[0], config.dampening_frac)
    rest = [problem.weight for problem in problems]
    for _ in range(config.iterations):
        solved = GPTQ().quantize_siblings(
            [replace(problem, weight=streams.target(part)) for problem, part in zip(problems, rest, strict=True)],
            config,
        )
        adapters = []
        for problem, codes in zip(problems, solved, strict=True):
            wanted = streams.wanted(problem.weight, codes.weight(problem.grid).to(problem.weight.dtype))
            factors = weighted_truncation(wanted, streams.full, config.rank, seed=problem.seed)
            adapters.append(stored_adapter(problem, config, factors))
        yield list(zip(solved, adapters, strict=True))
        rest = [problem.weight - adapter.product() for problem, adapter in zip(problems, adapters, strict=True)]


def _objective(problem: LayerProblem, config: LRCConfig) -> Objective:
    streams = _streams(problem, config.dampening_frac)

    def measure(solved: QuantizedLinear, adapter: Adapter) -> float:
        return streams.energy(problem.weight - adapter.product(), solved.weight(problem.grid))

    return measure


def _told(problem: LayerProblem, found: QuantizedLinear, adapter: Adapter, config: LRCConfig) -> QuantizedLinear:
    """Add what was to be small to the report."""
    streams = _streams(problem, config.dampening_frac)
    signal = output_energy(problem.weight.double(), streams.full)
    before = streams.energy(problem.weight, round_nearest(problem).weight(problem.grid).to(problem.weight.dtype))
    target = {"target_loss": _objective(problem, config)(found, adapter), "target_loss_before": before}
    return replace(found, report={**found.report, **{key: loss_ratio(value, signal) for key, value in target.items()}})


def _streams(problem: LayerProblem, dampening_frac: float) -> TwoStreams:
    """Return the second moments of both inputs; siblings share them, and what is solved for with them.

    Raises:
        NumericalError: A statistic is not finite.
        UsageError: A statistic was not gathered.
    """
    key = ("lrc", dampening_frac)
    if key not in problem.memory:
        moments: dict[str, Float[Tensor, "in in"]] = {}
        for name in ("cross", "full_hessian"):
            found = problem.entries.get(name)
            if found is None:
                raise UsageError(
                    f"no `{name}` was gathered for `{problem.name}`", hint="qtool mitigate --propagate quantized"
                )
            if not bool(torch.isfinite(found).all()):
                raise NumericalError(
                    f"`{name}` of `{problem.name}` holds NaN or Inf",
                    hint="look for layers whose activations overflow in the calibration dtype",
                )
            moments[name] = found
        quantized, cross, full = problem.need_hessian(), moments["cross"], moments["full_hessian"]
        problem.memory[key] = TwoStreams.of(quantized, cross, full, dampening_frac)
    streams: TwoStreams = problem.memory[key]
    return streams
