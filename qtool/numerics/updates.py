"""What rounding a column adds to later ones: error feedback, and a linear term that some methods add to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.numerics.replay import pays, replayed_columns
from qtool.numerics.triangular import InverseFactor
from qtool.scheme import GroupParameters

RoundColumns: TypeAlias = Callable[[Tensor, GroupParameters], Tensor]
"""``round(values [out, columns], parameters)`` returns the nearest values of a grid in the same dtype."""


@dataclass(frozen=True)
class Updates:
    """What rounded columns add to later ones.

    Attributes:
        columns: The solver's.
        feedback: ``U_jk / U_jj`` above the diagonal.
        extra: Matrix of the linear term, if there is one.
        base: The columns before any update, if the term asks for the drift.
        errors: Room for what each column is off where it started, if the residuals alone do not tell the loss; until a
            column is noted, where it started.
    """

    columns: Float[Tensor, "in out"]
    feedback: Float[Tensor, "in in"]
    extra: Float[Tensor, "in in"] | None = None
    base: Float[Tensor, "in out"] | None = None
    errors: Float[Tensor, "in out"] | None = None

    @classmethod
    def of(cls, factor: InverseFactor, columns: Float[Tensor, "in out"]) -> Updates:
        """Return the updates of a factor, for columns that are updated in place from now on."""
        term = factor.term
        if term is None:
            return cls(columns, factor.feedback())
        base = columns.clone() if term.drift else None
        return cls(columns, factor.feedback(), term.matrix, base, columns.clone())

    def fed(self, source: slice) -> Float[Tensor, "columns out"]:
        """Return what the linear term reads of columns just before they are rounded."""
        return self.columns[source] if self.base is None else self.columns[source] - self.base[source]

    def round(
        self,
        source: slice,
        made: Float[Tensor, "columns out"],
        rounds: Sequence[RoundColumns],
        parameters: Sequence[GroupParameters],
    ) -> None:
        """Round a run of columns one by one, each of which updates the others, and write what is left to ``made``."""
        panel = self.columns[source]
        extra = None if self.extra is None else self.extra[source, source]
        base = None if self.base is None else self.base[source]
        given = panel, self.feedback[source, source], extra, base
        if pays(panel) and rounds.count(rounds[0]) == len(rounds):
            solved, left = replayed_columns(_solved_panel, rounds[0])(parameters, *given)
            panel.copy_(solved)
            made.copy_(left)
        else:
            _solve_panel(made, zip(rounds, parameters, strict=True), *given)

    def add(
        self, onto: Float[Tensor, "later out"], source: slice, target: slice, made: Float[Tensor, "columns out"]
    ) -> None:
        """Add what rounding ``source`` does to ``target``, of which ``onto`` are the columns or a copy."""
        onto.addmm_(self.feedback[source, target].T, made, alpha=-1)
        if self.extra is not None:
            onto.addmm_(self.extra[source, target].T, self.fed(source))

    def note(self, source: slice, made: Float[Tensor, "columns out"]) -> None:
        """Note the errors of columns whose residuals are known."""
        if self.errors is not None:
            self.errors[source] += made - self.columns[source]


def _solve_panel(
    made: Float[Tensor, "columns out"],
    grids: Iterable[tuple[RoundColumns, GroupParameters]],
    panel: Float[Tensor, "columns out"],
    feedback: Float[Tensor, "columns columns"],
    extra: Float[Tensor, "columns columns"] | None,
    base: Float[Tensor, "columns out"] | None,
) -> None:
    """Update a run of columns in place, and write to ``made`` what rounding leaves of each.

    ``feedback`` is 0 up to the column's own entry, so that columns already rounded stay as they are.
    """
    each = zip(panel.unsqueeze(-1).unbind(), made.unbind(), feedback.unbind(), grids, strict=True)
    for place, (column, residual, spread, (rounded, parameters)) in enumerate(each):
        torch.sub(column, rounded(column, parameters), out=residual.unsqueeze(-1))
        panel.addr_(spread, residual, alpha=-1)
        if extra is not None:
            panel.addr_(extra[place], panel[place].clone() if base is None else panel[place] - base[place])


def _solved_panel(
    rounded: RoundColumns,
    parameters: Sequence[GroupParameters],
    panel: Float[Tensor, "columns out"],
    feedback: Float[Tensor, "columns columns"],
    extra: Float[Tensor, "columns columns"] | None,
    base: Float[Tensor, "columns out"] | None,
) -> tuple[Tensor, Tensor]:
    """Return a run of columns as ``_solve_panel`` updates it, and what rounding leaves of each."""
    made = torch.empty_like(panel)
    _solve_panel(made, ((rounded, own) for own in parameters), panel, feedback, extra, base)
    return panel, made
