"""Runs of a small recipe on a tiny random model: what is shared, what is reused, what a failure and Ctrl-C leave."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qtool.artifacts.store import Artifact, ArtifactWriter, open_artifact
from qtool.errors import NumericalError, UsageError
from qtool.scheme import ModelScheme
from qtool.steps import tasks
from qtool.steps.run import RunRequest, RunResult, run
from qtool.steps.schemes import read_scheme
from qtool.steps.workspace import Workspace
from qtool.testing import TinyModel, tiny_model

RECIPE = """
name: small
model: {model}
dtype: float32
calibrate: {{data: {text}, num_samples: 3, seq_len: 16, gather: [absmax], token_weight: uniform}}
matrix:
  transform: [identity, smoothquant]
  mitigate: [rtn, gptq]
  scheme: [W4A4]
mitigate: {{propagate: quantized}}
eval: {{perplexity: [{text}], seq_len: 16, max_windows: 4}}
"""
STEPS = ("calibrate", "transform", "mitigate", "evaluate")


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model() as model:
        yield model


@pytest.fixture
def workspace(tiny: TinyModel, tmp_path: Path) -> Workspace:
    return replace(tiny.workspace, home=tmp_path / "home")


@pytest.fixture(scope="module")
def finished(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A whole run, in a folder of its own."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "small.yaml"
    path.write_text(RECIPE.format(model=tiny.path, text=tiny.path.parent / "text.txt"), encoding="utf-8")
    return run(RunRequest(path), replace(tiny.workspace, home=folder / "home"))


@pytest.fixture
def recipe(tiny: TinyModel, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.format(model=tiny.path, text=tiny.path.parent / "text.txt"), encoding="utf-8")
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count the steps that are asked for, and note whether they did any work."""
    made: list[str] = []

    def spy(name: str) -> None:
        step = getattr(tasks, name)

        def spied(request: Any, at: Workspace) -> tuple[Artifact, bool]:  # noqa: ANN401 - each step has its own request
            artifact, reused = step(request, at)
            made.append(f"{name} again" if reused else name)
            return artifact, reused

        monkeypatch.setattr(tasks, name, spied)

    for name in STEPS:
        spy(name)
    return made


def ids(result: RunResult) -> list[str]:
    return [one.id for one in result.outcomes]


def edit(recipe: Path, old: str, new: str) -> None:
    recipe.write_text(recipe.read_text().replace(old, new))


def test_shared_steps_run_once_and_a_second_run_reuses_everything(
    recipe: Path, workspace: Workspace, calls: list[str]
) -> None:
    said: list[str] = []
    edit(recipe, "[identity, smoothquant]", "[smoothquant]")
    first = run(RunRequest(recipe), workspace, said.append)
    assert {name: calls.count(name) for name in STEPS} == {"calibrate": 1, "transform": 1, "mitigate": 2, "evaluate": 3}
    assert len(list(workspace.home.glob("*.safetensors"))) == len(first.outcomes) == 7
    assert said[0].startswith("[1/7] eval full precision: ")
    assert said[-1].startswith("[7/7] eval smoothquant gptq W4A4: ")

    calls.clear()
    again = run(RunRequest(recipe), workspace)
    assert calls == [f"{name} again" for name in calls_of(first)]
    assert {one.state for one in again.outcomes} == {"reused"}
    assert (ids(again), again.text) == (ids(first), first.text)


def calls_of(result: RunResult) -> list[str]:
    return [one.title.split()[0].replace("eval", "evaluate") for one in result.outcomes]


