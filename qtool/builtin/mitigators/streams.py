"""What the methods share that look at both streams: the full-precision model's and that of the one quantized so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.builtin.mitigators.gptq import CROSS, GPTQConfig, Steer, solve_siblings
from qtool.builtin.mitigators.rtn import round_nearest
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import NumericalError, ShapeError, UsageError
from qtool.numerics.losses import loss_ratio, output_energy
from qtool.numerics.triangular import InverseFactor


def solve_with_cross(
    problems: Sequence[LayerProblem], config: GPTQConfig, method: str, steer: Steer
) -> list[QuantizedLinear]:
    """Solve the layers of one site as one, as ``solve_siblings`` does.

    The report says in addition how far outputs are from those of the full-precision stream: ``loss_cross`` and
    ``loss_cross_rtn``, ``tr(V H Vᵀ) − 2 tr(W (C − H) Vᵀ)`` over ``tr(W H Wᵀ)`` with ``V = Ŵ − W``. What is left out is
    the same for all codes, so it may be negative.

    Raises:
        NumericalError: The weight or a moment is not finite.
        UsageError: Another method came first, or a moment was not gathered.
    """
    for problem in problems:
        _check_cross(problem)
    results = solve_siblings(problems, config, method, steer)
    return [
        replace(result, report={**result.report, **_cross_losses(problem, result)})
        for problem, result in zip(problems, results, strict=True)
    ]


def visited_deviation(problem: LayerProblem, factor: InverseFactor) -> Float[Tensor, "in in"]:
    """Return ``D = C − H`` in the order of the factor."""
    dtype = factor.upper.dtype
    return factor.visited(problem.entries[CROSS].to(dtype) - problem.need_hessian().to(dtype))


def _check_cross(problem: LayerProblem) -> None:
    hessian, cross = problem.need_hessian(), problem.entries.get(CROSS)
    if cross is None:
        raise UsageError(
            f"no `{CROSS}` was gathered for `{problem.name}`: the method looks at the full-precision stream too",
            hint="--method gptq",
        )
    if cross.shape != hessian.shape:
        raise ShapeError(
            f"`{CROSS}` of `{problem.name}` does not fit its Hessian",
            facts=(("hessian", tuple(hessian.shape)), (CROSS, tuple(cross.shape))),
        )
    if not bool(torch.isfinite(cross).all()):
        raise NumericalError(
            f"`{CROSS}` of `{problem.name}` holds NaN or Inf",
            hint="look for layers whose activations overflow in the calibration dtype",
        )


def _cross_losses(problem: LayerProblem, result: QuantizedLinear) -> dict[str, float]:
    hessian, weight = problem.need_hessian(), problem.weight
    pull = weight @ (problem.entries[CROSS] - hessian).to(weight.dtype)
    signal = output_energy(weight, hessian)

    def loss(decoded: Tensor) -> float:
        change = decoded.to(weight.dtype) - weight
        return loss_ratio(output_energy(change, hessian) - 2 * float((pull * change).sum(dtype=torch.float64)), signal)

    nearest = round_nearest(problem).weight(problem.grid)
    return {"loss_cross": loss(result.weight(problem.grid)), "loss_cross_rtn": loss(nearest)}
