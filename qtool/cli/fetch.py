"""``qtool fetch``: a model in a local folder."""

from __future__ import annotations

from typing import Annotated

import typer

from qtool.cli.completion import complete_offers
from qtool.cli.output import write_json, write_line
from qtool.cli.session import Session, command


@command
def fetch(
    session: Session,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Name, hub id or GGUF file of a model.", autocompletion=complete_offers("models")
        ),
    ],
) -> None:
    """Fetch a model, print its folder."""
    with session.workspace() as workspace:
        model = workspace.model(name)
    path = str(model.path.resolve())
    if session.common.json:
        write_json({"path": path, "kind": "model", "key": None, "id": model.id, "reused": None, "metrics": {}})
    else:
        write_line(path)
