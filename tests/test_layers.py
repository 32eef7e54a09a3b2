"""Imports go down only, as `pyproject.toml` says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(LINT, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def test_the_contracts_are_kept() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert re.search(r"[1-9]\d* kept, 0 broken", done.stdout)


def test_every_module_of_the_package_is_in_a_layer() -> None:
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    modules = {
        path.stem for path in (ROOT / "qtool").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert {layer.removeprefix("qtool.") for layer in layers} == modules - {"__init__", "__main__"}


def test_an_import_upwards_would_be_seen(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "qtool", tmp_path / "qtool", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "qtool" / "numerics" / "packing.py").open("a") as file:
        file.write("\nfrom qtool.artifacts import store\n")
    done = lint(tmp_path)
    assert done.returncode != 0
    assert "qtool.numerics.packing -> qtool.artifacts.store" in done.stdout
