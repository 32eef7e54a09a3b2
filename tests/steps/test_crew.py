"""Tasks side by side: what one process gives, in the recipe's order, and nothing left behind by an error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.artifacts.store import Artifact
from qtool.errors import NumericalError, QtoolError, ResourceError
from qtool.steps.crew import Crew, crew_of, worked
from qtool.steps.run import RunRequest, run
from qtool.steps.tasks import Outcome, Task
from qtool.steps.workspace import Workspace
from qtool.testing import tiny_model

RECIPE = """
name: small
model: {model}
dtype: float32
calibrate: {{data: {text}, num_samples: 3, seq_len: 16, gather: [absmax], token_weight: uniform}}
matrix: {{transform: [smoothquant], mitigate: [rtn, gptq], scheme: [W4A4], seed: [0, 1]}}
eval: {{perplexity: [{text}], seq_len: 16, max_windows: 2}}
"""


class PeculiarError(Exception):
    """Cannot be made from its text, so it cannot travel."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def warns_and_fails(source: str, at: Workspace) -> tuple[Artifact, bool]:
    os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C reaches all processes of a terminal
    at.warn(f"{source} is odd with {torch.get_num_threads()} threads")
    warnings.warn("so is\nthe library", stacklevel=1)
    sys.stdout.write("said on standard output\n")
    sys.stdout.flush()
    raise NumericalError("not finite", facts=(("layer", "up"),), hint="use float32")


def fails_peculiarly(source: str, at: Workspace) -> tuple[Artifact, bool]:
    raise PeculiarError(1, 2)


def ends_its_process(source: str, at: Workspace) -> tuple[Artifact, bool]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def counts(source: str, at: Workspace) -> tuple[Artifact, bool]:
    list(at.progress(range(2), total=2, label="its own"))
    raise AssertionError


def sleeps(source: str, at: Workspace) -> tuple[Artifact, bool]:
    (at.home / "started").write_text(str(os.getpid()), encoding="utf-8")
    try:
        time.sleep(120)
    finally:
        (at.home / "started").unlink()
    raise AssertionError


def labels(*tasks: Task) -> dict[Task, str]:
    return {task: task.title for task in tasks}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    with tiny_model() as model:
        return replace(model.workspace, home=tmp_path)


