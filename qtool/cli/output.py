"""What goes where: a command's result to standard output, everything that is said about it to standard error.

A step prints exactly one line, the absolute path of its artifact, or one JSON object. A result is written plainly:
rich would wrap a long path.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from qtool.artifacts.store import Artifact

T = TypeVar("T")

STYLES = {"error": "bold red", "warning": "bold yellow", "hint": "bold cyan", "note": "bold"}
_WIDE = 4096


def write_line(text: str) -> None:
    """Write one line to standard output at once, so that a closed pipe is noticed here."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def write_json(value: Mapping[str, Any]) -> None:
    """Write one JSON object on one line."""
    write_line(json.dumps(value, ensure_ascii=False, allow_nan=False))


def write_artifact(artifact: Artifact, *, as_json: bool, reused: bool, metrics: Mapping[str, float]) -> None:
    """Write the one line of a step: the artifact's absolute path, or an object that describes it."""
    path = str(artifact.path.resolve())
    if not as_json:
        write_line(path)
        return
    manifest = artifact.manifest
    described = {"path": path, "kind": manifest.kind, "key": manifest.key, "id": manifest.id}
    write_json({**described, "reused": reused, "metrics": dict(metrics)})


def tables_console() -> Console:
    """Return where tables for people are drawn; into a pipe or file they keep their natural width."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDE)


def say(label: str, message: str) -> None:
    """Say something on standard error; the label (``warning``, …) is coloured on a terminal."""
    console = Console(stderr=True)
    console.print(Text.assemble((f"{label}:", STYLES.get(label, "")), f" {message}"), soft_wrap=True, highlight=False)


def say_values(values: Mapping[str, float]) -> None:
    """Say measured values on standard error, one a line."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        sys.stderr.write(f"{name:<{width}}  {value:.6g}\n")


@contextmanager
def kept_clean(*, quiet: bool) -> Iterator[None]:
    """Keep what libraries print away from standard output, and show their warnings as qtool's own."""

    def shown(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        del category, filename, lineno, file, line
        if not quiet:
            say("warning", " ".join(str(message).split()))

    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.showwarning = shown
        yield


class Bars:
    """Progress bars on standard error: only on a terminal, and never when quiet.

    Args:
        quiet: Whether to show nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.shown = not quiet and sys.stderr.isatty()

    def __call__(self, items: Iterable[T], *, total: int, label: str) -> Iterable[T]:
        """Yield the items, counting them."""
        if not self.shown:
            return items
        return self._counted(items, total, label)

    def _counted(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        # redirect_stdout=False: standard output is kept clean already, and belongs to the result.
        with Progress(*columns, *times, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
            yield from bar.track(items, total=total, description=label)


def warner(*, quiet: bool) -> Callable[[str], None]:
    """Return what tells a user something that is no error."""

    def warn(message: str) -> None:
        if not quiet:
            say("warning", message)

    return warn