def test_the_table_ends_the_run(recipe: Path, workspace: Workspace, finished: RunResult) -> None:
    shutil.copytree(Path(finished.outcomes[0].path).parent, workspace.home)
    edit(recipe, "eval:", "report: {columns: [model], footnotes: [from a test]}\neval:")
    result = run(RunRequest(recipe), workspace)
    assert {one.state for one in result.outcomes} == {"reused"}
    rows = [[part.strip() for part in line.split("|")[1:3]] for line in result.text.splitlines()[2:7]]
    assert rows == [
        ["identity", "full precision"],
        ["identity", "rtn"],
        ["identity", "gptq"],
        ["smoothquant", "rtn"],
        ["smoothquant", "gptq"],
    ]
    measured = [open_artifact(Path(one.path)) for one in result.outcomes if one.title.startswith("eval")]
    for line, artifact in zip(result.text.splitlines()[2:7], measured, strict=True):
        (value,) = artifact.manifest.details["values"].values()
        assert f"{value:.2f}" in line
    assert result.text.endswith("- from a test\n")
    assert result.path == (workspace.home / "small" / "table.md").resolve()
    assert result.path.read_text() == result.text


def test_a_transform_is_told_the_scheme_of_its_cell(recipe: Path, workspace: Workspace) -> None:
    mine = "{name: mine, weights: int4-g8, kv: int8-asym-token-head, outputs: int8-token}"
    edit(recipe, "scheme: [W4A4]", f"scheme: [W4A4, {mine}]")
    result = run(RunRequest(recipe, only=("transform=smoothquant", "mitigate=rtn")), workspace)
    plans = [open_artifact(Path(one.path)) for one in result.outcomes if one.title.startswith("transform")]
    parts = {"weights": "int4-g8", "kv": "int8-asym-token-head", "outputs": "int8-token"}
    schemes = [
        read_scheme("W4A4", {}, workspace.plugins),
        replace(read_scheme("", parts, workspace.plugins), name="mine"),
    ]
    assert [ModelScheme.from_json(plan.manifest.step.config["scheme"]) for plan in plans] == schemes
    # A table may hold both: what a transform was told is what its column says anyway.
    assert "smoothquant" in result.text
    assert not result.failures


def test_another_format_comes_beside_the_markdown(recipe: Path, workspace: Workspace) -> None:
    result = run(RunRequest(recipe, only=("mitigate=rtn", "transform=identity"), to="json"), workspace)
    assert len(json.loads(result.text)["cells"]) == 2
    assert sorted(file.name for file in (workspace.home / "small").iterdir()) == ["table.json", "table.md"]


def test_a_recipe_without_calibration_serves_methods_that_need_none(recipe: Path, workspace: Workspace) -> None:
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("calibrate")]
    recipe.write_text("\n".join(lines).replace("smoothquant", "quarot"))
    result = run(RunRequest(recipe), workspace)
    assert [(one.title, one.state) for one in result.outcomes if "gptq" in one.title] == [
        ("mitigate identity gptq W4A4", "failed"),
        ("eval identity gptq W4A4", "skipped"),
        ("mitigate quarot gptq W4A4", "failed"),
        ("eval quarot gptq W4A4", "skipped"),
    ]
    assert {one.state for one in result.outcomes if "gptq" not in one.title} == {"done"}
    assert "needs statistics" in str(result.failures[0].error)
    assert "- failed: mitigate identity gptq W4A4: `gptq` needs statistics" in result.text


def test_seeds_draw_text_anew_and_become_one_cell(recipe: Path, workspace: Workspace, calls: list[str]) -> None:
    edit(recipe, "scheme: [W4A4]", "scheme: [W4A4]\n  seed: [0, 1]")
    result = run(RunRequest(recipe, only=("mitigate=gptq", "transform=identity"), to="json"), workspace)
    assert calls.count("calibrate") == 2
    (cell,) = (one for one in json.loads(result.text)["cells"] if one["row"]["mitigator"] == "gptq")
    values = [one["value"] for one in cell["measurements"]]
    assert cell["n"] == 2
    assert values[0] != values[1]
    assert cell["value"] == pytest.approx(sum(values) / 2)
    # Of two values the standard error is half their difference.
    assert cell["error"] == pytest.approx(12.7062047362 * abs(values[0] - values[1]) / 2)


