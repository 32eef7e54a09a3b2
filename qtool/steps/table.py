"""Measurements as a table: rows and columns by labels, means over seeds, the best of each column; no files, no text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from qtool.scheme import VECTORS
from qtool.steps.fairness import PROTOCOL, Mixture, protocols, unlike
from qtool.steps.intervals import quantile, standard_error
from qtool.steps.measurement import Measurement, better

Spread = Literal["auto", "none", "stderr", "ci"]
SPREADS: tuple[Spread, ...] = ("auto", "none", "stderr", "ci")
ROWS = ("transform", "mitigator")
SCHEMES = ("scheme", *VECTORS)
"""Columns in which a full-precision value belongs to all."""

Key = tuple[str, ...]
Place = tuple[Key, Key, str]


@dataclass(frozen=True)
class Layout:
    """What stands where.

    Attributes:
        rows: Labels that name a row; empty for transform and mitigator, and whatever else tells rows apart.
        columns: Labels that name a group of columns.
        metrics: One column each in every group.
        spread: What follows a value: ``ci`` a 95 % confidence interval, ``stderr`` the standard error, both over
            seeds where there are several and otherwise over windows; ``auto`` is ``ci`` over seeds and ``stderr``
            over windows.
        bits: Which stored bits per weight to show: ``linears``, ``model``.
    """

    rows: Key = ()
    columns: Key = ("scheme",)
    metrics: Key = ()
    spread: Spread = "auto"
    bits: Key = ("linears",)


@dataclass(frozen=True)
class Cell:
    """One place of a table.

    Attributes:
        members: The measurements that it is the mean of; they differ in their seeds.
        value: Their mean.
        error: Half width of the interval that the layout asks for; None where it is not known.
        best: Whether no other quantized cell of its column is better.
    """

    members: tuple[Measurement, ...]
    value: float
    error: float | None = None
    best: bool = False

    def bits(self, kind: str) -> float:
        """Return the stored bits per weight."""
        return fmean(one.bits[kind] for one in self.members)


@dataclass(frozen=True)
class Table:
    """A finished table; ``cells`` are by row, group of columns and metric, and not every place has one."""

    layout: Layout
    rows: tuple[Key, ...]
    columns: tuple[Key, ...]
    cells: Mapping[Place, Cell]

    def placed(self) -> Iterator[tuple[Key, Key, str, Cell]]:
        """Yield every cell with its place, row by row."""
        for row in self.rows:
            for column in self.columns:
                for metric in self.layout.metrics:
                    if (cell := self.cells.get((row, column, metric))) is not None:
                        yield row, column, metric, cell


def arrange(measurements: Sequence[Measurement], layout: Layout) -> Table:
    """Arrange measurements as a table.

    Rows and columns come in the order in which their labels first appear, full precision first. A full-precision
    value stands in every group of columns that differs by the scheme only.

    Raises:
        UsageError: A cell or column would mix what is not alike; names it, and the label that keeps it apart.
    """
    chosen = [one for one in measurements if one.metric in layout.metrics]
    chosen.sort(key=lambda one: not one.reference)
    rows = layout.rows or ROWS
    while (mixture := _mixture(chosen, replace(layout, rows=rows))) is not None:
        if layout.rows or not mixture.labels:
            raise mixture.refusal(rows)
        first = mixture.labels[0]
        rows = (first, *rows) if first == "model" else (*rows, first)
    layout = replace(layout, rows=rows)
    cells = {place: _cell(found, layout.spread) for place, found in _places(chosen, layout).items()}
    return Table(layout, _rows(chosen, layout), _columns(chosen, layout), _with_best(cells, layout))


def row_of(one: Measurement, layout: Layout) -> Key:
    """Return a measurement's row; what a consumer executed is a part of its name."""
    row = tuple(one.label(name) for name in layout.rows)
    executed = one.executed.partition(":")[0]
    return (*row[:-1], f"{row[-1]} (executed: {executed})") if executed else row


