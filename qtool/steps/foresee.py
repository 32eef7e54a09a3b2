"""What a step or a run would do and take, without doing any of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from qtool.artifacts.manifest import Kind, Manifest
from qtool.artifacts.store import Artifact, ArtifactWriter
from qtool.errors import ArtifactError
from qtool.steps.demand import Demand, demand_of
from qtool.steps.description import Cell, Description, Table
from qtool.steps.mitigation_plan import describe_mitigation
from qtool.steps.recipe import Recipe
from qtool.steps.subjects import read_plan
from qtool.steps.tasks import Outcome, Task, ended
from qtool.steps.workspace import Workspace

Request = TypeVar("Request")


class _Known(BaseException):
    """Ends a step of a dry run where its output is known; no step's ``except Exception`` may hold it up."""

    def __init__(self, path: Path, manifest: Manifest, done: Artifact | None) -> None:
        super().__init__()
        self.path, self.manifest, self.done = path, manifest, done


@dataclass(frozen=True)
class _DryWorkspace(Workspace):
    """A workspace in which no step gets further than naming its output."""

    def output(self, manifest: Manifest, chosen: Path | None) -> Path:
        """Tell where the artifact would go instead of returning it."""
        path = super().output(manifest, chosen)
        raise _Known(path, manifest, ArtifactWriter.finished(path, manifest.key, wait=False))


def foresee(
    step: Callable[[Request, Workspace], tuple[Artifact, bool]], request: Request, workspace: Workspace
) -> Description:
    """Describe what one step would do; whatever it would refuse before any work is refused.

    For mitigate that is a plan of its work, with an estimate of memory and time from short measurements.

    Args:
        step: The step.
        request: What it is asked.
        workspace: Where it would work.
    """
    tables: dict[str, Table] = {}
    try:
        artifact, _ = step(request, _DryWorkspace(**vars(workspace)))
    except _Known as known:
        done, path, manifest = known.done, known.path, known.manifest
        demand = _demand(manifest, workspace)
    else:
        done, path, manifest, demand = artifact, artifact.path, artifact.manifest, None
    facts: dict[str, Cell] = {"path": str(path), "state": "to do" if done is None else "there"}
    if demand is not None:
        facts |= {
            "statistics_bytes_of_largest_layer": demand.statistics,
            "largest_layer": demand.layer,
            "disk_bytes_at_least": demand.disk,
        }
        if done is None and manifest.kind == "quantized":
            found, tables = describe_mitigation(manifest, workspace)
            facts |= found
    return Description(facts, tables)


def foreseen(tasks: list[Task], recipe: Recipe, workspace: Workspace) -> tuple[Outcome, ...]:
    """Return which tasks are done already; what follows a task that is not cannot be known to be."""
    dry = _DryWorkspace(**vars(workspace))
    outcomes: dict[Task, Outcome] = {}
    for task in tasks:
        source = recipe.model if task.source is None else outcomes[task.source]
        outcome = Outcome(task.title, "to do")
        if isinstance(source, str) or source.id:
            try:
                task.start(source if isinstance(source, str) else source.path, dry)
            except _Known as known:
                outcome = replace(outcome, path=str(known.path), demand=_demand(known.manifest, workspace))
                if known.done is not None:
                    outcome = ended(task, known.done, "there")
        outcomes[task] = outcome
    return tuple(outcomes.values())


def _demand(manifest: Manifest, workspace: Workspace) -> Demand | None:
    """Return what a step would take; None where that is not known."""
    model = workspace.model(str(workspace.inputs.get("model", manifest.inputs["model"].path)))
    gathered = plan = None
    if manifest.kind == "quantized":
        try:
            gathered = _input(manifest, "statistics", workspace)
            plan = _input(manifest, "plan", workspace)
        except ArtifactError:
            return None
    told = None if gathered is None else gathered.manifest
    return demand_of(manifest, model, workspace.plugins, told, None if plan is None else read_plan(plan))


def _input(manifest: Manifest, kind: Kind, workspace: Workspace) -> Artifact | None:
    """Open an input of a kind; None where there is no such."""
    found = manifest.inputs.get(kind)
    return None if found is None else workspace.artifact(found.path, kind)
