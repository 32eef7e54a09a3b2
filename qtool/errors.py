"""Every error that qtool raises on purpose, and the exit code that each one ends a command with.

    QtoolError                    1  a defect of qtool itself
    ├── UsageError                2  the user asked for something that cannot be
    │   └── SchemeError           2  a scheme string does not parse or does not fit a layer
    ├── ArtifactError             3  an artifact or model is missing, damaged, stale or about something else
    │   ├── ModelError            3  a model cannot be found or read
    │   └── DataError             3  calibration or evaluation text cannot be found or used
    ├── PluginError               4  a plugin is unknown, broken or collides with another
    ├── NumericalError            5  values are not finite, or a matrix cannot be factorized
    │   └── ShapeError            5  tensors do not fit each other
    ├── ResourceError             6  disk, memory or network is not there
    ├── GateError                 7  a ``--require`` gate is not met
    └── ConsumerError             8  a checkpoint does not run as its config says

An error says what happened in lower case without a full stop, then facts (expected before received), then at
most one hint that can be pasted. Only ``qtool.cli`` prints them.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a process tells the shell that started it."""

    OK = 0
    BUG = 1
    USAGE = 2
    ARTIFACT = 3
    PLUGIN = 4
    NUMERICAL = 5
    RESOURCE = 6
    GATE = 7
    CONSUMER = 8
    INTERRUPTED = 130
    CLOSED_PIPE = 141


class QtoolError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: What happened, one lower-case line without a full stop; literals in backticks.
        facts: ``(label, value)`` pairs, printed one a line below the message, expected before received.
        hint: One thing to do next, as a command or a value that can be pasted.
    """

    exit_code = ExitCode.BUG

    def __init__(self, message: str, *, facts: tuple[tuple[str, object], ...] = (), hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts
        self.hint = hint

    def __str__(self) -> str:
        width = max((len(label) for label, _ in self.facts), default=0)
        lines = [self.message, *(f"  {label:<{width}}  {value}" for label, value in self.facts)]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class UsageError(QtoolError):
    """The request itself cannot be carried out: an option, a value or a combination is wrong."""

    exit_code = ExitCode.USAGE


class SchemeError(UsageError):
    """A scheme string does not parse, or a scheme does not fit the layer that it is asked of."""


class ArtifactError(QtoolError):
    """An artifact is missing, damaged, of the wrong kind or schema, or about another model."""

    exit_code = ExitCode.ARTIFACT


class ModelError(ArtifactError):
    """A model cannot be found, read or understood."""


class DataError(ArtifactError):
    """Calibration or evaluation text cannot be found, or is too short for what is asked."""


class PluginError(QtoolError):
    """A plugin is unknown, fails to import, or two of them provide one name."""

    exit_code = ExitCode.PLUGIN


class NumericalError(QtoolError):
    """A tensor holds NaN or Inf, or a factorization fails even after escalation."""

    exit_code = ExitCode.NUMERICAL


class ShapeError(NumericalError):
    """Tensors or sizes do not fit each other."""


class ResourceError(QtoolError):
    """The disk is full, memory does not suffice, or the network cannot be reached."""

    exit_code = ExitCode.RESOURCE


class GateError(QtoolError):
    """A metric is outside the bound that ``--require`` set."""

    exit_code = ExitCode.GATE


class ConsumerError(QtoolError):
    """A consumer will not load a checkpoint, executes something else than its config says, or nobody knows."""

    exit_code = ExitCode.CONSUMER
