"""What stands below a table: how its values were measured and made, what was executed, and models' footnotes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qtool.steps.measurement import Measurement
from qtool.steps.table import Table, row_of

MADE_FROM = ("calibration", "propagate", "token_weight")
"""Labels of what quantized values were made from, where statistics were used at all."""


def notes_of(table: Table) -> tuple[str, ...]:
    """Return the notes, each one sentence without a full stop."""
    placed = list(table.placed())
    members = [one for *_, cell in placed for one in cell.members]
    found = (
        *_protocols(table, members),
        *_origins(table, members),
        *_errors(table),
        *_sizes(table, members),
        *(("bold: the best of its column",) if any(cell.best for *_, cell in placed) else ()),
        *(f"executed: {one.executed}" for one in members if one.executed),
        *(f"{one.label('model')}: {one.label('footnote')}" for one in members if one.label("footnote")),
    )
    return tuple(dict.fromkeys(found))


def _protocols(table: Table, members: list[Measurement]) -> Iterator[str]:
    """Yield how each metric was measured, without what rows and columns show."""
    for metric in table.layout.metrics:
        alike = [one for one in members if one.metric == metric]
        names = dict.fromkeys(name for one in alike for name in one.protocol)
        facts = {name: _only(one.label(name) for one in alike) for name in names}
        said = ", ".join(f"{name} {text}" for name, text in facts.items() if text)
        yield f"{metric}: {said}" if said else metric


def _origins(table: Table, members: list[Measurement]) -> Iterator[str]:
    """Yield what quantized values were made from: once where it is the same for all, otherwise which rows from what."""
    made = [one for one in members if one.label("token_weight")]
    shared = {name: _only(one.label(name) for one in made) for name in MADE_FROM}
    if any(shared.values()):
        yield "made from: " + ", ".join(f"{name} {text}" for name, text in shared.items() if text)
    for name in MADE_FROM:
        if not shared[name] and name not in (*table.layout.rows, *table.layout.columns):
            values = dict.fromkeys(one.label(name) for one in made if one.label(name))
            for value in values:
                rows = dict.fromkeys(" ".join(row_of(one, table.layout)) for one in made if one.label(name) == value)
                yield f"{name} {value}: {', '.join(rows)}"


def _errors(table: Table) -> Iterator[str]:
    """Yield what follows the values."""
    spread = table.layout.spread
    kinds = {"ci": "95 % confidence interval", "stderr": "standard error"}
    cells = [cell for *_, cell in table.placed() if cell.error is not None]
    over_seeds = sorted({len(cell.members) for cell in cells if len(cell.members) > 1})
    if over_seeds:
        counts = " or ".join(map(str, over_seeds))
        yield f"± over {counts} seeds: {kinds.get(spread, kinds['ci'])} of the mean"
    if any(len(cell.members) == 1 for cell in cells):
        yield f"± of one run: {kinds.get(spread, kinds['stderr'])} over windows or items, the same ones in every row"


def _sizes(table: Table, members: list[Measurement]) -> Iterator[str]:
    """Yield what the bits are."""
    what = {
        "linears": "stored bits per weight of the linears, with scales, zero points, adapters and online operators",
        "model": "stored bits per weight of the whole model",
    }
    if members:
        yield from (f"{bits_title(kind)}: {what[kind]}" for kind in table.layout.bits)


def bits_title(kind: str) -> str:
    """Return the heading of a column of bits per weight."""
    return "bits" if kind == "linears" else f"bits ({kind})"


def _only(texts: Iterable[str]) -> str:
    """Return the one text that all are, or nothing if they differ."""
    found = set(texts)
    return found.pop() if len(found) == 1 else ""
