"""A recipe as tasks: every step that its cells need, each once, in an order in which inputs come first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from qtool.artifacts.store import Artifact
from qtool.errors import UsageError
from qtool.numerics.token_weights import parse_token_weight
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme
from qtool.steps.calibrate import CalibrateRequest, calibrate
from qtool.steps.cells import IDENTITY, CellChoice, cells_of
from qtool.steps.demand import Demand
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.options import configure
from qtool.steps.presets import MitigateSettings, mitigate_settings
from qtool.steps.recipe import Recipe
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import Workspace

Start = Callable[[str, Workspace], tuple[Artifact, bool]]
State = Literal["done", "reused", "failed", "skipped", "there", "to do"]
Request = TypeVar("Request", CalibrateRequest, TransformRequest, MitigateRequest, EvalRequest)
Step = Callable[[Request, Workspace], tuple[Artifact, bool]]


@dataclass(frozen=True)
class Task:
    """One step of a run.

    Attributes:
        title: The step and what tells it apart from the recipe's others, for people.
        source: The task whose artifact it works on; None where it works on the recipe's model.
        start: Runs the step on a path or a model.
        measures: Whether its artifact belongs in the table.
    """

    title: str
    source: Task | None
    start: Start
    measures: bool = False


@dataclass(frozen=True)
class Outcome:
    """How one task ended.

    Attributes:
        title: The task.
        state: ``done``, ``reused`` (it was there), ``failed``, ``skipped`` (its input failed); of a dry run ``there``
            or ``to do``.
        path: The artifact, or where it is going to be; empty where that is not known.
        id: The artifact's id, if there is one.
        error: Why it failed.
        demand: Of a dry run, what it is going to take, where that is known.
        warnings: What it said in another process.
    """

    title: str
    state: State
    path: str = ""
    id: str = ""
    error: Exception | None = None
    demand: Demand | None = None
    warnings: tuple[str, ...] = ()


def ended(task: Task, artifact: Artifact, state: State) -> Outcome:
    """Return the outcome of a task whose artifact is there."""
    return Outcome(task.title, state, str(artifact.path), artifact.manifest.id)


def tasks_of(recipe: Recipe, plugins: Plugins, only: Sequence[str] = ()) -> list[Task]:
    """Return the tasks of a recipe; whatever can be refused before any work is.

    Args:
        recipe: The recipe.
        plugins: Where methods, schemes and datasets are found.
        only: Conditions ``axis=choice`` on cells; those of one axis are alternatives.

    Raises:
        UsageError: An unknown method, option, scheme, dataset or axis, or no cell is left.
    """
    _check_texts(recipe, plugins)
    return _Expansion(recipe, plugins).tasks(cells_of(recipe, only))


def _start(step: Step[Request], request: Request, path: str, workspace: Workspace) -> tuple[Artifact, bool]:
    """Run a step on a source."""
    return step(replace(request, source=path), workspace)


class _Expansion:
    """Makes tasks and remembers them, so that what cells have in common is done once.

    Args:
        recipe: The recipe.
        plugins: Where methods and schemes are found.
    """

    def __init__(self, recipe: Recipe, plugins: Plugins) -> None:
        self.recipe, self.plugins = recipe, plugins
        self._made: dict[tuple[str, Task | None], Task] = {}
        self._seeds_shown = len(set(recipe.matrix.seed)) > 1

    def tasks(self, cells: Sequence[CellChoice]) -> list[Task]:
        """Return the tasks of these cells, full precision first."""
        if self.recipe.full_precision:
            self._evaluated("full precision", None)
        for cell in cells:
            source = self._transformed(cell, self._calibrated(cell.seed))
            weight = f" {cell.token_weight}" if len(set(self.recipe.matrix.token_weight)) > 1 else ""
            words = f"{cell.transform} {cell.mitigate} {cell.scheme}{weight}{self._seed_word(cell.seed)}"
            self._evaluated(words, self._mitigated(words, cell, source))
        return list(self._made.values())

    def _task(self, title: str, source: Task | None, request: Request, step: Step[Request]) -> Task:
        """Return the task of a request, whose own source is empty; the same one for the same request."""
        task = Task(title, source, partial(_start, step, request), isinstance(request, EvalRequest))
        return self._made.setdefault((repr(request), source), task)

    def _seed_word(self, seed: int) -> str:
        return f" seed {seed}" if self._seeds_shown else ""

    def _calibrated(self, cell_seed: int) -> Task | None:
        options = self.recipe.calibrate
        if options is None:
            return None
        seed = cell_seed if options.seed is None else options.seed
        word = self._seed_word(seed) if options.seed is None else ""
        request = CalibrateRequest(
            source="",
            data=options.data,
            num_samples=options.num_samples,
            seq_len=options.seq_len,
            seed=seed,
            gather=options.gather,
            token_weight=options.token_weight,
            sample_size=options.sample_size,
            experts=options.experts,
            dtype=self.recipe.dtype,
        )
        return self._task(f"calibrate {options.data}{word}", None, request, calibrate)

    def _transformed(self, cell: CellChoice, source: Task | None) -> Task | None:
        """Return the plan of a cell: one for each scheme, which decides what many methods propose."""
        if cell.transform == IDENTITY:
            return source
        configure("transforms", cell.transform.method, cell.transform.set, self.plugins)
        request = TransformRequest("", cell.transform.method, cell.transform.set, self._scheme(cell), cell.seed)
        title = f"transform {cell.transform} {cell.scheme}{self._seed_word(cell.seed)}"
        return self._task(title, source, request, transform)

    def _settings(self, cell: CellChoice) -> MitigateSettings:
        options = self.recipe.mitigate
        return mitigate_settings(options.preset).overridden(
            propagate=options.propagate,
            true_sequential=options.true_sequential,
            round_activations=options.round_activations,
            token_weight=cell.token_weight or None,
            experts=options.experts,
            expert_share=options.expert_share,
            seed=cell.seed,
        )

    def _scheme(self, cell: CellChoice) -> ModelScheme:
        choice = cell.scheme
        scheme = self._settings(cell).scheme(choice.scheme, choice.parts(), self.plugins)
        return replace(scheme, name=choice.name or scheme.name)

    def _mitigated(self, words: str, cell: CellChoice, source: Task | None) -> Task:
        settings = self._settings(cell)
        given = settings.options(cell.mitigate.method, cell.mitigate.set)
        configure("mitigators", cell.mitigate.method, given, self.plugins)
        if settings.token_weight:
            parse_token_weight(settings.token_weight)
        request = MitigateRequest(
            source="",
            method=cell.mitigate.method,
            scheme=self._scheme(cell),
            settings=given,
            propagate=settings.propagate,  # type: ignore[arg-type] # checked by the step
            true_sequential=settings.true_sequential,
            round_activations=settings.round_activations,
            token_weight=settings.token_weight,
            experts=settings.experts,
            expert_share=settings.expert_share,
            seed=settings.seed,
            dtype=self.recipe.dtype,
        )
        return self._task(f"mitigate {words}", source, request, mitigate)

    def _evaluated(self, words: str, source: Task | None) -> Task:
        options = self.recipe.eval
        request = EvalRequest(
            source="",
            perplexity=options.perplexity,
            seq_len=options.seq_len,
            max_windows=options.max_windows,
            kl=options.kl and source is not None,
            tasks=options.tasks,
            limit=options.limit,
            dtype=self.recipe.dtype,
        )
        return self._task(f"eval {words}", source, request, evaluate)


def _check_texts(recipe: Recipe, plugins: Plugins) -> None:
    """Refuse unknown datasets, and a recipe that measures nothing, before any work."""
    if not recipe.eval.perplexity and not recipe.eval.tasks:
        raise UsageError(f"the recipe `{recipe.name}` measures nothing", hint="eval: {perplexity: [wikitext2]}")
    calibration = () if recipe.calibrate is None else (recipe.calibrate.data,)
    for data in (*calibration, *recipe.eval.perplexity):
        if not Path(data).is_file():
            plugins.offer("datasets", data)
