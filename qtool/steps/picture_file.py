"""Pictures as files: which kinds there are, and writing one."""

from __future__ import annotations

import os
from pathlib import Path

from qtool.artifacts.store import disk_errors
from qtool.errors import PluginError, ResourceError, UsageError

SUFFIXES = ("png", "svg")


def needs_matplotlib(reason: ImportError) -> PluginError:
    """Return the error of a picture that cannot be drawn, since the extra ``plot`` is not installed."""
    return PluginError(
        "pictures need the package `matplotlib`", facts=(("reason", reason),), hint="pip install 'qtool[plot]'"
    )


def picture_suffix(output: Path) -> str:
    """Return the kind of picture.

    Raises:
        UsageError: It is another one.
        ResourceError: The folder of the picture is missing.
    """
    suffix, folder = output.suffix.lower().removeprefix("."), output.parent
    if suffix not in SUFFIXES:
        raise UsageError(
            f"cannot draw a picture of the kind `{output.name}`",
            facts=(("known", ", ".join(f".{one}" for one in SUFFIXES)),),
            hint=f"--plot {output.with_suffix('.png')}",
        )
    if not folder.is_dir():
        raise ResourceError(f"there is no folder `{folder}` to hold the picture", hint=f"mkdir -p {folder}")
    return suffix


def write_picture(path: Path, content: bytes) -> None:
    """Write the picture so that it is either the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
