"""What several tests of built-ins take."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

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
    folder = tmp_path_factory.mktemp("node")
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", PACKAGE]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"llama.cpp was not run: {PACKAGE} cannot be installed ({error})")
    return folder / "node_modules" / "node-llama-cpp"
