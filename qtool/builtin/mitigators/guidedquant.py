"""GuidedQuant, Kim et al. 2025, arXiv:2505.07004: GPTQ on Hessians that know what an error of each output costs.

Rows come in contiguous groups. Each has a Hessian of its own, H_k = Σ_t s_tk x_t x_tᵀ with the saliency s_tk of token t
at the group's outputs, and is solved by itself. So scales, too, are fitted to the group's rows only, and clipped by its
Hessian. Left out: the paper's own solver for layers, LNQ, which is of non-uniform codebooks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.rtn import check_problem, loss_report, refuse_previous, round_nearest, tensor_multipliers
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import SchemeError, ShapeError, UsageError
from qtool.numerics.groups import combine_parameters
from qtool.numerics.losses import loss_ratio, output_energy
from qtool.numerics.saliency import row_groups
from qtool.scheme import GroupParameters

GUIDED = "guided_hessians"


class GuidedQuant:
    """Solve groups of rows one by one, each with the Hessian of its tokens' saliency."""

    version = 1
    needs: tuple[str, ...] = ("hessian", "saliency", GUIDED)
    Config = GPTQConfig

    def quantize(self, problem: LayerProblem, config: GPTQConfig) -> QuantizedLinear:
        """Solve one layer; rows whose Hessian says nothing or cannot be factorized are rounded to nearest and counted.

        Raises:
            NumericalError: The weight or a Hessian is not finite.
            SchemeError: All rows share a scale.
            ShapeError: The Hessians do not fit the weight.
            UsageError: Another method came first, or no Hessians were gathered.
        """
        refuse_previous(problem, "guidedquant")
        problem.need_hessian()
        check_problem(problem)
        hessians = problem.entries.get(GUIDED)
        if hessians is None:
            raise UsageError(
                f"no saliency was gathered for `{problem.name}`", hint="qtool calibrate MODEL --gather hessian,saliency"
            )
        if any(part.shares_rows for part in problem.grid.parts):
            raise SchemeError(
                "rows share a scale, and `guidedquant` fits those of each group of rows by themselves",
                facts=(("scheme", problem.grid.parts[0].scheme),),
                hint="--weights int4-sym-channel",
            )
        n_out, n_in = problem.weight.shape
        groups = row_groups(n_out, len(hessians))
        if hessians.shape != (len(groups), n_in, n_in):
            raise ShapeError(
                f"the Hessians of `{problem.name}` do not fit its weight",
                facts=(("weight", tuple(problem.weight.shape)), ("hessians", tuple(hessians.shape))),
            )
        multipliers = tensor_multipliers(problem)
        problems = [
            replace(problem, weight=problem.weight[rows], hessian=own, global_scales=multipliers, memory={})
            for rows, own in zip(groups, hessians, strict=True)
        ]
        return _joined(problem, problems, [GPTQ().quantize(one, config) for one in problems])


def _joined(problem: LayerProblem, problems: list[LayerProblem], results: list[QuantizedLinear]) -> QuantizedLinear:
    """Put groups of rows together; the report is of the whole layer, and of what the groups were solved for."""
    codes = torch.cat([one.codes for one in results])
    parameters = tuple(_stacked(part) for part in zip(*(one.parameters for one in results), strict=True))
    counters: Counter[str] = Counter()
    for one in results:
        counters.update(one.counters)
    counters["dead_columns"] = int((problem.need_hessian().diagonal() == 0).sum())
    whole = QuantizedLinear(codes, parameters, counters={name: counters[name] for name in results[0].counters})
    nearest = round_nearest(problem).weight(problem.grid)
    report = {name: _mean(problems, results, name) for name in ("clipped_fraction", "mean_clip")}
    report["dampening_frac"] = max(one.report.get("dampening_frac", 0.0) for one in results)
    return replace(
        whole,
        report={
            **loss_report(problem, whole.weight(problem.grid), nearest),
            "loss_guided": _guided_loss(problems, results),
            **report,
        },
    )


def _stacked(parts: tuple[GroupParameters, ...]) -> GroupParameters:
    """Put the parameters of groups of rows under each other; the tensor-level multiplier is one for all."""
    return combine_parameters(parts, torch.cat)


def _mean(problems: list[LayerProblem], results: list[QuantizedLinear], name: str) -> float:
    rows = [len(one.weight) for one in problems]
    return sum(n * one.report[name] for n, one in zip(rows, results, strict=True)) / sum(rows)


def _guided_loss(problems: list[LayerProblem], results: list[QuantizedLinear]) -> float:
    """Return Σ_k tr(E_k H_k E_kᵀ) / Σ_k tr(W_k H_k W_kᵀ), every group's Hessian as it was given."""
    decoded = [one.weight(group.grid) for group, one in zip(problems, results, strict=True)]
    errors = sum(output_energy(one.weight - new, one.hessian) for one, new in zip(problems, decoded, strict=True))
    return loss_ratio(errors, sum(output_energy(one.weight, one.hessian) for one in problems))
