"""GPTQ with an intrinsic low-rank correction, arXiv:2606.01412: codes leave to the correction what it can take over.

With ``V_r`` the leading eigenvectors of ``H``, the correction ``(W - Ŵ) V_r V_rᵀ`` leaves nothing of the error along
them. So the codes need not see them: GPTQ runs on ``H⊥ = (I - V_r V_rᵀ) H (I - V_r V_rᵀ)``, and what it minimizes
is what both lose together. As ``H⊥`` has no large directions left, errors have more room to go to.

For the same codes ``qera`` loses no more, and comes behind (``finish=qera``) unless it is turned off: then the factor
that reads, ``V_rᵀ``, is the same for all linears of a site, though each stores its own. CALDERA names the same
downdate among its options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from qtool.builtin.mitigators.alternation import JointConfig, solve_corrected, solved_beside
from qtool.builtin.mitigators.gptq import GPTQ
from qtool.builtin.mitigators.lorc import stored_adapter
from qtool.builtin.mitigators.rtn import refuse_unknown
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.numerics.lowrank import leading_eigenvectors, projected_out, weighted_truncation


@dataclass(frozen=True)
class IntrinsicConfig(JointConfig):
    """Options of the intrinsic correction.

    Attributes:
        finish: What the correction is in the end: the error along the leading eigenvectors, or ``qera``'s.
    """

    finish: Literal["none", "qera"] = "qera"

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or two options exclude each other.
        """
        super().__post_init__()
        refuse_unknown("finish", self.finish, ("none", "qera"))


@dataclass(frozen=True)
class _Downdated:
    """The leading eigenvectors of a Hessian, what they leave of it, and what is remembered of that."""

    leading: Float[Tensor, "in rank"]
    hessian: Float[Tensor, "in in"]
    memory: dict[Any, Any]


class Intrinsic:
    """Round column by column under what a low-rank correction leaves of the Hessian, and add that correction."""

    version = 1
    needs: tuple[str, ...] = ("hessian",)
    Config = IntrinsicConfig

    def quantize(self, problem: LayerProblem, config: IntrinsicConfig) -> QuantizedLinear:
        """Solve one layer; where nothing is left of its Hessian, round to nearest and count it.

        Raises:
            NumericalError: The weight or the Hessian is not finite, or a factor overflows its storage format.
            UsageError: The rank is larger than the weight, another method came first, or no Hessian was gathered.
        """
        return self.quantize_siblings([problem], config)[0]

    def quantize_siblings(self, problems: Sequence[LayerProblem], config: IntrinsicConfig) -> list[QuantizedLinear]:
        """Solve the layers of one site as one: they share the eigenvectors and the factor."""
        return solve_corrected(
            problems,
            config,
            "intrinsic",
            codes_alone=partial(GPTQ().quantize_siblings, config=config),
            together=partial(_together, config=config),
        )


def _together(problems: Sequence[LayerProblem], config: IntrinsicConfig) -> list[QuantizedLinear]:
    """Choose the codes under what a correction leaves of the Hessian, then the corrections."""
    left = _downdated(problems[0], config.rank)
    apart = [replace(problem, hessian=left.hessian, memory=left.memory) for problem in problems]
    solved = GPTQ().quantize_siblings(apart, config)
    return [_corrected(problem, config, one, left) for problem, one in zip(problems, solved, strict=True)]


def _corrected(
    problem: LayerProblem, config: IntrinsicConfig, solved: QuantizedLinear, left: _Downdated
) -> QuantizedLinear:
    """Add the correction of the codes' error."""
    error = problem.weight - solved.weight(problem.grid)
    if config.finish == "qera":
        factors = weighted_truncation(error, problem.need_hessian(), config.rank, seed=problem.seed)
    else:
        leading = left.leading.to(error.dtype)
        factors = error @ leading, leading.T.contiguous()
    return solved_beside(problem, solved, stored_adapter(problem, config, factors))


def _downdated(problem: LayerProblem, rank: int) -> _Downdated:
    """Return what siblings share; made for the first of them."""
    key = ("intrinsic", rank)
    if key not in problem.memory:
        hessian = problem.need_hessian()
        leading = leading_eigenvectors(hessian, rank)
        problem.memory[key] = _Downdated(leading, projected_out(hessian, leading), {})
    found: _Downdated = problem.memory[key]
    return found
