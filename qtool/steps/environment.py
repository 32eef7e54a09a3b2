"""Where qtool works on this machine: folders from the environment, the device by name, and a workspace of both."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch

from qtool.errors import ResourceError, UsageError
from qtool.plugins import Plugins
from qtool.steps.workspace import Progress, Workspace, silent

VARIABLES: Mapping[str, str] = {
    "QTOOL_HOME": "artifacts that are given no name of their own",
    "QTOOL_CACHE": "fetched models",
    "QTOOL_DATA": "local copies of datasets",
}
"""Environment variables that name folders, and what lies there."""


@dataclass(frozen=True)
class Folders:
    """The folders of ``VARIABLES``; a variable that is empty counts as not set."""

    home: Path
    cache: Path
    data: Path | None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Folders:
        """Read the variables; without them ``./qtool-artifacts``, the user's cache folder, and no local data."""
        home, cache, data = (environ.get(name) for name in VARIABLES)
        return cls(
            home=Path(home or "qtool-artifacts").expanduser(),
            cache=Path(cache).expanduser() if cache else platformdirs.user_cache_path("qtool"),
            data=Path(data).expanduser() if data else None,
        )


def choose_device(name: str) -> torch.device:
    """Return the device of a name: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for CUDA where there is any.

    Raises:
        UsageError: No such name.
        ResourceError: This machine, or this build of torch, does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not index.isdecimal()):
        known = (("known", "auto, cpu, cuda, cuda:N"),)
        raise UsageError(f"unknown device `{name}`", facts=known, hint="--device auto")
    found = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= found:
        raise ResourceError(
            f"this machine has no device `{name}`", facts=(("CUDA devices", found),), hint="--device auto"
        )
    return torch.device(name)


def open_workspace(
    plugins: Plugins | None = None,
    *,
    device: str = "auto",
    inputs: Mapping[str, Path] | None = None,
    progress: Progress = silent,
    warn: Callable[[str], None] = lambda message: None,
    trust_remote_code: bool = False,
) -> Workspace:
    """Return a workspace with the plugins that are installed and the folders that the environment names.

    Args:
        plugins: What is on offer; found if not given.
        device: See ``choose_device``.
        inputs: Paths of inputs by role, where they are not to be searched for.
        progress: Shows how far a step is.
        warn: Is told what a user should know.
        trust_remote_code: Whether code beside a model's weights may run.
    """
    folders = Folders.from_environment(os.environ)
    return Workspace(
        plugins=plugins or Plugins.discover(),
        home=folders.home,
        cache=folders.cache,
        data=folders.data,
        device=choose_device(device),
        inputs=inputs or {},
        progress=progress,
        warn=warn,
        trust_remote_code=trust_remote_code,
    )
