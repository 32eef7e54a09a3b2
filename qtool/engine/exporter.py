"""Exporters: from a quantized artifact to a checkpoint directory that a named consumer loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from qtool.engine.subject import Subject
from qtool.plugins import Plugins

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

    def verify(self, subject: Subject, directory: Path) -> str:
        """Read back what was written: compare every code and scale, and rows that the consumer's own decoder reads.

        Returns:
            Whose code read it, in words: ``gptqmodel 7.7.0``, or ``qtool's own reader`` and why not the consumer's.

        Raises:
            ArtifactError: A weight that was written, or that the consumer reads, differs from ours; names it.
        """


@runtime_checkable
class PackedReader(Protocol):
    """An exporter that reads checkpoints too, for other exporters to write; its name is their ``quant_method``."""

    def open(self, directory: Path, plugins: Plugins, *, cache: Path, identity: str = "") -> Subject:
        """Open a packed checkpoint, whoever wrote it, as what is to be packed.

        Args:
            directory: The checkpoint.
            plugins: Where families and formats are found.
            cache: Where digests of large files are remembered.
            identity: What the original model is called; the checkpoint's own digest if empty.

        Raises:
            SchemeError: It has more than codes and scales, or a scheme that is not read back.
            ArtifactError: Something is quantized that qtool does not quantize, or has more than codes and scales.
        """

    def check_scales(self, subject: Subject, to: str) -> int:
        """Refuse scales that another exporter would turn into other weights.

        Args:
            subject: What ``open`` returned.
            to: Name of the other exporter.

        Returns:
            How many scales it stores with an error in the last bit.

        Raises:
            NumericalError: A weight would differ; names the linear.
        """
