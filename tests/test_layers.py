"""Imports go down only, as `pyproject.toml` says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("module", "imported"), [("numerics.packing", "artifacts.store"), ("steps.pack", "builtin.exporters.hf")]
)
def test_an_import_upwards_or_of_a_built_in_would_be_seen(tmp_path: Path, module: str, imported: str) -> None:
    shutil.copytree(ROOT / "qtool", tmp_path / "qtool", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "qtool" / f"{module.replace('.', '/')}.py").open("a") as file:
        file.write(f"\nimport qtool.{imported}\n")
    done = lint(tmp_path)
    assert done.returncode != 0
    assert f"qtool.{module} -> qtool.{imported}" in done.stdout