def test_processes_give_what_one_gives(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on it, and processes share the threads of this one
    try:
        with tiny_model() as model:
            recipe = tmp_path / "small.yaml"
            recipe.write_text(RECIPE.format(model=model.path, text=model.path.parent / "text.txt"), encoding="utf-8")
            said: list[str] = []
            alone = run(RunRequest(recipe), replace(model.workspace, home=tmp_path / "alone"))
            together = run(RunRequest(recipe, jobs=2), replace(model.workspace, home=tmp_path / "two"), said.append)
    finally:
        torch.set_num_threads(threads)
    assert [one.id for one in together.outcomes] == [one.id for one in alone.outcomes]
    assert [one.title for one in together.outcomes] == [one.title for one in alone.outcomes]
    assert {one.state for one in together.outcomes} == {"done"}
    assert together.text == alone.text
    assert sorted(line.partition("]")[0] for line in said) == [f"[{i:>2}/13" for i in range(1, 14)]


def test_cells_that_come_to_the_same_are_made_once(tmp_path: Path) -> None:
    with tiny_model() as model:
        text = RECIPE.format(model=model.path, text=model.path.parent / "text.txt")
        recipe = tmp_path / "small.yaml"
        axes = "mitigate: [rtn], scheme: [W4A16-g8], token_weight: [uniform, inverse-norm, clip]"
        recipe.write_text(text.replace("mitigate: [rtn, gptq], scheme: [W4A4], seed: [0, 1]", axes), encoding="utf-8")
        result = run(RunRequest(recipe, jobs=3), replace(model.workspace, home=tmp_path / "home"))
    made = {one.title: one for one in result.outcomes}
    weights = ("uniform", "inverse-norm", "clip")
    assert len({made[f"mitigate smoothquant rtn W4A16-g8 {weight}"].id for weight in weights}) == 1
    assert not result.failures
    assert not list((tmp_path / "home").glob("*.partial"))


class Desk:
    """A crew whose tasks end when a test says so."""

    def __init__(self, places: int, workspace: Workspace) -> None:
        self.crew = Crew((workspace,) * places, self.submit)
        self.running: dict[str, Future[Outcome]] = {}
        self.sources: dict[str, str] = {}
        self.most = 0

    def submit(self, task: Task, source: str, at: Workspace) -> Future[Outcome]:
        del at
        self.sources[task.title] = source
        self.running[task.title] = future = Future()
        self.most = max(self.most, len(self.running))
        if len(self.running) == len(self.crew.places) or task.title == "d":
            self.end(next(iter(self.running)))
        return future

    def end(self, title: str) -> None:
        found = (
            Outcome(title, "failed", error=ValueError()) if title == "b" else Outcome(title, "done", path=f"{title}!")
        )
        self.running.pop(title).set_result(found)


@pytest.mark.parametrize("places", [1, 2])
def test_tasks_start_when_their_input_is_there_the_first_of_the_recipe_first(places: int, workspace: Workspace) -> None:
    def task(title: str, source: Task | None = None) -> Task:
        return Task(title, source, sleeps)

    a, b, c = task("a"), task("b"), task("c")
    of_a, of_b = task("of a", a), task("of b", b)
    of_of_b, d = task("of of b", of_b), task("d")
    desk = Desk(places, workspace)
    ended = []
    for one, outcome, _ in worked(labels(a, of_a, b, of_b, of_of_b, c, d), "model", desk.crew):
        ended.append((one.title, outcome.state))
        if len(ended) == 6 and desk.running:
            desk.end(next(iter(desk.running)))
    assert desk.most == places
    assert desk.sources == {"a": "model", "of a": "a!", "b": "model", "c": "model", "d": "model"}
    assert list(desk.sources) == (["a", "of a", "b", "c", "d"] if places == 1 else ["a", "b", "of a", "c", "d"])
    assert dict(ended) == dict.fromkeys(["a", "of a", "c", "d"], "done") | {
        "b": "failed",
        "of b": "skipped",
        "of of b": "skipped",
    }


def test_what_was_made_is_measured_before_more_is_made(workspace: Workspace) -> None:
    made = [Task(f"make {name}", None, counts) for name in "abc"]
    measured = [Task(f"measure {one.title[-1]}", one, counts, measures=True) for one in made]
    started: list[str] = []

    def submit(task: Task, source: str, at: Workspace) -> Future[Outcome]:
        del source, at
        started.append(task.title)
        future: Future[Outcome] = Future()
        future.set_result(Outcome(task.title, "done", path="made"))
        return future

    list(worked(labels(*made, *measured), "model", Crew((workspace,), submit)))
    assert started == ["make a", "measure a", "make b", "measure b", "make c", "measure c"]


def test_errors_and_warnings_come_back_from_a_process(workspace: Workspace, capfd: pytest.CaptureFixture[str]) -> None:
    one, other = Task("one", None, warns_and_fails), Task("other", None, fails_peculiarly)
    with crew_of(2, workspace) as crew:
        found = {outcome.title: outcome for _, outcome, _ in worked(labels(one, other), "model", crew)}
    threads = max(1, torch.get_num_threads() // 2)
    assert found["one"].warnings == (f"model is odd with {threads} threads", "so is the library")
    assert "said on standard output" not in capfd.readouterr().out
    error = found["one"].error
    assert isinstance(error, NumericalError)
    assert (error.message, error.facts, error.hint) == ("not finite", (("layer", "up"),), "use float32")
    assert "in warns_and_fails" in "".join(error.__notes__)
    assert type(found["other"].error) is QtoolError
    assert found["other"].error.message == "PeculiarError: 1 and 2"


def test_progress_is_that_of_the_task(workspace: Workspace) -> None:
    shown: list[str] = []

    def progress(items: Iterable[Any], *, total: int, label: str) -> Iterable[Any]:
        shown.append(f"{label} of {total}")
        return items

    with crew_of(1, replace(workspace, progress=progress)) as crew:
        list(worked({Task("one", None, counts): "[1/1] one"}, "model", crew))
    assert shown == ["[1/1] one of 2"]


def test_a_process_ended_from_outside_is_named(workspace: Workspace) -> None:
    with pytest.raises(ResourceError, match="ended from outside"), crew_of(2, workspace) as crew:
        list(worked(labels(Task("one", None, ends_its_process)), "model", crew))
    assert not active_children()


def test_an_error_ends_processes_that_still_work(workspace: Workspace) -> None:
    start = time.perf_counter()

    def interrupted() -> None:
        with crew_of(2, workspace) as crew:
            crew.submit(Task("one", None, sleeps), "model", crew.places[0])
            while not (workspace.home / "started").exists():
                time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not active_children()
    assert not (workspace.home / "started").exists()
    assert time.perf_counter() - start < 100


KILLED = """
import sys
from dataclasses import replace
from pathlib import Path
from qtool.steps.crew import crew_of, worked
from qtool.steps.environment import open_workspace
from qtool.steps.tasks import Task
from tests.steps.test_crew import labels, sleeps
with crew_of(2, replace(open_workspace(device="cpu"), home=Path(sys.argv[1]))) as crew:
    list(worked(labels(Task("one", None, sleeps)), "model", crew))
"""


def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[2])
    started = tmp_path / "started"
    deadline = time.monotonic() + 60
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = Path("/proc") / started.read_text() / "stat"
    assert is_running(child)
    parent.kill()
    parent.wait()
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process: Path) -> bool:
    """Read what Linux says of a process; one that ended may wait to be asked how."""
    try:
        return process.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("device", "spread"), [("cuda", [0, 1, 2, 0]), ("cuda:1", [1, 1, 1, 1]), ("cpu", [None] * 4)])
def test_processes_spread_over_all_devices_where_none_is_named(
    device: str, spread: list[int | None], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with crew_of(4, replace(workspace, device=torch.device(device))) as crew:
        assert [place.device.index for place in crew.places] == spread
