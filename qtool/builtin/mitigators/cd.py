"""Coordinate descent on a frozen grid: QuantEase, arXiv:2309.01885, and CDQuant, arXiv:2406.17542.

It takes the codes and the scales of the method to the left, and improves one code at a time, each in closed form.
QuantEase (Behdin et al. 2023) goes column by column, in some sweeps without rounding (``relax_every=3``, with 30 sweeps
in the paper); CDQuant (Nair and Suggala 2024) changes the code of each row that gains most (``visits=greedy``). Left
out: QuantEase's outliers, which are ``spqr``'s task, and CDQuant's changes of two codes at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qtool.builtin.mitigators.rtn import check_problem, loss_report, refuse_unknown, round_nearest
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import UsageError
from qtool.numerics.coordinate_descent import Route, coordinate_descent
from qtool.numerics.frozen_grid import FrozenColumns
from qtool.numerics.greedy_descent import greedy_descent
from qtool.numerics.groups import each_parameter, from_groups
from qtool.numerics.losses import lasting
from qtool.scheme import GroupParameters


@dataclass(frozen=True)
class CDConfig:
    """Options of coordinate descent.

    Attributes:
        sweeps: Passes over all columns, at most; of ``greedy``, as many changes in each row.
        dampening_frac: Added to the Hessian diagonal, as a fraction of its mean: what cannot rise is the loss with it.
        visits: Which column is next: by descending Hessian diagonal (``activation``), from left to right (``natural``),
            or in each row the one that gains most (``greedy``).
        relax_every: Each sweep with a number that this divides leaves its values unrounded, but the last; 0 for none.
        block_size: Columns per product; of no meaning for ``greedy``.
    """

    sweeps: int = 3
    dampening_frac: float = 0.01
    visits: Literal["activation", "natural", "greedy"] = "activation"
    relax_every: int = 0
    block_size: int = 128

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or two options exclude each other.
        """
        refuse_unknown("visits", self.visits, ("activation", "natural", "greedy"))
        if self.relax_every < 0 or self.relax_every == 1:
            given = f"`relax_every` is 0 or at least 2, not {self.relax_every}"
            raise UsageError(given, hint="--set relax_every=3 --set sweeps=30")
        if self.relax_every and self.visits == "greedy":
            given = "sweeps without rounding go column by column, not to what gains most"
            raise UsageError(given, hint=f"--set relax_every={self.relax_every} --set visits=activation")
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
    given = target - corrected, damped(problem.need_hessian(), config.dampening_frac), decoded
    grid = frozen_columns(problem, start.parameters)
    kept = None if start.outliers is None else start.outliers.places(decoded.shape[1])
    if config.visits == "greedy":
        found = greedy_descent(*given, grid=grid, sweeps=config.sweeps, kept=kept)
    else:
        order = torch.argsort(problem.need_hessian().diagonal(), descending=True, stable=True)
        route = Route(
            sweeps=config.sweeps,
            order=order.tolist() if config.visits == "activation" else None,
            relax_every=config.relax_every,
        )
        found = coordinate_descent(*given, grid=grid, route=route, block_size=config.block_size, kept=kept)
    # Codes that stay do so even where another has the same value.
    codes = torch.where(found.values == decoded, start.codes, encoded(problem, found.values, start.parameters))
    values = found.values.to(decoded.dtype)
    told = "loss_rtn" in start.report
    measured = loss_report(problem, values + corrected, None if told else round_nearest(problem).weight(problem.grid))
    report = {
        **lasting(start.report),
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
