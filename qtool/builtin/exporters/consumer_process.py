"""Consumers' own code reads a checkpoint in a process of its own, where the package is installed.

GPTQModel changes transformers, safetensors, the environment and standard output when it is imported: none of that is
let into this process, and where it is not installed nothing is started. With GPTQModel the process takes 4 s to start,
with ModelOpt 7 s, of which torch takes 2 to 3 (one core, 2026-11-28). It holds some rows of one linear.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from qtool.builtin.exporters.read_back import telling_rows, weight_difference
from qtool.engine.grid import Grid
from qtool.engine.packed import PackedLinear
from qtool.errors import ArtifactError

_PROGRAM = "qtool.builtin.exporters.consumer_code"
_OWN = "qtool's own reader"
_PATIENCE = 900.0
"""Seconds; importing takes 10, and an answer less than one."""


@dataclass(frozen=True)
class ConsumerReader:
    """What reads a checkpoint back.

    Attributes:
        said: Whose code it is: ``gptqmodel 7.7.0``, or ``qtool's own reader`` and why.
        ask: Has the consumer's code read something of a linear, whose name comes first; None where it is not there.
    """

    said: str
    ask: Callable[..., list[Tensor]] | None = None

    def compare_rows(self, linear: str, stored: str, ours: PackedLinear, grid: Grid) -> None:
        """Have rows of a linear decoded, and compare them with ours.

        Args:
            linear: Its name.
            stored: What files call it.
            ours: What was packed.
            grid: How it is decoded.

        Raises:
            ArtifactError: They differ, or the consumer cannot read them.
        """
        if self.ask is None:
            return
        for rows in telling_rows(ours, 1):
            own = ours.rows(rows).weight(grid)
            (decoded,) = self.ask(linear, stored, rows, len(ours.stream))
            if decoded.shape != own.shape or not torch.equal(decoded, own):
                raise weight_difference(linear, decoded, own)


@contextmanager
def consumer_reader(package: str, directory: Path, *arguments: object, **options: object) -> Iterator[ConsumerReader]:
    """Give a package's reader of a checkpoint; its process ends with the block.

    Args:
        package: A distribution that ``consumer_code`` has a reader for.
        directory: The checkpoint.
        arguments: What that reader wants to know besides.
        options: Likewise.
    """
    try:
        installed = f"{package} {version(package)}"
    except PackageNotFoundError:
        yield ConsumerReader(f"{_OWN}: {package} is not installed")
        return
    with _process(package) as connection:
        reason = _answer(connection, directory, *arguments, **options)
        if isinstance(reason, str):
            yield ConsumerReader(f"{_OWN}: {installed} did not open it ({reason})")
            return

        def ask(linear: str, *further: object) -> list[Tensor]:
            answer = _answer(connection, linear, *further)
            if isinstance(answer, str):
                raise ArtifactError(
                    f"{installed} cannot read `{linear}` back",
                    facts=(("reason", answer),),
                    hint=f"pack again; where {package} is not installed qtool reads it back alone",
                )
            return answer

        yield ConsumerReader(installed, ask)


@contextmanager
def _process(package: str) -> Iterator[Connection]:
    """Start the program, which shows nothing, does not see Ctrl-C and uses no device."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            (sys.executable, "-m", _PROGRAM, package, str(theirs.fileno())),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path)), "CUDA_VISIBLE_DEVICES": ""},
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        try:
            with Connection(ours.detach()) as connection:
                yield connection
        finally:
            process.kill()
            process.wait()


def _answer(connection: Connection, *arguments: object, **options: object) -> list[Tensor] | str:
    """Return what the process answers, or why it does not."""
    try:
        connection.send((arguments, options))
        if not connection.poll(_PATIENCE):
            return f"it did not answer for {_PATIENCE:g} s"
        answer = connection.recv()
    except (OSError, EOFError):
        return "its process ended"
    return answer if isinstance(answer, str) else [torch.from_numpy(one) for one in answer]
