"""Runs command lines in this process, and makes one artifact of each kind for the tests of a session."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from qtool.cli.app import main
from qtool.cli.session import CALM, NO_BARS


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    code: int
    out: str
    err: str


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


Run = Callable[..., Ended]


def run_line(*words: object, stdin: io.StringIO | str = "") -> Ended:
    """Run `qtool` with these words; what is no text already is written as text."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name, value in (CALM | NO_BARS).items():  # a command sets them for good
            patch.setenv(name, value)
        patch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        code = main([str(word) for word in words])
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def qtool() -> Run:
    return run_line


@pytest.fixture(scope="session")
def terminal() -> Callable[[], io.StringIO]:
    return Terminal


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Path]:
    """Paths of one small artifact of each kind, by kind."""
    folder = tmp_path_factory.mktemp("made")
    text = ("--seq-len", 64)
    lines = {
        "statistics": ("calibrate", "tiny", "--data", "speeches", "--num-samples", 4, *text),
        "plan": ("transform", folder / "statistics.safetensors", "--method", "quarot", "--set", "r4=false"),
        "quantized": ("mitigate", folder / "plan.safetensors", "--method", "gptq", "--scheme", "W4A16"),
        "metrics": ("eval", folder / "quantized.safetensors", "--perplexity", "speeches", "--max-windows", 2, *text),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTOOL_CACHE", str(cache))
        for kind, words in lines.items():
            ended = run_line(*words, "-o", folder / f"{kind}.safetensors")
            assert ended.code == 0, ended.err
        line = ("pack", folder / "quantized.safetensors", "--to", "compressed-tensors", "-o", folder / "checkpoint")
        ended = run_line(*line)
        assert ended.code == 0, ended.err
    return {**{kind: folder / f"{kind}.safetensors" for kind in lines}, "checkpoint": folder / "checkpoint"}
