"""Whole processes, measured from outside: wall time and peak memory.

This process must stay small: Linux hands the peak of the parent on to a child, so that a benchmark that imported torch
would report its own memory as that of every process it starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIB = 1 << 20
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
_NOISE = 4000  # characters of a failed process's stderr that are worth showing


@dataclass(frozen=True)
class Cost:
    """What a process took.

    Attributes:
        seconds: From start to exit, imports and files included.
        peak: Largest resident set, in bytes; pages of mapped files count.
        output: What it wrote to standard output, without the last line feed.
    """

    seconds: float
    peak: int
    output: str


def measure(command: Sequence[str], environ: Mapping[str, str], cores: Sequence[int]) -> Cost:
    """Run a command to its end on some cores.

    Args:
        command: Program and arguments.
        environ: Variables beside those of this process.
        cores: Numbers of the cores that it may use; as many threads are allowed.

    Returns:
        What it took.

    Raises:
        RuntimeError: It failed.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(len(cores)))
    settings = {**os.environ, **threads, "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", **environ}
    before = available_cores()
    pin(cores)
    start = time.perf_counter()
    try:
        with subprocess.Popen(
            list(command), env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            output, errors = process.communicate_and_wait() if False else _drain(process)
    finally:
        pin(before)
    raise NotImplementedError
