"""Draws a description for people: facts as lines, tables with rich."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from qtool.cli.output import tables_console

if TYPE_CHECKING:
    from qtool.steps.description import Cell, Description, Table


def draw(description: Description) -> None:
    """Write a description to standard output; facts go past rich, which would wrap a long path."""
    width = max((len(name) for name in description.facts), default=0)
    for name, value in description.facts.items():
        sys.stdout.write(f"{name.replace('_', ' '):<{width}}  {_text(value)}\n")
    console = tables_console()
    for name, table in description.tables.items():
        if table.rows:
            console.print(_drawn(name, table), highlight=False)
    sys.stdout.flush()


def _drawn(name: str, table: Table) -> RichTable:
    drawn = RichTable(title=name.replace("_", " "), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    numeric = [all(isinstance(row[i], int | float) for row in table.rows) for i in range(len(table.columns))]
    for column, right in zip(table.columns, numeric, strict=True):
        drawn.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(_text(cell)) for cell in row))
    return drawn


def _text(cell: Cell) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "" if cell is None else str(cell)
