"""``qtool inspect``: what a model or an artifact is, for people."""

from __future__ import annotations

from typing import Annotated

import typer

from qtool.cli.output import write_json
from qtool.cli.session import Session, Sources, command
from qtool.cli.stdin import read_sources
from qtool.cli.tables import draw


@command
def inspect(
    session: Session,
    sources: Sources = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A parameter that the model's family does not describe is an error.")
    ] = False,
) -> None:
    """Show what models and artifacts are.

    A model's parameters, a plan's operators, the losses of each linear, measured values and their protocol.
    """
    from qtool.steps.inspect import inspect as step

    with session.workspace() as workspace:
        found = [step(source, workspace, strict=strict) for source in read_sources(sources)]
    for description in found:
        if session.common.json:
            write_json(description.to_json())
        else:
            draw(description)
