"""Every exporter leaves nothing behind when it is interrupted or the disk is full, and replaces nothing unasked."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qtool.builtin.exporters import gguf as gguf_exporter
from qtool.engine.subject import Subject
from qtool.errors import ResourceError, UsageError
from qtool.plugins import Plugins
from qtool.steps.pack import PackRequest, pack
from qtool.steps.workspace import Workspace
from tests.steps.conftest import Quantize, save_llama

WEIGHTS = {
    "awq": "int4-sym-g32",
    "compressed-tensors": "int4-sym-g32",
    "gguf": "int4-sym-g32",
    "gguf-f16": "int4-sym-g32",
    "gptq": "int4-sym-g32",
    "gptq-v2": "int4-sym-g32",
    "hf": "int4-sym-g32",
    "modelopt": "nvfp4",
    "peft": "int4-sym-g32",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), hidden=64, inner=64)


@pytest.fixture(autouse=True)
def no_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has no tokenizer, which GGUF files hold."""
    monkeypatch.setattr(gguf_exporter, "add_vocabulary", lambda *_: None)
    monkeypatch.setattr(gguf_exporter, "_check_model", lambda *_: None)


def quantized(quantize: Quantize, to: str) -> str:
    return quantize(WEIGHTS[to], "", "rtn+lorc", **{"lorc.rank": "2"}) if to == "peft" else quantize(WEIGHTS[to])


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_every_exporter_is_looked_at(found_plugins: Plugins) -> None:
    assert set(found_plugins.offers["exporters"]) == set(WEIGHTS)


@pytest.mark.parametrize("to", WEIGHTS)
@pytest.mark.parametrize("moment", ["while a block is written", "while it is read back"])
def test_ctrl_c_leaves_nothing_behind(
    quantize: Quantize, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, to: str, moment: str
) -> None:
    """The signal comes while the second block's linears are read, or once the writer is done."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell lets its jobs ignore it
    artifact = quantized(quantize, to)
    before = everything(tmp_path)
    exporter = workspace.plugins.load("exporters", to)
    writing = {"now": False, "seen": 0}

    def interrupted(read: Callable[[Subject, object], object]) -> Callable[[Subject, object], object]:
        def reading(subject: Subject, site: object) -> object:
            if writing["now"]:
                writing["seen"] += 1
                if writing["seen"] > 8:  # seven linears a block
                    os.kill(os.getpid(), signal.SIGINT)
            return read(subject, site)

        return reading

    class Watched:
        version = exporter.version
        check = staticmethod(exporter.check)

        @staticmethod
        def write(subject: Subject, directory: Path) -> object:
            writing["now"] = moment == "while a block is written"
            found = exporter.write(subject, directory)
            writing["now"] = True
            return found

        verify = staticmethod(exporter.verify)

    for name in ("linear", "packed"):
        monkeypatch.setattr(Subject, name, interrupted(getattr(Subject, name)))
    watched = replace(workspace, plugins=replace(workspace.plugins, _instances={("exporters", to): Watched()}))
    with pytest.raises(KeyboardInterrupt):
        pack(PackRequest(artifact, to, tmp_path / "new" / "folders" / "out"), watched)
    assert writing["seen"] > 8
    assert everything(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


@pytest.mark.parametrize("to", WEIGHTS)
def test_a_full_disk_leaves_nothing_behind(
    quantize: Quantize, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, to: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    artifact = quantized(quantize, to)
    before = everything(tmp_path)
    target = "shutil.copyfileobj" if to.startswith("gguf") else "qtool.builtin.exporters.shards.save_file"
    monkeypatch.setattr(target, full)
    with pytest.raises(ResourceError, match="no space left on the disk"):
        pack(PackRequest(artifact, to, tmp_path / "new" / "out"), workspace)
    assert everything(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("to", WEIGHTS)
def test_a_folder_that_is_there_is_not_overwritten_unasked(
    quantize: Quantize, workspace: Workspace, tmp_path: Path, to: str
) -> None:
    artifact = quantized(quantize, to)
    other = "hf" if to != "hf" else "compressed-tensors"
    old = pack(PackRequest(quantized(quantize, other), other, tmp_path / "out"), workspace)[0]
    before = everything(tmp_path / "out")
    with pytest.raises(UsageError, match="the output path is taken"):
        pack(PackRequest(artifact, to, tmp_path / "out"), workspace)
    assert everything(tmp_path / "out") == before
    new = pack(PackRequest(artifact, to, tmp_path / "out", force=True), workspace)[0]
    assert new.manifest.key != old.manifest.key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]