def test_options_of_a_method_tell_rows_apart(recipe: Path, workspace: Workspace) -> None:
    edit(recipe, "[rtn, gptq]", "[gptq, {method: gptq, set: {dampening_frac: 0.5}}]")
    result = run(RunRequest(recipe, only=("transform=identity",)), workspace)
    assert result.text.startswith("| transform   | mitigator      | settings ")
    assert "| gptq.dampening_frac=0.5, dtype=float32 |" in result.text


def test_an_interrupted_run_continues_and_gives_the_same(
    recipe: Path, workspace: Workspace, finished: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, seen = ArtifactWriter.add, Counter[str]()
    # In the middle of the third mitigation (calibrate has a part of this name too), then of what measures it.
    stops = [("layer-1", 4), ("metrics", 4)]

    def interrupted(writer: ArtifactWriter, part: str, *rest: Any) -> None:  # noqa: ANN401 - as ArtifactWriter.add
        seen[part] += 1
        if (part, seen[part]) in stops:
            raise KeyboardInterrupt
        add(writer, part, *rest)

    monkeypatch.setattr(ArtifactWriter, "add", interrupted)
    for done in (7, 8):
        with pytest.raises(KeyboardInterrupt):
            run(RunRequest(recipe), workspace)
        assert len(list(workspace.home.glob("*.safetensors"))) == done
        assert len(list(workspace.home.glob("*.partial"))) == 1
    continued = run(RunRequest(recipe), workspace)
    assert [one.state for one in continued.outcomes] == ["reused"] * 8 + ["done"] * 3
    assert ids(continued) == ids(finished)
    assert not list(workspace.home.glob("*.partial"))


def broken(request: Any, at: Workspace) -> tuple[Artifact, bool]:  # noqa: ANN401 - stands in for any step
    del request, at
    raise ZeroDivisionError("a plugin's mistake")


def test_a_failure_stops_what_depends_on_it_only(
    recipe: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "transform", broken)
    said: list[str] = []
    result = run(RunRequest(recipe, only=("mitigate=rtn",)), workspace, said.append)
    assert [one.state for one in result.outcomes] == ["done", "done", "done", "done", "failed", "skipped", "skipped"]
    assert isinstance(result.failures[0].error, ZeroDivisionError)
    assert "[5/7] transform smoothquant W4A4: failed: ZeroDivisionError: a plugin's mistake" in said
    assert "- failed: transform smoothquant W4A4: ZeroDivisionError" in result.text
    with pytest.raises(ZeroDivisionError):
        run(RunRequest(recipe, fail_fast=True), workspace)


def test_a_run_that_measures_nothing_fails_by_its_first_failure(
    recipe: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(request: Any, at: Workspace) -> tuple[Artifact, bool]:  # noqa: ANN401 - stands in for any step
        del request, at
        raise NumericalError("not finite")

    monkeypatch.setattr(tasks, "evaluate", refused)
    with pytest.raises(NumericalError, match="not finite"):
        run(RunRequest(recipe, only=("mitigate=rtn", "transform=identity")), workspace)
    assert not (workspace.home / "small").exists()


def test_a_dry_run_does_nothing_and_knows_what_is_there(recipe: Path, workspace: Workspace) -> None:
    dry = RunRequest(recipe, dry_run=True)
    before = run(dry, workspace)
    assert {one.state for one in before.outcomes} == {"to do"}
    assert before.path is None
    assert not workspace.home.exists()
    done = run(RunRequest(recipe, only=("transform=identity", "mitigate=rtn")), workspace)
    after = run(dry, workspace)
    there = [one for one in after.outcomes if one.state == "there"]
    assert [(one.title, one.id) for one in there] == [(one.title, one.id) for one in done.outcomes]
    assert after.text.splitlines()[2].split() == ["1", "eval", "full", "precision", "there", Path(there[0].path).name]


def test_a_layout_that_is_not_known_is_refused_before_any_work(recipe: Path, workspace: Workspace) -> None:
    with pytest.raises(UsageError, match="no format `latx`"):
        run(RunRequest(recipe, to="latx"), workspace)
    assert not workspace.home.exists()
