"""How a command fails: every exception becomes an exit code, a sentence with its facts, and one hint."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path

from typer import TyperException

from qtool.cli.output import say
from qtool.errors import ExitCode, QtoolError, ResourceError, UsageError

DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
OUT_OF_MEMORY = "OutOfMemoryError"
CPU_ALLOCATOR = "DefaultCPUAllocator"
INTERRUPTED = "interrupted; the same command, run again, continues from the blocks that are finished, if it keeps any"


def explain(error: Exception) -> QtoolError:
    """Return an exception as an error that users can act on; what nobody expected is a bug of qtool."""
    if isinstance(error, QtoolError):
        return error
    if isinstance(error, TyperException):
        return _misuse(error)
    if _is_memory(error):
        hint = "--batch 1, a shorter --seq-len, or --device cpu"
        return ResourceError("out of memory", facts=(("reason", _first_line(error)),), hint=hint)
    if isinstance(error, OSError) and error.errno in DISK | DENIED:
        full = error.errno in DISK
        return ResourceError(
            "no space left on the disk" if full else "the system does not allow it",
            facts=(("file", error.filename or "unknown"), ("reason", os.strerror(error.errno or 0))),
            hint="free some space, or set QTOOL_HOME to another disk"
            if full
            else "check the owner of the file or folder",
        )
    return QtoolError(
        f"unexpected {type(error).__name__}",
        facts=(("message", _first_line(error)), ("raised in", _place(error))),
        hint="this is a bug; run the command again with --debug and report what it prints",
    )


def report_failure(error: Exception, *, debug: bool) -> ExitCode:
    """Say on standard error what happened, and return the exit code."""
    if debug:
        traceback.print_exception(error)
    explained = explain(error)
    body, _, hint = str(explained).partition("\nhint: ")
    say("error", body)
    if hint:
        say("hint", hint)
    return explained.exit_code


def report_interruption() -> ExitCode:
    """Say that nothing is lost."""
    sys.stderr.write("\n" if sys.stderr.isatty() else "")
    say("error", INTERRUPTED)
    return ExitCode.INTERRUPTED


def silence_streams() -> ExitCode:
    """Point standard output at nothing, so that the interpreter's last flush into a closed pipe says nothing."""
    sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
    return ExitCode.CLOSED_PIPE


def _misuse(error: TyperException) -> QtoolError:
    """Return Typer's refusal of a command line in qtool's words."""
    context = getattr(error, "ctx", None)
    help_command = f"{context.command_path if context is not None else 'qtool'} --help"
    possible = tuple(getattr(error, "possibilities", None) or ())
    if possible:
        option = getattr(error, "option_name", "?")
        return UsageError(f"no such option: `{option}`", hint=f"did you mean `{possible[0]}`?")
    stated = error.format_message() if hasattr(error, "format_message") else str(error)
    text, _, near = " ".join(stated.split()).replace("'", "`").partition(" Did you mean ")
    hint = f"did you mean {near}" if near else help_command
    return UsageError(text[:1].lower() + text[1:].rstrip("."), hint=hint)


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out, on the host or on a device; torch is not imported to find out."""
    if isinstance(error, MemoryError) or any(c.__name__ == OUT_OF_MEMORY for c in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "none").splitlines()[0]


def _place(error: Exception) -> str:
    """Return file and line of the innermost frame, without folders."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown"
