"""Artifacts are whole or absent, survive a crash, and are checked when they are opened."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.artifacts import store
from qtool.artifacts.manifest import Manifest
from qtool.artifacts.store import Artifact, ArtifactWriter, disk_errors, open_artifact, write_atomically
from qtool.errors import ArtifactError, NumericalError, ResourceError, UsageError

Blocks = dict[str, dict[str, Tensor]]
Write = Callable[[Path], Artifact]


@pytest.fixture
def write(manifest: Manifest, blocks: Blocks) -> Write:
    def write(path: Path) -> Artifact:
        writer = ArtifactWriter(path, manifest)
        writer.begin()
        for name, tensors in blocks.items():
            writer.add(name, tensors, {"loss": "0.5"})
        return writer.finish(manifest)

    return write


@pytest.fixture
def artifact(write: Write, tmp_path: Path) -> Artifact:
    return write(tmp_path / "q.safetensors")


def same(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and one.tolist() == two.tolist()


def test_what_is_written_reads_back(artifact: Artifact, blocks: Blocks) -> None:
    found = open_artifact(artifact.path)
    assert found.manifest == artifact.manifest
    assert found.names() == tuple(sorted(name for tensors in blocks.values() for name in tensors))
    for block, tensors in blocks.items():
        assert found.names(f"{block}.") == tuple(sorted(tensors))
        read = found.tensors(f"{block}.")
        assert set(read) == {name.removeprefix(f"{block}.") for name in tensors}
        for name, tensor in tensors.items():
            assert same(found.tensor(name), tensor)
            assert same(read[name.removeprefix(f"{block}.")], tensor)
    found.verify()


def test_nothing_but_the_artifact_is_left(artifact: Artifact, tmp_path: Path) -> None:
    assert [path for path in tmp_path.iterdir() if path.name != "home"] == [artifact.path]


def test_the_library_reads_the_artifact(artifact: Artifact, blocks: Blocks) -> None:
    read = load_file(artifact.path)
    expected = {name: tensor for tensors in blocks.values() for name, tensor in tensors.items()}
    assert set(read) == set(expected)
    assert all(same(read[name], tensor) for name, tensor in expected.items())


def test_the_manifest_is_the_only_metadata(artifact: Artifact) -> None:
    assert set(artifact.header.metadata) == {"qtool"}
    assert json.loads(artifact.header.metadata["qtool"])["id"] == artifact.manifest.id


def test_equal_inputs_give_equal_bytes_and_ids(write: Write, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, two = write(tmp_path / "one.safetensors"), write(tmp_path / "other" / "two.safetensors")
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.manifest.id == two.manifest.id


def test_the_id_follows_the_tensors_and_neither_time_nor_cut(
    manifest: Manifest, blocks: Blocks, write: Write, tmp_path: Path
) -> None:
    first = write(tmp_path / "a.safetensors").manifest
    later = replace(manifest, about={"created": "2031-01-01T00:00:00Z"})
    writer = ArtifactWriter(tmp_path / "b.safetensors", later)
    writer.begin()
    writer.add("all", {name: tensor for tensors in blocks.values() for name, tensor in tensors.items()})
    assert writer.finish(later).manifest.id == first.id
    writer = ArtifactWriter(tmp_path / "c.safetensors", manifest)
    writer.begin()
    blocks["layers.0"]["layers.0.scale"] += 1e-3
    writer.add("layers.0", blocks["layers.0"])
    writer.add("layers.1", blocks["layers.1"])
    third = writer.finish(manifest).manifest
    assert (third.key, third.id == first.id) == (first.key, False)


def test_tensors_that_share_memory_or_lie_transposed_are_written_as_they_read(
    manifest: Manifest, tmp_path: Path
) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": matrix, "b": matrix, "transposed": matrix.T, "row": matrix[1], "grad": matrix.requires_grad_()}
    writer = ArtifactWriter(tmp_path / "q.safetensors", manifest)
    writer.begin()
    writer.add("part", tensors)
    artifact = writer.finish(manifest)
    assert all(same(artifact.tensor(name), tensor.detach()) for name, tensor in tensors.items())


# Damage


def flip(artifact: Artifact, name: str) -> None:
    """Change one bit of a tensor in the file."""
    with artifact.path.open("r+b") as file:
        file.seek(artifact.header.slots[name].start)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", ["layers.0.codes", "layers.1.hessian", "layers.1.count", "layers.0.half"])
def test_one_altered_bit_is_found_and_named(artifact: Artifact, name: str) -> None:
    flip(artifact, name)
    with pytest.raises(ArtifactError, match=f"tensor `{name}` .* was changed after it was written"):
        open_artifact(artifact.path).verify()


def rewrite_header(artifact: Artifact, old: str, new: str) -> None:
    """Put other text of the same length into the header."""
    content = artifact.path.read_bytes()
    assert len(old) == len(new)
    assert content.count(old.encode()) >= 1
    artifact.path.write_bytes(content.replace(old.encode(), new.encode()))


def test_an_altered_shape_or_type_is_found(artifact: Artifact, write: Write, tmp_path: Path) -> None:
    rewrite_header(artifact, '"shape":[3,5]', '"shape":[5,3]')
    with pytest.raises(ArtifactError, match="codes"):
        open_artifact(artifact.path).verify()
    other = write(tmp_path / "other.safetensors")
    rewrite_header(other, '"F64"', '"I64"')
    with pytest.raises(ArtifactError, match="hessian"):
        open_artifact(other.path).verify()


@pytest.mark.parametrize(
    ("old", "new"), [("gptq", "gptr"), ('"residual\\":1', '"residual\\":0'), ("qtool 0.1.0", "qtool 0.1.1")]
)
def test_an_altered_manifest_is_found_when_the_artifact_is_opened(artifact: Artifact, old: str, new: str) -> None:
    rewrite_header(artifact, old, new)
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        open_artifact(artifact.path)


def test_tensors_that_the_manifest_does_not_list_are_found(artifact: Artifact, tmp_path: Path) -> None:
    tensors = load_file(artifact.path)
    save_file(tensors | {"more": torch.ones(1)}, tmp_path / "more", dict(artifact.header.metadata))
    with pytest.raises(ArtifactError, match="list other tensors") as error:
        open_artifact(tmp_path / "more").verify()
    assert error.value.facts == (("first", "more"),)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_artifact_is_refused(artifact: Artifact, part: float) -> None:
    content = artifact.path.read_bytes()
    artifact.path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ArtifactError, match="truncated"):
        open_artifact(artifact.path)


def test_a_file_that_was_cut_after_it_was_opened_is_refused(artifact: Artifact) -> None:
    assert artifact.names()
    artifact.path.write_bytes(artifact.path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="cannot read the tensors"):
        artifact.tensor("layers.0.scale")
    artifact.path.unlink()
    with pytest.raises(ArtifactError, match="cannot read the tensors"):
        artifact.tensors("layers.0.")


def test_a_strangers_safetensors_file_is_no_artifact(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="is a safetensors file, but no qtool artifact") as error:
        open_artifact(tmp_path / "model.safetensors")
    assert "folder that holds the model" in error.value.hint


def test_a_newer_artifact_says_so(artifact: Artifact) -> None:
    rewrite_header(artifact, '\\"schema\\":1', '\\"schema\\":7')
    with pytest.raises(ArtifactError, match="written by a newer qtool"):
        open_artifact(artifact.path)


def test_a_missing_file_or_tensor_is_named(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no such file `.*missing\.safetensors`"):
        open_artifact(tmp_path / "missing.safetensors")
    with pytest.raises(ArtifactError, match=r"has no tensor `layers\.9\.codes`"):
        artifact.tensor("layers.9.codes")


def test_a_checkpoint_is_a_folder_with_its_manifest(manifest: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with pytest.raises(ArtifactError, match=r"is a directory without `qtool\.json`"):
        open_artifact(folder)
    write_atomically(folder / "qtool.json", replace(manifest, kind="checkpoint").to_text())
    assert open_artifact(folder).manifest.kind == "checkpoint"
    (folder / "qtool.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="cannot read"):
        open_artifact(folder)


# A crash, and the same command again


def test_a_second_run_finds_the_finished_parts_and_ends_with_the_same_bytes(
    manifest: Manifest, blocks: Blocks, write: Write, tmp_path: Path
) -> None:
    path = tmp_path / "resumed.safetensors"
    crashed = ArtifactWriter(path, manifest)
    crashed.begin()
    assert not crashed.has("layers.0")
    crashed.add("layers.0", blocks["layers.0"], {"loss": "0.5", "seconds": "3"})

    again = ArtifactWriter(path, manifest)
    again.begin()
    assert (again.has("layers.0"), again.has("layers.1")) == (True, False)
    tensors, notes = again.part("layers.0")
    assert set(tensors) == set(blocks["layers.0"])
    assert all(same(tensors[name], blocks["layers.0"][name]) for name in tensors)
    assert notes == {"loss": "0.5", "seconds": "3"}
    again.add("layers.1", blocks["layers.1"])
    assert again.finish(manifest).path.read_bytes() == write(tmp_path / "whole.safetensors").path.read_bytes()
    assert not again.parts.exists()


def test_parts_that_answer_another_key_are_dropped(manifest: Manifest, blocks: Blocks, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    earlier = ArtifactWriter(path, manifest)
    earlier.begin()
    earlier.add("layers.0", blocks["layers.0"])
    other = replace(manifest, step=replace(manifest.step, version=manifest.step.version + 1))
    writer = ArtifactWriter(path, other)
    writer.begin()
    assert not writer.has("layers.0")
    writer.add("layers.1", blocks["layers.1"])
    assert writer.finish(other).names() == tuple(sorted(blocks["layers.1"]))


def test_parts_without_a_key_are_dropped(manifest: Manifest, blocks: Blocks, tmp_path: Path) -> None:
    writer = ArtifactWriter(tmp_path / "q.safetensors", manifest)
    writer.begin()
    writer.add("layers.0", blocks["layers.0"])
    (writer.parts / "key").unlink()
    writer.begin()
    assert not writer.has("layers.0")


def test_a_part_that_a_power_cut_truncated_is_made_again(manifest: Manifest, blocks: Blocks, tmp_path: Path) -> None:
    writer = ArtifactWriter(tmp_path / "q.safetensors", manifest)
    writer.begin()
    writer.add("layers.0", blocks["layers.0"])
    part = writer.parts / "layers.0.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert not writer.has("layers.0")
    part.write_bytes(b"")
    assert not writer.has("layers.0")


def test_two_processes_at_the_same_part_do_not_mix_their_bytes(manifest: Manifest, tmp_path: Path) -> None:
    writer = ArtifactWriter(tmp_path / "q.safetensors", manifest)
    writer.begin()
    (writer.parts / ".layers.0.1.tmp").write_bytes(b"half of what process 1 writes")
    writer.add("layers.0", {"x": torch.ones(3)})
    assert writer.part("layers.0")[0]["x"].tolist() == [1.0, 1.0, 1.0]
    assert writer.finish(manifest).names() == ("x",)


# Two processes at one artifact: locks of two handles exclude each other in one process too


def test_who_asks_for_what_is_being_made_waits_for_it(manifest: Manifest, blocks: Blocks, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    first, found = ArtifactWriter(path, manifest), []
    other = Thread(target=lambda: found.append(ArtifactWriter.finished(path, manifest.key)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with first.working():
            first.add("layers.0", blocks["layers.0"])
            assert ArtifactWriter.finished(path, manifest.key, wait=False) is None
            other.start()
            other.join(0.3)
            assert other.is_alive()
            made = first.finish(manifest)
        other.join(10)
    assert [one.manifest.id for one in found] == [made.manifest.id]
    assert [str(one.message) for one in said] == ["another process makes `q.safetensors`; waiting for it"]
    assert [file.name for file in tmp_path.iterdir()] == ["q.safetensors"]


@pytest.mark.filterwarnings("ignore:another process")
def test_who_waited_for_a_failure_begins_anew(manifest: Manifest, blocks: Blocks, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    made: list[Artifact] = []

    def again() -> None:
        writer = ArtifactWriter(path, manifest)
        with writer.working():
            writer.add("layers.1", blocks["layers.1"])
            made.append(writer.finish(manifest))

    def refused(other: Thread) -> None:
        with ArtifactWriter(path, manifest).working():
            other.start()
            other.join(0.3)
            assert not made
            raise NumericalError("not finite")

    other = Thread(target=again)
    with pytest.raises(NumericalError):
        refused(other)
    other.join(10)
    assert made[0].names() == tuple(sorted(blocks["layers.1"]))


# A full disk


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_says_safetensors(*_: object, **__: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_disk_that_fills_while_assembling_leaves_the_parts_and_nothing_half_written(
    manifest: Manifest, blocks: Blocks, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "q.safetensors"
    with monkeypatch.context() as full:
        full.setattr(store, "write_assembled", no_space)
        with pytest.raises(ResourceError, match="no space left on the disk") as error:
            write(path)
    assert "free some space" in error.value.hint
    assert [p.name for p in path.parent.iterdir()] == ["q.safetensors.partial"]
    writer = ArtifactWriter(path, manifest)
    writer.begin()
    assert all(writer.has(name) for name in blocks)
    writer.finish(manifest).verify()


@pytest.mark.parametrize("failure", [no_space, no_space_says_safetensors])
def test_a_disk_that_fills_in_a_part_leaves_the_parts_before_it(
    manifest: Manifest,
    blocks: Blocks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Callable[..., None],
) -> None:
    writer = ArtifactWriter(tmp_path / "q.safetensors", manifest)
    writer.begin()
    writer.add("layers.0", blocks["layers.0"])
    monkeypatch.setattr(store, "save_file", failure)
    with pytest.raises(ResourceError, match="no space left"):
        writer.add("layers.1", blocks["layers.1"])
    assert (writer.has("layers.0"), writer.has("layers.1")) == (True, False)
    assert {p.name for p in writer.parts.iterdir()} == {"key", "layers.0.safetensors"}


def test_an_interrupt_leaves_nothing_half_written(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_assembled", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "folder" / "q.safetensors")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["q.safetensors.partial"]


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (OSError(errno.EDQUOT, "quota"), "no space left"),
        (OSError(errno.EROFS, "read-only"), "cannot write"),
        (OSError(errno.EIO, "broken disk"), "cannot write"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "cannot write"),
    ],
    ids=["quota", "read-only", "broken", "safetensors"],
)
def test_a_failed_write_is_a_resource_error(raised: Exception, says: str) -> None:
    with pytest.raises(ResourceError, match=says), disk_errors(Path("out")):
        raise raised


def test_a_failure_that_is_not_the_disks_stays_what_it_is() -> None:
    with pytest.raises(SafetensorError), disk_errors(Path("out")):
        raise SafetensorError("header too large")


def test_an_output_below_a_file_is_refused(write: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        write(tmp_path / "file" / "q.safetensors")


def test_a_small_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "report.md", "old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(ResourceError):
        write_atomically(tmp_path / "report.md", "new")
    assert (tmp_path / "report.md").read_text() == "old"
    assert not list(tmp_path.glob(".*.tmp"))


# Reuse


def test_a_finished_artifact_of_the_same_key_is_reused(artifact: Artifact, manifest: Manifest, tmp_path: Path) -> None:
    found = ArtifactWriter.finished(artifact.path, manifest.key)
    assert found is not None
    assert found.manifest.id == artifact.manifest.id
    assert ArtifactWriter.finished(tmp_path / "nothing.safetensors", manifest.key) is None


def test_an_output_path_that_is_taken_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    other = tmp_path / "notes.safetensors"
    other.write_text("my notes")
    for path in (artifact.path, other):
        before = path.read_bytes()
        with pytest.raises(UsageError, match="the output path is taken") as error:
            ArtifactWriter.finished(path, "0" * 64)
        assert "-o" in error.value.hint
        assert path.read_bytes() == before
