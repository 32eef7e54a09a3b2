"""Whole processes, measured from outside: wall time and peak memory.

The process that starts them must stay small, hence imports no torch: Linux lets a new process inherit the peak of the
one that started it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True)
class Cost:
    """What a process took.

    Attributes:
        seconds: From start to exit, imports and files included.
        peak: Largest resident set in bytes; pages of mapped files count as well.
        output: Standard output without white space around it.
    """

    seconds: float
    peak: int
    output: str


def use_cores(count: int) -> int:
    """Confine this process, and all that it starts, to so many cores; return how many it got."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
        count = len(os.sched_getaffinity(0))
    os.environ.update(dict.fromkeys(_THREADS, str(count)))
    return count


def measure(command: Sequence[str], environ: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end, on the CPU.

    Args:
        command: Program and arguments.
        environ: Variables beside those of this process.

    Raises:
        SystemExit: It failed; the end of its standard error is shown.
    """
    settings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **(environ or {})}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=settings, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            sys.stderr.write(errors.read()[-4000:])
            raise SystemExit(f"error: exit {process.returncode} from {' '.join(command)}")
        return Cost(seconds, usage.ru_maxrss * _MAXRSS_UNIT, output.read().strip())


def qtool(*words: str, home: Path) -> Cost:
    """Run a step; its output is the path of what it made."""
    return measure([sys.executable, "-m", "qtool", *words, "--quiet"], {"QTOOL_HOME": str(home)})
