"""run: the steps of a recipe, and the table of what they measured.

Every step finds its own finished artifact by key, so a run that was interrupted, or that shares steps with another
recipe, goes on from what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tabulate import tabulate

from qtool.artifacts.store import disk_errors
from qtool.errors import QtoolError
from qtool.steps.crew import crew_of, worked
from qtool.steps.demand import Demand
from qtool.steps.foresee import foreseen
from qtool.steps.recipe import Recipe, read_recipe
from qtool.steps.rendering import SUFFIXES
from qtool.steps.report import ReportRequest, check, report
from qtool.steps.tasks import Outcome, Task, tasks_of
from qtool.steps.workspace import Workspace

Announce = Callable[[str], None]


@dataclass(frozen=True)
class RunRequest:
    """Which recipe.

    Attributes:
        recipe: A YAML file; see ``qtool.steps.recipe``.
        only: Conditions ``axis=choice`` on cells; those of one axis are alternatives.
        dry_run: Whether to do nothing but list the steps, and which of them are done already. The model is fetched
            all the same where it is not there: what is done follows from its weights.
        fail_fast: Whether the first failure ends the run.
        jobs: Steps that run at once, each in a process of its own; 1 runs them here. Processes import the script that
            asks anew, which therefore does so below ``if __name__ == "__main__":`` only.
        to: Format of the table; empty takes the recipe's.
    """

    recipe: Path
    only: tuple[str, ...] = ()
    dry_run: bool = False
    fail_fast: bool = False
    jobs: int = 1
    to: str = ""


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        text: The table in the format that was asked for, or of a dry run the list of steps.
        path: The table as a file; None for a dry run.
        outcomes: One for each task, in order.
    """

    text: str
    path: Path | None
    outcomes: tuple[Outcome, ...]

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The tasks that failed; what depends on them was skipped."""
        return tuple(one for one in self.outcomes if one.error is not None)


def run(request: RunRequest, workspace: Workspace, announce: Announce = lambda message: None) -> RunResult:
    """Run a recipe.

    The failure of a task skips what depends on it and nothing else; the result lists it.

    Args:
        request: Which recipe.
        workspace: Where its steps work.
        announce: Told of each task as it ends, for people.

    Raises:
        UsageError: The recipe does not fit; refused before any work.
        QtoolError: Nothing could be measured, or with ``fail_fast`` the first failure.
    """
    recipe = read_recipe(request.recipe)
    tasks = tasks_of(recipe, workspace.plugins, request.only)
    asked = _table_request(request, recipe)
    check(asked)
    if request.dry_run:
        found = foreseen(tasks, recipe, workspace)
        return RunResult(_listed(found), None, found)
    outcomes = _run_all(tasks, request, recipe, workspace, announce)
    measured = [one for one, task in zip(outcomes, tasks, strict=True) if task.measures and one.id]
    if not measured:
        raise next(one.error for one in outcomes if one.error is not None)
    failed = (f"failed: {one.title}: {_sentence(one.error)}" for one in outcomes if one.error is not None)
    asked = replace(asked, sources=tuple(one.path for one in measured), footnotes=(*asked.footnotes, *failed))
    return _tabulated(asked, outcomes, (workspace.home / recipe.name).resolve(), workspace)


def _run_all(
    tasks: list[Task], request: RunRequest, recipe: Recipe, workspace: Workspace, announce: Announce
) -> tuple[Outcome, ...]:
    """Run the tasks, and say how each ended."""
    width = len(str(len(tasks)))
    labels = {task: f"[{index:>{width}}/{len(tasks)}] {task.title}" for index, task in enumerate(tasks, 1)}
    outcomes: dict[Task, Outcome] = {}
    if request.jobs > 1:
        workspace.model(recipe.model)  # fetched once, before processes ask for it together
    with crew_of(request.jobs, workspace) as crew:
        for task, outcome, seconds in worked(labels, recipe.model, crew):
            outcomes[task] = outcome
            for message in outcome.warnings:
                workspace.warn(f"{task.title}: {message}")
            if outcome.error is not None:
                announce(f"{labels[task]}: failed: {_sentence(outcome.error)}")
                if request.fail_fast:
                    raise outcome.error
            else:
                announce(f"{labels[task]}: {f'{seconds:.1f} s' if outcome.state == 'done' else outcome.state}")
    return tuple(outcomes[task] for task in tasks)


def _table_request(request: RunRequest, recipe: Recipe) -> ReportRequest:
    """Return the report that ends the run, without its sources."""
    layout = recipe.report
    return ReportRequest(
        sources=(),
        to=request.to or layout.to,
        rows=layout.rows,
        columns=layout.columns,
        values=layout.values,
        error=layout.error,
        bits=layout.bits,
        footnotes=layout.footnotes,
    )


def _tabulated(asked: ReportRequest, outcomes: tuple[Outcome, ...], folder: Path, workspace: Workspace) -> RunResult:
    """Write the table into the recipe's folder, as Markdown and in the format that was asked for."""
    path = folder / f"table{SUFFIXES[asked.to]}"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    text = report(replace(asked, output=path), workspace)
    if asked.to != "markdown":
        report(replace(asked, to="markdown", output=folder / "table.md"), workspace)
    return RunResult(text, path, outcomes)


def _sentence(error: Exception) -> str:
    """Return an error as one line."""
    return error.message if isinstance(error, QtoolError) else " ".join(f"{type(error).__name__}: {error}".split())


def _listed(outcomes: tuple[Outcome, ...]) -> str:
    rows = [
        (index, one.title, one.state, Path(one.path).name, *_taken(one.demand)) for index, one in enumerate(outcomes, 1)
    ]
    columns = ("", "step", "state", "artifact", "statistics of a layer", "on disk")
    return tabulate(rows, columns, tablefmt="simple", disable_numparse=True) + "\n"


def _taken(demand: Demand | None) -> tuple[str, str]:
    """Return the memory and the disk that a step takes, for people."""
    return ("", "") if demand is None else (f"{demand.statistics / 1e9:.3g} GB", f"{demand.disk / 1e9:.3g} GB")
