"""What the tests of exporters do with them."""

from __future__ import annotations

from pathlib import Path

from qtool.engine.exporter import Exported, Exporter
from qtool.engine.subject import Subject


def written(exporter: Exporter, subject: Subject, directory: Path) -> Exported:
    """Do what the step does, without the manifest."""
    directory.mkdir()
    exporter.check(subject)
    exported = exporter.write(subject, directory)
    exporter.verify(subject, directory)
    return exported
