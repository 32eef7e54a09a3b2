"""``qtool pack``: a checkpoint that other software loads."""

from __future__ import annotations

from typing import Annotated

import typer

from qtool.cli.completion import complete_offers
from qtool.cli.session import Output, Session, Source, command
from qtool.cli.stdin import read_source


@command
def pack(
    session: Session,
    to: Annotated[
        str, typer.Option(metavar="EXPORTER", help="Layout to write.", autocompletion=complete_offers("exporters"))
    ],
    source: Source = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at the output path.")] = False,
    output: Output = None,
) -> None:
    """Write a checkpoint directory.

    It is laid out as transformers, vLLM and others load it.
    """
    from qtool.steps.pack import PackRequest
    from qtool.steps.pack import pack as step

    session.run(step, PackRequest(source=read_source(source), to=to, output=output, force=force))
