"""What every test gets: one thread, no hub, folders of its own, and the same random examples on every run."""

from __future__ import annotations

import os
from pathlib import Path

# Read when torch and huggingface_hub are imported, here and in subprocesses, hence not in a fixture.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "qtool", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("qtool")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of fetched models, which the tests of one run share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Let what a test draws not depend on the tests that ran before it in the same process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    """Let no test see or touch what belongs to the user."""
    monkeypatch.setenv("QTOOL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("QTOOL_CACHE", str(cache))
    monkeypatch.delenv("QTOOL_DATA", raising=False)
