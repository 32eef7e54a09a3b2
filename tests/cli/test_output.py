"""Where a command's words go, how exceptions become exit codes, and what happens when a user or a pipe leaves."""

from __future__ import annotations

import errno
import io
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from qtool.artifacts.store import Artifact, open_artifact
from qtool.cli.failures import explain
from qtool.cli.output import Bars, tables_console, write_artifact
from qtool.errors import ExitCode, GateError, NumericalError

Run = Callable[..., Any]
LINE = ("calibrate", "tiny")
STEP = "qtool.steps.calibrate.calibrate"


def no_room() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", "somewhere/x.safetensors")


EXPLAINED = {
    "ours": (GateError("a gate is not met"), 7, "a gate is not met", ""),
    "host memory": (MemoryError(), 6, "out of memory", "--batch 1"),
    "torch on the host": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"),
        6,
        "out of memory",
        "--batch",
    ),
    "torch on a device": (torch.OutOfMemoryError("CUDA out of memory"), 6, "out of memory", "--batch 1"),
    "disk": (no_room(), 6, "somewhere/x.safetensors", "QTOOL_HOME"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), 6, "no space left on the disk", "QTOOL_HOME"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "x"), 6, "does not allow it", "owner"),
    "bug": (ValueError("two\nlines"), 1, "unexpected ValueError", "this is a bug"),
    "other runtime error": (RuntimeError("shapes"), 1, "unexpected RuntimeError", "--debug"),
}


@pytest.mark.parametrize(("error", "code", "says", "hint"), EXPLAINED.values(), ids=EXPLAINED)
def test_every_exception_has_a_code_and_a_sentence(error: Exception, code: int, says: str, hint: str) -> None:
    explained = explain(error)
    assert explained.exit_code == ExitCode(code)
    assert says in str(explained)
    assert hint in explained.hint


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def step(request: object, workspace: object) -> NoReturn:
        raise error

    return step


def test_an_error_is_told_with_its_facts_and_a_hint(qtool: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    error = NumericalError("it is not finite", facts=(("expected", 1), ("got", "nan")), hint="--dtype float32")
    monkeypatch.setattr(STEP, raising(error))
    ended = qtool(*LINE)
    assert (ended.code, ended.out) == (5, "")
    assert ended.err == "error: it is not finite\n  expected  1\n  got       nan\nhint: --dtype float32\n"


def test_a_bug_is_one_sentence_and_a_traceback_only_on_request(qtool: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STEP, raising(ZeroDivisionError("division by zero")))
    ended = qtool(*LINE)
    assert (ended.code, ended.out) == (1, "")
    message, fact, place, hint = ended.err.splitlines()
    assert message == "error: unexpected ZeroDivisionError"
    assert fact.split(None, 1) == ["message", "division by zero"]
    assert "test_output.py:" in place
    assert "--debug" in hint
    debugged = qtool(*LINE, "--debug")
    assert (debugged.code, debugged.out) == (1, "")
    assert debugged.err.startswith("Traceback (most recent call last):\n")
    assert debugged.err.endswith(ended.err)


def test_ctrl_c_is_130_and_says_that_the_same_command_continues(qtool: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STEP, raising(KeyboardInterrupt()))
    ended = qtool(*LINE)
    assert (ended.code, ended.out) == (130, "")
    (line,) = ended.err.splitlines()
    assert "same command" in line
    assert "continues" in line


def test_a_closed_pipe_is_141_and_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    from qtool.cli.app import main

    said = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", said)
    assert main(["plugins", "--json"]) == 141
    assert said.getvalue() == ""
    sys.stdout.close()


def test_what_libraries_print_and_warn_never_reaches_standard_output(
    qtool: Run, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def chatty(request: object, workspace: Any) -> tuple[Artifact, bool]:  # noqa: ANN401
        sys.stdout.write("loading…\n")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("something is\nold", stacklevel=1)
        workspace.warn("scales vanish")
        return open_artifact(made["statistics"]), False

    monkeypatch.setattr(STEP, chatty)
    ended = qtool(*LINE)
    assert (ended.code, ended.out) == (0, f"{made['statistics']}\n")
    assert ended.err == "loading…\nwarning: something is old\nwarning: scales vanish\n"
    assert qtool(*LINE, "--quiet").err == "loading…\n"


def test_a_long_path_stays_on_one_line(
    made: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path.joinpath(*["a folder with a long name"] * 8, "plan.safetensors")
    path.parent.mkdir(parents=True)
    path.write_bytes(made["plan"].read_bytes())
    artifact = open_artifact(path)
    write_artifact(artifact, as_json=False, reused=False, metrics={})
    write_artifact(artifact, as_json=True, reused=True, metrics={"m": 0.5})
    plain, described = capsys.readouterr().out.splitlines()
    assert plain == str(path)
    identity = {"key": artifact.manifest.key, "id": artifact.manifest.id}
    assert json.loads(described) == {
        "path": str(path), "kind": "plan", **identity, "reused": True, "metrics": {"m": 0.5},
    }  # fmt: skip


def test_progress_is_shown_on_a_terminal_only_and_never_when_quiet(
    terminal: Callable[[], io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = range(3)
    for stream, quiet, shown in ((io.StringIO(), False, False), (terminal(), True, False), (terminal(), False, True)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(Bars(quiet=quiet)(layers, total=3, label="calibrate")) == [0, 1, 2]
        assert ("calibrate" in stream.getvalue()) == shown
        assert bool(stream.getvalue()) == shown


def test_tables_keep_their_width_outside_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert tables_console().width > 1000


def test_inspect_writes_one_object_whatever_is_inspected(qtool: Run, made: dict[str, Path]) -> None:
    for source in ("tiny", *made.values()):
        (line,) = qtool("inspect", source, "--json").out.splitlines()
        described = json.loads(line)
        people = qtool("inspect", source)
        assert people.code == 0
        assert str(described["path"]) in people.out


def test_doctor_and_plugins_write_one_object(qtool: Run) -> None:
    doctor = json.loads(qtool("doctor", "--json").out)
    assert [row["variable"] for row in doctor["folders"]] == ["QTOOL_HOME", "QTOOL_CACHE", "QTOOL_DATA"]
    plugins = json.loads(qtool("plugins", "mitigators", "--json").out)
    assert {row["kind"] for row in plugins["offers"]} == {"mitigators"}
    assert "gptq" in {row["name"] for row in plugins["offers"]}
    options = json.loads(qtool("plugins", "mitigators", "gptq+lorc", "--json").out)
    assert options["method"] == "gptq+lorc"
    assert {"gptq.block-size", "lorc.rank"} <= {row["option"] for row in options["options"]}
