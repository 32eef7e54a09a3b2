"""``qtool report``: tables of what was measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.output import write_line
from qtool.cli.session import Session, Sources, command, read_list
from qtool.cli.stdin import read_sources
from qtool.errors import UsageError

JSON = "json"


@command
def report(
    session: Session,
    sources: Sources = None,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="markdown, latex, csv or json. [default: markdown]")] = "",
    rows: Annotated[
        str,
        typer.Option(
            metavar="LABELS",
            help="Labels that name a row, joined by commas. "
            "[default: transform,mitigator, and what else tells rows apart]",
        ),
    ] = "",
    columns: Annotated[str, typer.Option(metavar="LABELS", help="Labels that name a group of columns.")] = "scheme",
    values: Annotated[
        str, typer.Option(metavar="METRICS", help="What the cells show. [default: every metric that all have]")
    ] = "",
    error: Annotated[
        str,
        typer.Option(
            metavar="auto|none|stderr|ci",
            help="What follows a value: standard error or 95 % confidence interval, over seeds, else over windows.",
        ),
    ] = "auto",
    bits: Annotated[
        str, typer.Option(metavar="linears,model", help="Stored bits per weight; empty for none.")
    ] = "linears",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PATH", help="File for the table, whose path is then printed instead."),
    ] = None,
) -> None:
    """Print a table of metrics.

    The best value of each column is bold. What was not measured alike is not put into one column.
    """
    from qtool.steps.report import ReportRequest
    from qtool.steps.report import report as step

    request = ReportRequest(
        sources=read_sources(sources),
        to=read_format(to, as_json=session.common.json) or "markdown",
        rows=read_list(rows),
        columns=read_list(columns),
        values=read_list(values),
        error=error,
        bits=read_list(bits),
        output=output,
    )
    with session.workspace() as workspace:
        text = step(request, workspace)
    if output is not None:
        write_line(str(output.resolve()))
    else:
        write_table(text)


def read_format(to: str, *, as_json: bool) -> str:
    """Return the format that is asked for, by name or by ``--json``.

    Raises:
        UsageError: Both, and they differ.
    """
    if as_json and to not in ("", JSON):
        raise UsageError(f"`--to {to}` and `--json` ask for two formats", hint=f"--to {to}")
    return JSON if as_json else to


def write_table(text: str) -> None:
    """Write a table, which ends with a newline, to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
