"""What a run would do: which of its tasks are done already, without doing any."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from qtool.artifacts.manifest import Manifest
from qtool.artifacts.store import Artifact, ArtifactWriter
from qtool.steps.recipe import Recipe
from qtool.steps.tasks import Outcome, Task, ended
from qtool.steps.workspace import Workspace


class _Known(BaseException):
    """Ends a step of a dry run where its output is known; no step's ``except Exception`` may hold it up."""

    def __init__(self, path: Path, done: Artifact | None) -> None:
        super().__init__()
        self.path, self.done = path, done


@dataclass(frozen=True)
class _DryWorkspace(Workspace):
    """A workspace in which no step gets further than naming its output."""

    def output(self, manifest: Manifest, chosen: Path | None) -> Path:
        """Tell where the artifact would go instead of returning it."""
        path = super().output(manifest, chosen)
        raise _Known(path, ArtifactWriter.finished(path, manifest.key))


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
                outcome = replace(outcome, path=str(known.path))
                if known.done is not None:
                    outcome = ended(task, known.done, "there")
        outcomes[task] = outcome
    return tuple(outcomes.values())
