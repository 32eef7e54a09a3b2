"""A table as text: Markdown and LaTeX for people, CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tabulate import DataRow, Line, TableFormat, tabulate

from qtool.steps.measurement import better
from qtool.steps.notes import bits_title
from qtool.steps.table import Cell, Key, Table

ARROWS = {"lower": "↓", "higher": "↑", "": ""}
DIGITS = {"perplexity": 2, "word_perplexity": 2, "reference_perplexity": 2}
EMPTY = "–"
_LATEX = str.maketrans(
    {
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
        "±": r"$\pm$",
        "–": "--",
    }
)
_BOOKTABS = TableFormat(
    lineabove=Line("\\toprule", "", "", ""),
    linebelowheader=Line("\\midrule", "", "", ""),
    linebetweenrows=None,
    linebelow=Line("\\bottomrule", "", "", ""),
    headerrow=DataRow("", "&", "\\\\"),
    datarow=DataRow("", "&", "\\\\"),
    padding=1,
    with_header_hide=None,
)


@dataclass(frozen=True)
class _Style:
    """How people's formats spell things."""

    escape: Callable[[str], str]
    bold: str


def markdown(table: Table, notes: Sequence[str]) -> str:
    """Return a table in GitHub's Markdown, with its notes as a list below."""
    style = _Style(lambda text: text.replace("|", "\\|"), "**{}**")
    text = tabulate(
        _body(table, style),
        _headings(table, style),
        tablefmt="github",
        disable_numparse=True,
        colalign=_alignment(table),
    )
    below = "\n".join(f"- {note}" for note in notes)
    return f"{text}\n\n{below}\n" if below else f"{text}\n"


def latex(table: Table, notes: Sequence[str]) -> str:
    """Return a LaTeX tabular for the package booktabs, with its notes as small print below."""
    style = _Style(lambda text: text.translate(_LATEX), "\\textbf{{{}}}")
    body = tabulate(
        _body(table, style),
        _headings(table, style),
        tablefmt=_BOOKTABS,
        disable_numparse=True,
        colalign=_alignment(table),
    )
    columns = "".join(side[0] for side in _alignment(table))
    lines = [f"\\begin{{tabular}}{{{columns}}}", *(line.rstrip() for line in body.split("\n")), "\\end{tabular}"]
    lines += [f"\n\\par{{\\footnotesize {style.escape(note)}\\par}}" for note in notes]
    return "\n".join(lines) + "\n"


def comma_separated(table: Table, notes: Sequence[str]) -> str:
    """Return a table as CSV with full precision; each value is followed by its error, each group by its bits."""
    del notes
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    headings = [*table.layout.rows]
    for column in table.columns:
        for metric in table.layout.metrics:
            headings += [_title(column, metric), _title(column, f"{metric} ±")]
        headings += [_title(column, bits_title(kind)) for kind in table.layout.bits]
    writer.writerow(headings)
    for row in table.rows:
        line: list[object] = [*row]
        for column in table.columns:
            for metric in table.layout.metrics:
                cell = table.cells.get((row, column, metric))
                line += [None, None] if cell is None else [cell.value, cell.error]
            line += [_bits(table, row, column, kind) for kind in table.layout.bits]
        writer.writerow(line)
    return file.getvalue()


def json_object(table: Table, notes: Sequence[str]) -> str:
    """Return a table as one JSON object, its cells with all that is known of them."""
    cells = [
        {
            "row": dict(zip(table.layout.rows, row, strict=True)),
            "column": dict(zip(table.layout.columns, column, strict=True)),
            "metric": metric,
            "value": cell.value,
            "error": cell.error,
            "n": len(cell.members),
            "best": cell.best,
            "bits": {kind: cell.bits(kind) for kind in cell.members[0].bits},
            "protocol": dict(cell.members[0].protocol),
            "measurements": [
                {"value": o.value, "stderr": o.stderr, "labels": dict(o.labels), "path": o.path, "id": o.id}
                for o in cell.members
            ],
        }
        for row, column, metric, cell in table.placed()
    ]
    value: Mapping[str, Any] = {
        "rows": table.layout.rows,
        "columns": table.layout.columns,
        "metrics": table.layout.metrics,
        "cells": cells,
        "notes": notes,
    }
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


RENDERERS: Mapping[str, Callable[[Table, Sequence[str]], str]] = MappingProxyType(
    {"markdown": markdown, "latex": latex, "csv": comma_separated, "json": json_object}
)
SUFFIXES: Mapping[str, str] = MappingProxyType({"markdown": ".md", "latex": ".tex", "csv": ".csv", "json": ".json"})


def _headings(table: Table, style: _Style) -> list[str]:
    headings = [*table.layout.rows]
    for column in table.columns:
        headings += [_title(column, f"{metric} {ARROWS[better(metric)]}".strip()) for metric in table.layout.metrics]
        headings += [_title(column, bits_title(kind)) for kind in table.layout.bits]
    return [style.escape(heading) for heading in headings]


def _body(table: Table, style: _Style) -> Iterator[list[str]]:
    for row in table.rows:
        line = [style.escape(label) for label in row]
        for column in table.columns:
            line += [_value(table.cells.get((row, column, metric)), metric, style) for metric in table.layout.metrics]
            bits = [_bits(table, row, column, kind) for kind in table.layout.bits]
            line += [style.escape(EMPTY) if one is None else f"{one:.2f}" for one in bits]
        yield line


def _value(cell: Cell | None, metric: str, style: _Style) -> str:
    """Return a cell's value with its error, the value bold where it is the best of its column."""
    if cell is None:
        return style.escape(EMPTY)
    digits = DIGITS.get(metric.partition("/")[0], 4)
    value = _number(cell.value, digits)
    error = "" if cell.error is None else style.escape(f" ± {_number(cell.error, digits)}")
    return (style.bold.format(value) if cell.best else value) + error


def _number(value: float, digits: int) -> str:
    """Return a number with fixed digits, or three significant ones where it is large."""
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.2e}"


def _bits(table: Table, row: Key, column: Key, kind: str) -> float | None:
    cells = (table.cells.get((row, column, metric)) for metric in table.layout.metrics)
    return next((cell.bits(kind) for cell in cells if cell is not None), None)


def _title(column: Key, name: str) -> str:
    return " ".join((*(label for label in column if label), name))


def _alignment(table: Table) -> tuple[str, ...]:
    values = len(table.columns) * (len(table.layout.metrics) + len(table.layout.bits))
    return ("left",) * len(table.layout.rows) + ("right",) * values
