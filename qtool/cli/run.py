"""``qtool run``: a recipe, which is a whole matrix of steps."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qtool.cli.session import Session, command


@command
def run(
    session: Session,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file.")],
) -> None:
    """Run a recipe.

    A recipe is a matrix of transforms, mitigators and schemes; its table is printed at the end.
    """
    from qtool.steps.run import RunRequest
    from qtool.steps.run import run as step

    with session.workspace() as workspace:
        text = step(RunRequest(recipe=recipe), workspace)
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    sys.stdout.flush()