def _rows(measurements: Sequence[Measurement], layout: Layout) -> tuple[Key, ...]:
    """Return the rows: those with the same first label together, and so on, each label by its first appearance."""
    rows = list(dict.fromkeys(row_of(one, layout) for one in measurements))
    ranks = [list(dict.fromkeys(row[place] for row in rows)) for place in range(len(layout.rows))]
    return tuple(sorted(rows, key=lambda row: [rank.index(label) for rank, label in zip(ranks, row, strict=True)]))


def _columns(measurements: Sequence[Measurement], layout: Layout) -> tuple[Key, ...]:
    """Return the groups of columns: those of quantized values, and what full precision has of its own."""
    columns: dict[Key, None] = {}
    for one in sorted(measurements, key=lambda one: one.reference):
        if not (one.reference and any(_belongs(one, column, layout) for column in columns)):
            columns[tuple(one.label(name) for name in layout.columns)] = None
    return tuple(columns)


def _belongs(one: Measurement, column: Key, layout: Layout) -> bool:
    """Say whether a full-precision value stands in a group of columns."""
    free = {*SCHEMES, *(name for name in layout.columns if not one.label(name))}
    return all(name in free or one.label(name) == label for name, label in zip(layout.columns, column, strict=True))


def _places(measurements: Sequence[Measurement], layout: Layout) -> dict[Place, list[Measurement]]:
    """Return what comes together in each place."""
    columns = _columns(measurements, layout)
    places: dict[Place, list[Measurement]] = {}
    for one in measurements:
        own = tuple(one.label(name) for name in layout.columns)
        for column in columns:
            if _belongs(one, column, layout) if one.reference else column == own:
                places.setdefault((row_of(one, layout), column, one.metric), []).append(one)
    return places


def _mixture(measurements: Sequence[Measurement], layout: Layout) -> Mixture | None:
    """Return the first place that would mix what is not alike."""
    shown = (*layout.rows, *layout.columns)
    places = _places(measurements, layout)
    columns: dict[tuple[Key, str], list[Measurement]] = {}
    for (_, column, metric), members in places.items():
        columns.setdefault((column, metric), []).extend(members)
    for (column, metric), members in columns.items():
        if names := protocols(members, shown):
            return Mixture(f"the column `{' '.join((*column, metric))}`", names, tuple(members))
    for (row, column, _), members in places.items():
        names = unlike(members, shown)
        if names or len({one.label("seed") for one in members}) < len(members):
            return Mixture(f"the cell `{', '.join((*row, *column))}`", names, tuple(members))
    return None


def _cell(members: Sequence[Measurement], spread: Spread) -> Cell:
    values = [one.value for one in members]
    return Cell(tuple(members), fmean(values), _error(members, values, spread))


def _error(members: Sequence[Measurement], values: Sequence[float], spread: Spread) -> float | None:
    """Return the half width that follows a value."""
    several = len(values) > 1
    if spread == "none" or (not several and members[0].stderr is None):
        return None
    error = standard_error(values) if several else float(members[0].stderr or 0.0)
    if spread == "ci" or (spread == "auto" and several):
        return error * quantile((len(values) if several else members[0].samples) - 1)
    return error


def _with_best(cells: Mapping[Place, Cell], layout: Layout) -> dict[Place, Cell]:
    """Mark the best quantized cells of each column, among those of one model and protocol, where there are several."""
    rivals: dict[Key, list[Place]] = {}
    for place, cell in cells.items():
        one = cell.members[0]
        if not one.reference:
            alike = (one.label(name) for name in layout.rows if name in PROTOCOL)
            rivals.setdefault((*place[1], place[2], *alike), []).append(place)
    marked = dict(cells)
    for places in rivals.values():
        if len(places) > 1 and (direction := better(places[0][2])):
            values = [cells[place].value for place in places]
            best = min(values) if direction == "lower" else max(values)
            marked |= {place: replace(cells[place], best=True) for place in places if cells[place].value == best}
    return marked
