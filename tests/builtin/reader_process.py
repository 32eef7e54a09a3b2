"""A Python process of another library, which is asked again and again: what it imports takes longer than an answer."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from threading import Timer
from typing import Any

ANSWER = "ANSWER "
"""What a line of the process begins with that is an answer, in JSON; all others are the library's own."""


class ReaderProcess:
    """Starts at the first question, and again after it ended.

    Args:
        command: What to start. It reads a question a line, in JSON, and writes an answer a line.
        environment: Its environment variables.
        log: A file for what it writes to stderr.
    """

    def __init__(self, command: tuple[str | Path, ...], environment: Mapping[str, str], log: Path) -> None:
        self.command, self.environment, self.log = command, environment, log
        self.process: subprocess.Popen[str] | None = None

    def ask(self, question: object, *, seconds: float) -> Any:  # noqa: ANN401 - anything that JSON holds
        """Return the answer; a process that takes longer is killed, and one that ended fails the test."""
        if self.process is None or self.process.poll() is not None:
            with self.log.open("a") as log:
                pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
                self.process = subprocess.Popen(self.command, env=self.environment, text=True, **pipes)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = Timer(seconds, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                _, found, answer = line.partition(ANSWER)  # behind what a library wrote without ending the line
                if found:
                    return json.loads(answer)
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
        self.process.wait()
        raise AssertionError(f"{self.command[0]} ended: {self.log.read_text()[-4000:]}")

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
