"""What several tests of built-ins take."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from tests.builtin.llama_cpp import PACKAGE


@pytest.fixture(scope="session")
def node_llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the package with its prebuilt binary, installed unless QTOOL_NODE_LLAMA_CPP names one."""
    given = os.environ.get("QTOOL_NODE_LLAMA_CPP")
    if given:
        return Path(given)
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("llama.cpp was not run: node and npm are not installed")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "node"  # which all workers share
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", PACKAGE]
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            try:
                subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                shutil.rmtree(folder)
                pytest.skip(f"llama.cpp was not run: {PACKAGE} cannot be installed ({error})")
    return folder / "node_modules" / "node-llama-cpp"
