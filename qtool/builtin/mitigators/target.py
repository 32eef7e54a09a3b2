"""Ridge target: weights aim at the outputs in full precision, from the inputs that the quantized model has.

``‖Ŵ x - W f‖²``, with ``x`` the input in the model quantized so far and ``f`` that in full precision, is
``tr((Ŵ - V) H (Ŵ - V)ᵀ)`` and what no ``Ŵ`` changes, for ``V = W C H⁻¹``, ``H`` = E x xᵀ and ``C`` = E f xᵀ. So any
method to the right works as it is once it is given ``V`` for its weight. All the way is too far where tokens are few:
``W`` moves by the part ``alpha`` of the way, by default the part that is best on the windows that were held out. GPTAQ
(arXiv:2504.02692) and Qronos (arXiv:2505.11695) have the same aim.

The linears of a block have to be solved one stage after the other (``true_sequential``, the default here). From one
pass each would correct again what those before it have corrected (measured in ``recipes/README.md``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.builtin.mitigators.rtn import check_problem, loss_report, refuse_previous, round_nearest
from qtool.engine.problem import LayerProblem
from qtool.errors import NumericalError, UsageError
from qtool.numerics.losses import loss_ratio, output_energy
from qtool.numerics.two_streams import divided

CROSS, HELD_OUT = "cross", "held_out"


@dataclass(frozen=True)
class TargetConfig:
    """Options of the ridge target.

    Attributes:
        alpha: Part of the way to the target; none for the part that is best on held-out windows, at each linear.
        ridge: Added to the diagonal of ``H``, as a fraction of its mean.
    """

    alpha: float | None = None
    ridge: float = 0.01

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range.
        """
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UsageError(f"`alpha` is from 0 to 1, not {self.alpha:g}", hint="--set alpha=0.5")
        if not 0 <= self.ridge <= 10:
            raise UsageError(f"`ridge` is from 0 to 10, not {self.ridge:g}", hint="--set ridge=0.01")

    @property
    def needs(self) -> tuple[str, ...]:
        """Held-out moments, where they decide."""
        return (HELD_OUT,) if self.alpha is None else ()


class Target:
    """Move the weight to where the quantized inputs give the outputs of full precision."""

    version = 1
    needs: tuple[str, ...] = ("hessian", CROSS)
    Config = TargetConfig

    def retarget(self, problem: LayerProblem, config: TargetConfig) -> LayerProblem:
        """Return the problem with another weight; ``target_alpha`` and ``target_shift`` say how far it went.

        ``loss_before`` is what the weight as it was, rounded to nearest, loses of what is aimed at.

        Raises:
            NumericalError: A moment is not finite.
            UsageError: A method that rounds came first, or a moment was not gathered.
        """
        refuse_previous(problem, "target")
        check_problem(problem)
        hessian, cross = problem.need_hessian(), _entry(problem, CROSS)
        shift = problem.weight.double() @ _bias(problem, config, hessian.double(), cross.double(), "all")
        alpha = config.alpha
        if alpha is None:
            held_hessian, held_cross = _entry(problem, HELD_OUT).double()
            rest = (hessian.double() - held_hessian, cross.double() - held_cross)
            tried = problem.weight.double() @ _bias(problem, config, *rest, "not held out")
            alpha = best_part(problem.weight.double(), tried, held_hessian, held_cross)
        weight = (problem.weight.double() + alpha * shift).to(problem.weight.dtype)
        moved = loss_ratio(output_energy(weight - problem.weight, hessian), output_energy(problem.weight, hessian))
        aimed = replace(problem, weight=weight)
        before = loss_report(aimed, round_nearest(problem).weight(problem.grid), None)["loss"]
        report = {**problem.report, "target_alpha": alpha, "target_shift": moved, "loss_before": before}
        return replace(aimed, report=report)


def best_part(
    weight: Float[Tensor, "out in"],
    shift: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    cross: Float[Tensor, "in in"],
) -> float:
    """Return the ``alpha`` from 0 to 1 with the least ``‖(W + alpha S) x - W f‖²`` of inputs with these moments."""
    gain = (weight @ (cross - hessian) * shift).sum()
    cost = (shift @ hessian * shift).sum()
    return float((gain / cost).clamp(0, 1)) if cost > 0 else 0.0


def _bias(problem: LayerProblem, config: TargetConfig, hessian: Tensor, cross: Tensor, which: str) -> Tensor:
    """Return ``(C - H) (H + λI)⁻¹``, once for all linears of a site."""
    key = ("target", which, config.ridge)
    if key not in problem.memory:
        problem.memory[key] = divided(cross - hessian, hessian, config.ridge)
    bias: Tensor = problem.memory[key]
    return bias


def _entry(problem: LayerProblem, name: str) -> Tensor:
    entry = problem.entries.get(name)
    if entry is None:
        raise UsageError(
            f"no `{name}` was gathered for `{problem.name}`: `target` looks at full precision too",
            hint="--propagate quantized",
        )
    if not bool(torch.isfinite(entry).all()):
        raise NumericalError(
            f"`{name}` of `{problem.name}` holds NaN or Inf",
            hint="look for layers whose activations overflow in the calibration dtype",
        )
    return entry
