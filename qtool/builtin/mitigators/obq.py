"""OBQ, Frantar and Alistarh 2022, Optimal Brain Compression, arXiv:2208.11580: the greedy order that GPTQ gave up.

A reference for small layers, O(out · in³) in float64. Scales are fitted on the weight before anything is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from qtool.builtin.mitigators.cd import encoded, frozen_columns
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig, factor_key
from qtool.builtin.mitigators.rtn import ClipOptions, loss_report, refuse_previous, refuse_unknown
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import UsageError
from qtool.numerics.obq import obq_round

_WIDEST = 512


@dataclass(frozen=True)
class OBQConfig(ClipOptions):
    """Options of OBQ; those of the clip search come with them, as in GPTQ.

    Attributes:
        dampening_frac: Added to the Hessian diagonal, as a fraction of its mean. The paper's is 0; this is that of
            GPTQ, whose reference it is.
        order: Which weight of a row is next: the one that costs least (``greedy``), or for all rows the columns from
            left to right (``natural``) or by descending Hessian diagonal (``activation``), which makes it GPTQ.
    """

    dampening_frac: float = 0.01
    order: Literal["greedy", "natural", "activation"] = "greedy"
    clip: Literal["none", "search"] = "search"
    clip_norm: float = 2.0
    clip_grid: int = 20
    clip_metric: Literal["mse", "hessian", "output"] = "hessian"

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or an option would have no effect.
        """
        super().__post_init__()
        refuse_unknown("order", self.order, ("greedy", "natural", "activation"))
        _ = self.gptq

    @property
    def gptq(self) -> GPTQConfig:
        """What GPTQ is asked for the scales, and the factor in natural order."""
        return GPTQConfig(
            clip=self.clip,
            clip_norm=self.clip_norm,
            clip_grid=self.clip_grid,
            clip_metric=self.clip_metric,
            clip_floor=self.clip_floor,
            clip_ceiling=self.clip_ceiling,
            dampening_frac=self.dampening_frac,
            order="natural",
        )


class OBQ:
    """Round, weight by weight, what costs least; those that are left make up for it."""

    version = 1
    needs: tuple[str, ...] = ("hessian",)
    Config = OBQConfig

    def quantize(self, problem: LayerProblem, config: OBQConfig) -> QuantizedLinear:
        """Solve one small layer, from the scales and the factor that GPTQ has; falls back as GPTQ does.

        Raises:
            NumericalError: The weight or the Hessian is not finite.
            UsageError: The layer is too wide, another method came first, or no Hessian was gathered.
        """
        refuse_previous(problem, "obq")
        n_in = problem.weight.shape[1]
        if n_in > _WIDEST:
            raise UsageError(
                f"`obq` is for layers of up to {_WIDEST} inputs, which `{problem.name}` has more of",
                facts=(("weight", tuple(problem.weight.shape)),),
                hint="--method gptq",
            )
        start = GPTQ().quantize(problem, config.gptq)
        if start.counters["fallback_rtn"]:
            return start
        hessian = problem.need_hessian()
        upper = problem.memory[factor_key(problem, config.gptq)].upper.double()
        diagonal = hessian.diagonal()
        order = torch.argsort(diagonal, descending=True, stable=True).tolist()
        values, _ = obq_round(
            problem.weight.masked_fill(diagonal == 0, 0.0),
            upper.T @ upper,
            grid=frozen_columns(problem, start.parameters),
            order={"greedy": None, "natural": range(n_in), "activation": order}[config.order],
        )
        codes = encoded(problem, values, start.parameters)
        solved = replace(start, codes=codes)
        return replace(solved, report={**start.report, **loss_report(problem, solved.weight(problem.grid), None)})
