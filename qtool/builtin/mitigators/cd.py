"""Coordinate descent on a frozen grid: QuantEase, Behdin et al. 2023, arXiv:2309.01885.

It takes the codes and the scales of the method to the left, and improves codes column by column, each in closed form.
Left out: QuantEase's sweeps without rounding, after which the loss may be higher, and the choice of the coordinate with
the largest gain of CDQuant, Nair and Suggala 2024, arXiv:2406.17542, which gives each row an order of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qtool.builtin.mitigators.rtn import check_problem, loss_report, round_nearest
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import UsageError
from qtool.numerics.coordinate_descent import coordinate_descent
from qtool.numerics.frozen_grid import FrozenColumns
from qtool.numerics.groups import each_parameter, from_groups
from qtool.scheme import GroupParameters


@dataclass(frozen=True)
class CDConfig:
    """Options of coordinate descent.

    Attributes:
        sweeps: Passes over all columns, at most.
        dampening_frac: Added to the Hessian diagonal, as a fraction of its mean: what cannot rise is the loss with it.
        act_order: Visit columns by descending Hessian diagonal.
        block_size: Columns per product.
    """

    sweeps: int = 3
    dampening_frac: float = 0.01
    act_order: bool = True
    block_size: int = 128

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range.
        """
        if not 1 <= self.sweeps <= 1000:
            raise UsageError(f"`sweeps` is from 1 to 1000, not {self.sweeps}", hint="--set sweeps=3")
        if not 0 <= self.dampening_frac <= 10:
            given = f"`dampening_frac` is from 0 to 10, not {self.dampening_frac}"
            raise UsageError(given, hint="--set dampening_frac=0.01")
        if self.block_size < 1:
            raise UsageError(f"`block_size` is a number of columns, not {self.block_size}", hint="--set block_size=128")


class CD:
    """Improve the codes that another method made."""

    version = 1
    needs: tuple[str, ...] = ("hessian",)
    Config = CDConfig

    def quantize(self, problem: LayerProblem, config: CDConfig) -> QuantizedLinear:
        """Improve one layer; a low-rank correction and outliers that it has already stay, and are reckoned with.

        Raises:
            NumericalError: The weight or the Hessian is not finite.
            UsageError: No method came first, or no Hessian was gathered.
        """
        if problem.previous is None:
            raise UsageError(
                "`cd` improves codes that another method made, so it cannot come first", hint="--method gptq+cd"
            )
        problem.need_hessian()
        check_problem(problem)
        return descend(problem, problem.previous, config)


def descend(problem: LayerProblem, start: QuantizedLinear, config: CDConfig) -> QuantizedLinear:
    """Improve the codes of a checked problem; the report has in addition what the passes did."""
    decoded, target = start.weight(problem.grid), problem.weight
    corrected = 0.0 if start.adapter is None else start.adapter.product()
    hessian = damped(problem.need_hessian(), config.dampening_frac)
    order = torch.argsort(problem.need_hessian().diagonal(), descending=True, stable=True)
    found = coordinate_descent(
        target - corrected,
        hessian,
        decoded,
        grid=frozen_columns(problem, start.parameters),
        sweeps=config.sweeps,
        order=order.tolist() if config.act_order else None,
        block_size=config.block_size,
        kept=None if start.outliers is None else start.outliers.places(decoded.shape[1]),
    )
    # Codes that stay do so even where another has the same value.
    codes = torch.where(found.values == decoded, start.codes, encoded(problem, found.values, start.parameters))
    values = found.values.to(decoded.dtype)
    told = "loss_rtn" in start.report
    measured = loss_report(problem, values + corrected, None if told else round_nearest(problem).weight(problem.grid))
    report = {
        **start.report,
        **({"loss_before": start.report["loss"]} if "loss" in start.report else {}),
        **measured,
        "sweeps": float(len(found.changes)),
        "changed_fraction": float((codes != start.codes).double().mean()),
    }
    return replace(start, codes=codes, report=report)


def damped(hessian: Float[Tensor, "in in"], dampening_frac: float) -> Float[Tensor, "in in"]:
    """Add a fraction of the mean live diagonal entry to all that are live."""
    live = hessian.diagonal() > 0
    if not dampening_frac or not bool(live.any()):
        return hessian
    hessian = hessian.clone()
    hessian.diagonal().add_(live * (dampening_frac * hessian.diagonal()[live].mean()))
    return hessian


def frozen_columns(problem: LayerProblem, parameters: tuple[GroupParameters, ...]) -> list[FrozenColumns]:
    """Return the problem's grid with the parameters that codes were chosen for, one a row and group."""
    n_out, n_in = problem.weight.shape
    parts = []
    for (columns, part), own in zip(problem.grid.places(n_in), parameters, strict=True):
        a_row_each = each_parameter(own, lambda one: one.reshape(-1, one.shape[-1]).expand(n_out, -1))
        first = 0
        for width, size in part.runs(columns.stop - columns.start):
            last = first + width // size
            run = each_parameter(a_row_each, itemgetter((slice(None), slice(first, last))))
            parts.append(FrozenColumns(width, size, run, part.format.round))
            first = last
    return parts


def encoded(
    problem: LayerProblem, values: Float[Tensor, "out in"], parameters: tuple[GroupParameters, ...]
) -> UInt8[Tensor, "out in"]:
    """Return the codes of values of the grid."""
    codes = []
    for (columns, part), own in zip(problem.grid.places(values.shape[1]), parameters, strict=True):
        part_values = values[:, columns]
        codes.append(from_groups(part.format.encode(part.groups(part_values), own), part_values.shape))
    return codes[0] if len(codes) == 1 else torch.cat(codes, dim=1)
