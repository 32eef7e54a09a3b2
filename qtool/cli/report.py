"""``qtool report``: tables of what was measured."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qtool.cli.session import Output, Session, Sources, command, read_list
from qtool.cli.stdin import read_sources


@command
def report(
    session: Session,
    sources: Sources = None,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="markdown, latex, html, csv or json.")] = "markdown",
    rows: Annotated[str, typer.Option(metavar="LABELS", help="Labels that make a row, joined by commas.")] = "",
    columns: Annotated[str, typer.Option(metavar="LABELS", help="Labels that make a column, joined by commas.")] = "",
    value: Annotated[str, typer.Option(metavar="METRIC", help="What the cells show.")] = "perplexity/wikitext2",
    output: Output = None,
) -> None:
    """Print a table of metrics."""
    from qtool.steps.report import ReportRequest
    from qtool.steps.report import report as step

    chosen = {name: read_list(labels) for name, labels in (("rows", rows), ("columns", columns)) if labels}
    request = ReportRequest(sources=read_sources(sources), to=to, value=value, output=output, **chosen)
    with session.workspace() as workspace:
        text = step(request, workspace)
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    sys.stdout.flush()
