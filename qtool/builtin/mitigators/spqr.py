"""SpQR, Dettmers et al. 2023, arXiv:2306.03078: small groups, scales of two levels, and outliers in 16 bits.

The scheme says bits and groups; the paper's are ``int3-asym-g16`` and ``int4-asym-g16``. Zero points are real numbers,
without ``bilevel`` of 32 bits, or in the format of the scales where the scheme says ``real``.
With ``bilevel`` scales and zero points are codes of a few bits under ranges in float16, and the scheme's own format of
scales has no effect. The paper's bits a weight are ``b + (b_s + b_z) / g + 64 / (g · second_group) + 32 · outliers``.

Groups whose range has no code at 0 round small weights by up to half a step. With ``tau=none`` a model can come out
worse than rounded to nearest (``tiny``: 14.2 against 13.1 at INT4); that small weights in columns with large inputs are
the reason, as they are behind a norm that makes those large, was not tested.

Left out: the released code's order by activations, since it stores columns permuted. Its dampening of 1 is the default;
0.01, as in GPTQ, keeps more outliers and loses less (``tiny`` at INT3: 13.05 with 5.0 bits, 13.36 with 4.7).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from qtool.builtin.formats.integer import Integer
from qtool.builtin.mitigators.gptq import normalized
from qtool.builtin.mitigators.rtn import check_problem, loss_report, refuse_previous, round_nearest
from qtool.engine.grid import GridPart
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import NumericalError, UsageError
from qtool.numerics.outliers import Outliers
from qtool.numerics.scales import decode_scale, encode_scale, store_scale
from qtool.numerics.second_level import decode_second_level, fit_second_level
from qtool.numerics.spqr import RangeColumns, spqr_round
from qtool.numerics.triangular import InverseFactor, factorize_inverse
from qtool.scheme import GroupParameters


@dataclass(frozen=True)
class SpQRConfig:
    """Options of SpQR.

    Attributes:
        tau: Loss above which a weight stays in 16 bits, as a fraction of the mean loss of weights that are replaced by
            the mean of their column; ``none`` keeps no outliers.
        bilevel: Whether scales and zero points are codes themselves.
        scale_bits: Bits of a scale, with ``bilevel``.
        zero_bits: Bits of a zero point, with ``bilevel``.
        second_group: Neighbouring rows whose scales share a range, with ``bilevel``.
        dampening_frac: Added to the Hessian diagonal, as a fraction of its mean; the published 1 is far above GPTQ's.
    """

    tau: float | None = 0.2
    bilevel: bool = True
    scale_bits: int = 3
    zero_bits: int = 3
    second_group: int = 16
    dampening_frac: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or an option would have no effect.
        """
        if self.tau is not None and not 0 < self.tau < math.inf:
            raise UsageError(f"`tau` is above 0, or `none` for no outliers, not {self.tau}", hint="--set tau=0.2")
        for name in ("scale_bits", "zero_bits"):
            if not 1 <= getattr(self, name) <= 8:
                raise UsageError(f"`{name}` is from 1 to 8, not {getattr(self, name)}", hint=f"--set {name}=3")
        if not 2 <= self.second_group <= 255:
            given = f"`second_group` is from 2 to 255 rows, not {self.second_group}"
            raise UsageError(given, hint="--set second_group=16")
        if not 0 <= self.dampening_frac <= 10:
            given = f"`dampening_frac` is from 0 to 10, not {self.dampening_frac}"
            raise UsageError(given, hint="--set dampening_frac=1")
        second = (self.scale_bits, self.zero_bits, self.second_group)
        if not self.bilevel and second != (SpQRConfig.scale_bits, SpQRConfig.zero_bits, SpQRConfig.second_group):
            raise UsageError("the second level of scales has no effect without it", hint="--set bilevel=true")


class SpQR:
    """Round column by column as GPTQ; weights that cost too much stay in 16 bits."""

    version = 1
    needs: tuple[str, ...] = ("hessian",)
    Config = SpQRConfig

    def quantize(self, problem: LayerProblem, config: SpQRConfig) -> QuantizedLinear:
        """Solve one layer; where its Hessian says nothing or cannot be factorized, round to nearest and count it.

        Raises:
            NumericalError: The weight or the Hessian is not finite.
            UsageError: The scheme has no zero points for each row, another method came first, or no Hessian was
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
    if isinstance(part.format, Integer) and not scheme.symmetric and scheme.strategy != "tensor" and scheme.clip == 1:
        return
    raise UsageError(
        "`spqr` keeps the whole range of each group of a row by a zero point, so it rounds to asymmetric integers",
        facts=(("scheme", scheme),),
        hint="--weights int4-asym-g16",
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
            store=_storage(part, config),
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


def _storage(part: GridPart, config: SpQRConfig) -> Callable[[Tensor, Tensor], GroupParameters]:
    """Return what makes stored parameters of scales and zero points.

    Zero points are not derived from the scales as stored: with scales of 3 bits that loses more (up to 5 % at INT4).
    """

    def one_level(scale: Float[Tensor, "out groups"], zero_point: Float[Tensor, "out groups"]) -> GroupParameters:
        if part.scheme.real:
            zero_point = decode_scale(encode_scale(zero_point, part.scheme.scale), part.scheme.scale)
        return GroupParameters(store_scale(scale, part.scheme.scale), zero_point)

    def two_levels(scale: Float[Tensor, "out groups"], zero_point: Float[Tensor, "out groups"]) -> GroupParameters:
        scales = fit_second_level(scale, num_bits=config.scale_bits, block=config.second_group, positive=True)
        zeros = fit_second_level(zero_point, num_bits=config.zero_bits, block=config.second_group)
        decoded = decode_second_level(scales), decode_second_level(zeros)
        return GroupParameters(*decoded, scale_codes=scales, zero_point_codes=zeros)

    return two_levels if config.bilevel else one_level
