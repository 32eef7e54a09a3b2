"""SpQR, Dettmers et al. 2023, arXiv:2306.03078: small groups, scales of two levels, and outliers in 16 bits.

The scheme says all but the outliers; the paper's are ``int3-asym-g16-sfp16-scales3g16`` and the same of INT4, which the
schemes ``SpQR-W3A16`` and ``SpQR-W4A16`` stand for. Zero points are real numbers: codes, as there, or ``real`` ones.
The paper's bits a weight are ``b + (b_s + b_z) / g + 64 / (g · rows) + 32 · outliers``.

Groups whose range has no code at 0 round small weights by up to half a step. With ``tau=none`` a model can come out
worse than rounded to nearest (``tiny``: 14.2 against 13.1 at INT4); that small weights in columns with large inputs are
the reason, as they are behind a norm that makes those large, was not tested.

Left out: the released code's order by activations, since it stores columns permuted. Its dampening of 1 is the default;
0.01, as in GPTQ, keeps more outliers and loses less (``tiny`` at INT3: 13.05 with 5.0 bits, 13.36 with 4.7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from jaxtyping import Bool
from torch import Tensor

from qtool.builtin.formats.integer import Integer
from qtool.builtin.mitigators.gptq import normalized
from qtool.builtin.mitigators.rtn import check_problem, loss_report, refuse_previous, round_nearest
from qtool.engine.grid import GridPart
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import NumericalError, UsageError
from qtool.numerics.outliers import Outliers
from qtool.numerics.spqr import RangeColumns, spqr_round
from qtool.numerics.triangular import InverseFactor, factorize_inverse


@dataclass(frozen=True)
class SpQRConfig:
    """Options of SpQR.

    Attributes:
        tau: Loss above which a weight stays in 16 bits, as a fraction of the mean loss of weights that are replaced by
            the mean of their column; ``none`` keeps no outliers.
        dampening_frac: Added to the Hessian diagonal, as a fraction of its mean; the published 1 is far above GPTQ's.
    """

    tau: float | None = 0.2
    dampening_frac: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range.
        """
        if self.tau is not None and not 0 < self.tau < math.inf:
            raise UsageError(f"`tau` is above 0, or `none` for no outliers, not {self.tau}", hint="--set tau=0.2")
        if not 0 <= self.dampening_frac <= 10:
            given = f"`dampening_frac` is from 0 to 10, not {self.dampening_frac}"
            raise UsageError(given, hint="--set dampening_frac=1")


class SpQR:
    """Round column by column as GPTQ; weights that cost too much stay in 16 bits."""

    version = 2
    needs: tuple[str, ...] = ("hessian",)
    Config = SpQRConfig

    def quantize(self, problem: LayerProblem, config: SpQRConfig) -> QuantizedLinear:
        """Solve one layer; where its Hessian says nothing or cannot be factorized, round to nearest and count it.

        Raises:
            NumericalError: The weight or the Hessian is not finite.
            UsageError: The scheme has no real zero points for each row, another method came first, or no Hessian was
                gathered.
        """
        refuse_previous(problem, "spqr")
        hessian = problem.need_hessian()
        check_problem(problem)
        for part in problem.grid.parts:
            _refuse_other_schemes(part)
        nearest, dead = round_nearest(problem), hessian.diagonal() == 0
        factor = _factor(problem, dead, config.dampening_frac)
        # The model is more useful with plainly rounded layers than not at all; the counter tells.
        solved = nearest if factor is None else _solve(problem, factor, dead, config)
        counters = {
            "dead_columns": int(dead.sum()),
            "raised_dampening": int(factor is not None and factor.dampening_frac > config.dampening_frac),
            "float64_factors": int(factor is not None and factor.wide),
            "fallback_rtn": int(factor is None),
        }
        losses = loss_report(problem, solved.weight(problem.grid), nearest.weight(problem.grid))
        report = {**losses, **solved.report}
        return QuantizedLinear(solved.codes, solved.parameters, None, report, counters, solved.outliers)


def _refuse_other_schemes(part: GridPart) -> None:
    scheme = part.scheme
    real = not scheme.symmetric and (scheme.real or scheme.scale_bits is not None)
    if isinstance(part.format, Integer) and real and scheme.strategy != "tensor" and scheme.clip == 1:
        return
    name = scheme.format if isinstance(part.format, Integer) else "int4"
    size = f"g{scheme.group_size}" if scheme.strategy == "group" else "g16"
    raise UsageError(
        "`spqr` keeps the whole range of each group of a row: asymmetric integers with real zero points",
        facts=(("scheme", scheme),),
        hint=f"--weights {name}-asym-{size}-sfp16-scales3g16, as published, or {name}-asym-{size}-real",
    )


def _factor(problem: LayerProblem, dead: Bool[Tensor, " in"], dampening_frac: float) -> InverseFactor | None:
    """Factorize the Hessian, in which dead inputs have a second moment of about the size of the others.

    Returns:
        The factor, also for the siblings; None if there is none, or no input was ever live.
    """
    key = ("spqr", dampening_frac)
    if key not in problem.memory:
        try:
            hessian = normalized(problem).need_hessian().to(problem.weight.dtype, copy=True)
            hessian.diagonal().masked_fill_(dead, 1.0)
            problem.memory[key] = factorize_inverse(hessian, dampening_frac)
        except NumericalError:
            problem.memory[key] = None
    found: InverseFactor | None = problem.memory[key]
    return found


def _solve(
    problem: LayerProblem, factor: InverseFactor, dead: Bool[Tensor, " in"], config: SpQRConfig
) -> QuantizedLinear:
    """Run the loop on the problem's grid."""
    grid = [
        RangeColumns(
            columns=columns.stop - columns.start,
            group_size=part.scheme.group_size or columns.stop - columns.start,
            num_bits=part.format.bits,
            fit=partial(part.fit, global_scale=None),
        )
        for columns, part in problem.grid.places(problem.weight.shape[1])
    ]
    alive = problem.weight.masked_fill(dead, 0.0)
    found = spqr_round(alive, factor.upper, grid=grid, tau=math.inf if config.tau is None else config.tau)
    report = {
        "dampening_frac": factor.dampening_frac,
        "outlier_fraction": float(found.outliers.double().mean()),
    }
    outliers = None if config.tau is None else Outliers.of(found.values, found.outliers)
    return QuantizedLinear(found.codes, found.parameters, report=report, outliers=outliers)
