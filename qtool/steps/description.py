"""What a thing is, in a form that people and programs can read: facts by name, and tables."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qtool.errors import UsageError
from qtool.plugins import KINDS, Plugins

Cell = str | int | float | bool | None
PRESETS = "presets"


@dataclass(frozen=True)
class Table:
    """Rows of cells below named columns."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]

    def to_json(self) -> list[dict[str, Cell]]:
        """Return each row as an object."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


Facts = dict[str, Cell]
Tables = dict[str, Table]


@dataclass(frozen=True)
class Description:
    """Facts, then tables; names become the fields of the JSON object."""

    facts: Mapping[str, Cell]
    tables: Mapping[str, Table] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return one object: the facts, and each table as a list of objects."""
        return {**self.facts, **{name: table.to_json() for name, table in self.tables.items()}}


def describe_plugins(plugins: Plugins, kind: str = "") -> Description:
    """Describe everything that plugins offer, without importing it.

    Args:
        plugins: What was found.
        kind: Only this kind; empty for all.

    Raises:
        UsageError: No such kind.
    """
    kinds = (*KINDS, PRESETS)
    if kind and kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, n=1)
        raise UsageError(
            f"there is no kind of plugin called `{kind}`",
            facts=(("known", ", ".join(kinds)),),
            hint=f"did you mean `{near[0]}`?" if near else "qtool plugins",
        )
    offered = [
        (kind_, name, str(offer.provider), offer.entry.summary)
        for kind_ in KINDS
        for name, offer in plugins.offers[kind_].items()
    ]
    presets = [(PRESETS, preset.name, "", preset.summary) for preset in plugins.presets.values()]
    rows = [row for row in (*offered, *presets) if kind in ("", row[0])]
    tables = {"offers": Table(("kind", "name", "provider", "summary"), rows)}
    others = [
        (kind_, name, here)
        for kind_ in KINDS
        for offer in plugins.offers[kind_].values()
        for name, here in sorted(offer.entry.others.items())
        if kind in ("", kind_)
    ]
    if others:
        tables["called_otherwise_here"] = Table(("kind", "name", "type"), others)
    if plugins.broken or not kind:
        tables["broken"] = Table(("plugin", "reason"), list(plugins.broken.items()))
    return Description({}, tables)
