"""Paths that come through a pipe: a positional that is missing, or ``-``, is read from standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qtool.errors import UsageError

DASH = "-"


def read_source(argument: str | None) -> str:
    """Return the one path, model name or hub id that a command works on.

    Raises:
        UsageError: Nothing was given, an empty path, or several lines where one is wanted.
    """
    if argument is not None and argument != DASH:
        return _checked(argument)
    lines = _read_lines()
    if len(lines) > 1:
        raise UsageError(
            "this command takes one path, and standard input holds several",
            facts=(("lines expected", 1), ("lines received", len(lines))),
            hint="xargs -n 1 runs a command once a line",
        )
    return lines[0]


def read_sources(arguments: Sequence[str] | None) -> tuple[str, ...]:
    """Return the paths that a command works on; ``-`` stands for the lines of standard input.

    Raises:
        UsageError: Nothing was given, or an empty path.
    """
    sources: list[str] = []
    for argument in arguments or (DASH,):
        sources += _read_lines() if argument == DASH else [_checked(argument)]
    return tuple(sources)


def _read_lines() -> list[str]:
    """Return the lines of standard input; a terminal is not waited for."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(
            "nothing was given to work on",
            hint="give a path or a model, or pipe another qtool command into this one; --help says more",
        )
    lines = [line.strip() for line in sys.stdin]
    return [_checked(line) for line in lines or [""]]


def _checked(path: str) -> str:
    if not path.strip():
        raise UsageError(
            "an empty path was given; the command before this one failed", hint="look at the message of that command"
        )
    return path
