"""Exporters: from a quantized artifact to a checkpoint directory that a named consumer loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from qtool.engine.subject import Subject

UNREADABLE = "cannot be read"
"""How the words on a consumer begin that loads a checkpoint as something else, or not at all."""


@dataclass(frozen=True)
class Exported:
    """What an exporter wrote.

    Attributes:
        consumers: Consumer (``vllm``, ``transformers``, …) to what it will execute, in words; ``UNREADABLE`` and why
            where it cannot.
        details: Facts for the checkpoint's manifest: layout, stored bytes.
    """

    consumers: Mapping[str, str]
    details: Mapping[str, Any]


@runtime_checkable
class Exporter(Protocol):
    """Writes one checkpoint layout.

    Class attribute: ``version``, raised whenever written bytes change.
    """

    version: int

    def check(self, subject: Subject) -> None:
        """Refuse, before any work, what the layout cannot hold or its consumers cannot run.

        Raises:
            UsageError: Names what does not fit and the nearest that does.
        """

    def write(self, subject: Subject, directory: Path) -> Exported:
        """Write weights, config, tokenizer and whatever else the consumer expects into an empty directory."""

    def verify(self, subject: Subject, directory: Path) -> None:
        """Read back what was written: compare every code and scale, and rows that the consumer's own decoder reads.

        Raises:
            ArtifactError: A weight that was written, or that the consumer reads, differs from ours; names it.
        """
