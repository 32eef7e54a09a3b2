"""``qtool run``: a recipe, which is a whole matrix of steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli.output import say, write_json
from qtool.cli.report import read_format, write_table
from qtool.cli.session import Session, command

if TYPE_CHECKING:
    from qtool.steps.run import RunResult


@command
def run(
    session: Session,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")],
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=CHOICE", help="Only these cells, such as mitigate=gptq (repeatable)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the steps, and which are done already.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure.")] = False,
    jobs: Annotated[
        int,
        typer.Option("--jobs", "-j", metavar="N", min=1, help="Steps at once, each a process, over all CUDA devices."),
    ] = 1,
    to: Annotated[
        str,
        typer.Option(metavar="FORMAT", help="markdown, latex, csv or json. [default: the recipe's]"),
    ] = "",
) -> None:
    """Run a recipe.

    A recipe is a matrix of transforms, mitigators and schemes; its table is printed at the end. Run again, it goes on
    from what is there.
    """
    from qtool.steps.run import RunRequest
    from qtool.steps.run import run as step

    common = session.common
    request = RunRequest(recipe, tuple(only or ()), dry_run, fail_fast, jobs, read_format(to, as_json=common.json))

    def announce(message: str) -> None:
        if not common.quiet:
            sys.stderr.write(f"{message}\n")

    with session.workspace() as workspace:
        result = step(request, workspace, announce)
    if common.json:
        write_json(_described(result))
    else:
        write_table(result.text)
    _end(result)


def _described(result: RunResult) -> dict[str, object]:
    steps = [{"step": one.title, "state": one.state, "path": one.path, "id": one.id} for one in result.outcomes]
    table = None if result.path is None else json.loads(result.text)
    return {"path": None if result.path is None else str(result.path), "steps": steps, "table": table}


def _end(result: RunResult) -> None:
    """Fail by the first failure if there is one."""
    failures = result.failures
    if failures:
        say(
            "warning", f"{len(failures)} of {len(result.outcomes)} steps failed: {'; '.join(o.title for o in failures)}"
        )
        if (error := failures[0].error) is not None:
            raise error
