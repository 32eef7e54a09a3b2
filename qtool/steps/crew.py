"""Who does the tasks of a run: this process, one after the other, or processes of their own, side by side."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait as wait_for
from threading import Thread
from typing import TypeVar

import torch

from qtool.errors import QtoolError, ResourceError
from qtool.steps.tasks import Outcome, Task, ended
from qtool.steps.workspace import Progress, Workspace, silent

T = TypeVar("T")
_PATIENCE = 20.0
"""Seconds that a process has to end what it is at, and to clean up, when a run is interrupted."""


@dataclass(frozen=True)
class Crew:
    """Takes as many tasks at once as it has places.

    Attributes:
        places: Where tasks work; one place has one task at a time.
        submit: Has a task done on the path of its input, or on a model, at a place.
    """

    places: tuple[Workspace, ...]
    submit: Callable[[Task, str, Workspace], Future[Outcome]]


@dataclass(frozen=True)
class _Labelled:
    """Progress that says which task of the run it belongs to."""

    progress: Progress
    title: str

    def __call__(self, items: Iterable[T], *, total: int, label: str) -> Iterable[T]:
        """Count the items of any label."""
        del label
        return self.progress(items, total=total, label=self.title)


@contextmanager
def crew_of(jobs: int, workspace: Workspace) -> Iterator[Crew]:
    """Open a crew for as long as a run lasts; processes that still work when it is left by an error are ended.

    Args:
        jobs: Tasks at once; 1 works in this process.
        workspace: Where. Processes spread over all CUDA devices unless it names one, and over the processor's cores;
            they show no progress.
    """
    if jobs == 1:
        yield Crew((workspace,), _at_once)
        return
    others = set(active_children())
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_follow_parent)
    travelling = replace(workspace, progress=silent, warn=_untold)
    places = tuple(replace(travelling, device=device) for device in islice(cycle(_devices(workspace.device)), jobs))
    work = partial(_elsewhere, threads=max(1, torch.get_num_threads() // jobs))
    try:
        yield Crew(places, lambda task, source, place: pool.submit(work, task, source, place))
    except BaseException:
        processes = set(active_children()) - others
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(_PATIENCE)
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def worked(labels: Mapping[Task, str], model: str, crew: Crew) -> Iterator[tuple[Task, Outcome, float]]:
    """Have tasks done as their inputs come; yield each as it ends, with its seconds.

    What measures goes first, so that a run that is stopped has measured what it made; then what is in front.

    Args:
        labels: The tasks in an order in which inputs come first, and what their progress is called.
        model: What tasks without a source work on.
        crew: Who does them.

    Raises:
        ResourceError: A process was ended from outside.
    """
    outcomes: dict[Task, Outcome] = {}
    free = list(crew.places)
    waiting = list(labels)
    running: dict[Future[Outcome], tuple[Task, Workspace, float]] = {}
    while waiting or running:
        ready = [one for one in waiting if one.source is None or one.source in outcomes]
        for task in sorted(ready, key=lambda one: not one.measures):
            source = model if task.source is None else outcomes[task.source].path
            if not source:
                outcomes[task] = Outcome(task.title, "skipped")
                yield task, outcomes[task], 0.0
            elif free:
                place, start = free.pop(0), time.perf_counter()
                labelled = replace(place, progress=_Labelled(place.progress, labels[task]))
                running[crew.submit(task, source, labelled)] = (task, place, start)
            else:
                break
            waiting.remove(task)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task, place, start = running.pop(future)
            free.append(place)
            outcomes[task] = _result(future, task)
            yield task, outcomes[task], time.perf_counter() - start


def _result(future: Future[Outcome], task: Task) -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ResourceError(
            "a process of the run was ended from outside",
            facts=(("while", task.title),),
            hint="--jobs 1  # if memory ran out; run again, it goes on from what is finished",
        ) from error


def _attempt(task: Task, source: str, workspace: Workspace) -> Outcome:
    try:
        artifact, reused = task.start(source, workspace)
    except Exception as error:  # a plugin's method may raise anything, and the other cells must go on
        return Outcome(task.title, "failed", error=error)
    return ended(task, artifact, "reused" if reused else "done")


def _at_once(task: Task, source: str, workspace: Workspace) -> Future[Outcome]:
    future: Future[Outcome] = Future()
    future.set_result(_attempt(task, source, workspace))
    return future


def _elsewhere(task: Task, source: str, workspace: Workspace, *, threads: int) -> Outcome:
    """Do a task in a process of its own; what it or a library warns of travels back with its outcome."""
    torch.set_num_threads(threads)
    said: list[str] = []
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.showwarning = lambda message, *about, **further: said.append(" ".join(str(message).split()))
        outcome = _attempt(task, source, replace(workspace, warn=said.append))
    error = None if outcome.error is None else _travelling(outcome.error)
    if workspace.device.type == "cuda":
        torch.cuda.empty_cache()  # others work on this device
    return replace(outcome, error=error, warnings=tuple(said))


def _travelling(error: Exception) -> Exception:
    """Return an error that another process can read, with its traceback as a note."""
    try:
        found: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # a stranger's exception may want arguments of its own, or hold what cannot travel
        found = QtoolError(" ".join(f"{type(error).__name__}: {error}".split()))
    found.add_note("".join(traceback.format_exception(error)))
    return found


def _devices(device: torch.device) -> list[torch.device]:
    """Return the devices that processes share: every CUDA device where none is named."""
    if device.type == "cuda" and device.index is None:
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device]


def _follow_parent() -> None:
    """Let Ctrl-C reach the process that a user started, which then stops this one; end when that one is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *about: sys.exit(1))  # so that what is half written is cleaned up
    Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _untold(message: str) -> None:
    del message
