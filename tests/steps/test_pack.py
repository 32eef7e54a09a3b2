"""pack gives a checkpoint its name only when it was read back; it reuses, replaces and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.artifacts.identity import digest_file
from qtool.artifacts.layout import read_header
from qtool.artifacts.store import Artifact, open_artifact
from qtool.engine.exporter import Exported
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, PluginError, QtoolError, ResourceError, UsageError
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.subjects import open_subject
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import Workspace
from tests.steps.conftest import Quantize, save_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), hidden=32, inner=48)


def left_in(workspace: Workspace) -> list[str]:
    """Name whatever is in the home folder besides quantized artifacts."""
    return sorted(path.name for path in workspace.home.iterdir() if not path.name.startswith("mitigate"))


class Faulty:
    """An exporter that does as it is told."""

    version = 1

    def __init__(self, **errors: BaseException) -> None:
        self.errors = errors
        self.done: list[str] = []

    def _step(self, name: str) -> None:
        self.done.append(name)
        if name in self.errors:
            raise self.errors[name]

    def check(self, subject: Subject) -> None:
        self._step("check")

    def write(self, subject: Subject, directory: Path) -> Exported:
        (directory / "model.safetensors").write_bytes(b"half")
        self._step("write")
        return Exported({}, {})

    def verify(self, subject: Subject, directory: Path) -> str:
        self._step("verify")
        return "a test"


def using(workspace: Workspace, exporter: object) -> Workspace:
    """Return the workspace with another object behind the name `hf`."""
    return replace(workspace, plugins=replace(workspace.plugins, _instances={("exporters", "hf"): exporter}))


@pytest.mark.parametrize("to", ["compressed-tensors", "hf"])
def test_a_checkpoint_says_what_it_is(quantize: Quantize, workspace: Workspace, to: str) -> None:
    quantized = quantize("int4-sym-g16")
    checkpoint, reused = pack(PackRequest(quantized, to), workspace)
    assert not reused
    assert checkpoint.path == workspace.home / f"pack-{to}-{checkpoint.manifest.key[:12]}"
    manifest = open_artifact(checkpoint.path).manifest
    assert manifest == checkpoint.manifest
    assert manifest.kind == "checkpoint"
    assert manifest.inputs.keys() == {"model", "quantized"}
    assert manifest.inputs["quantized"].id == open_artifact(Path(quantized)).manifest.id
    assert manifest.tensors == {
        file.name: digest_file(file)
        for file in checkpoint.path.iterdir()
        if file.name not in ("qtool.json", "README.md")
    }
    details = manifest.details
    assert details["to"] == to
    assert details["labels"]["mitigator"] == "rtn"
    assert details["labels"]["weights"] == "int4-sym-g16-sbf16"
    assert details["consumers"]["transformers"].startswith("W4A16")
    library = {"hf": "safetensors"}.get(to, to)
    assert f"{library} {version(library)}" in details["read_back_with"].split(", ")
    assert f"Read back with {details['read_back_with']}." in (checkpoint.path / "README.md").read_text()


def test_bits_are_counted_from_the_bytes_that_were_written(quantize: Quantize, workspace: Workspace) -> None:
    checkpoint, _ = pack(PackRequest(quantize("int4-sym-g16"), "compressed-tensors"), workspace)
    tensors = load_file(checkpoint.path / "model.safetensors")
    linear = sum(tensor.nbytes for name, tensor in tensors.items() if "_proj" in name)
    weights = 2 * (2 * 64 * 32 + 2 * 32 * 32 + 3 * 32 * 48)
    others = 24 * 32 + 5 * 32
    bits = checkpoint.manifest.details["bits"]
    assert bits["linears"] == pytest.approx(linear * 8 / weights, abs=1e-12)
    shapes = 14 * 2 * 64
    assert bits["linears"] == pytest.approx(4 + 16 / 16 + shapes / weights, abs=1e-12)
    assert bits["model"] == pytest.approx((linear * 8 + others * 16) / (weights + others), abs=1e-12)
    plain, _ = pack(PackRequest(quantize("int4-sym-g16"), "hf"), workspace)
    assert plain.manifest.details["bits"] == {"linears": 16.0, "model": 16.0}


def test_packing_again_reuses_what_is_there(quantize: Quantize, workspace: Workspace) -> None:
    request = PackRequest(quantize("int4-sym-g16"), "compressed-tensors")
    first, _ = pack(request, workspace)
    written = (first.path / "model.safetensors").stat().st_mtime_ns
    second, reused = pack(request, workspace)
    assert reused
    assert second.manifest == first.manifest
    assert (first.path / "model.safetensors").stat().st_mtime_ns == written


def test_two_runs_give_the_same_id_wherever_they_write(
    quantize: Quantize, workspace: Workspace, tmp_path: Path
) -> None:
    quantized = quantize("int4-sym-g16")
    one, _ = pack(PackRequest(quantized, "compressed-tensors", tmp_path / "a" / "one"), workspace)
    two, _ = pack(PackRequest(quantized, "compressed-tensors", tmp_path / "two"), workspace)
    assert one.path == tmp_path / "a" / "one"
    assert one.manifest.id == two.manifest.id
    assert pack(PackRequest(quantized, "hf", tmp_path / "three"), workspace)[0].manifest.key != one.manifest.key


def test_a_checkpoint_is_something_to_be_measured(quantize: Quantize, workspace: Workspace) -> None:
    checkpoint, _ = pack(PackRequest(quantize("int4-sym-g16"), "hf"), workspace)
    opened = open_subject(str(checkpoint.path), workspace)
    assert opened.artifact is not None
    assert opened.artifact.manifest.kind == "checkpoint"


def test_progress_counts_the_linears_twice(quantize: Quantize, workspace: Workspace) -> None:
    seen: list[str] = []

    def counted(items: Iterable[int], *, total: int, label: str) -> Iterator[int]:
        assert label not in seen
        for item in items:
            yield item
            seen.append(label)
        assert seen.count(label) == total == 14

    pack(PackRequest(quantize("int4-sym-g16"), "hf"), replace(workspace, progress=counted))
    assert seen == ["pack"] * 14 + ["read back"] * 14


def test_another_checkpoint_is_replaced_only_by_force(quantize: Quantize, workspace: Workspace, tmp_path: Path) -> None:
    output = tmp_path / "out"
    old, _ = pack(PackRequest(quantize("int4-sym-g16"), "compressed-tensors", output), workspace)
    other = PackRequest(quantize("int8-sym-channel"), "compressed-tensors", output)
    with pytest.raises(UsageError, match="the output path is taken") as refused:
        pack(other, workspace)
    assert refused.value.hint == "-o another folder, or --force to replace the checkpoint"
    assert open_artifact(output).manifest == old.manifest
    new, reused = pack(replace(other, force=True), workspace)
    assert not reused
    assert open_artifact(output).manifest == new.manifest
    assert new.manifest.key != old.manifest.key
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))] == ["out"]


def test_force_deletes_no_files_of_others(quantize: Quantize, workspace: Workspace, tmp_path: Path) -> None:
    output = tmp_path / "out"
    asked = PackRequest(quantize("int4-sym-g16"), "hf", output)
    made, _ = pack(asked, workspace)
    (output / "notes").mkdir()
    (output / "notes" / "mine.txt").write_text("what I saw")
    with pytest.raises(UsageError, match="did not write") as refused:
        pack(replace(asked, force=True), workspace)
    assert refused.value.facts == (("files", "notes/mine.txt"),)
    assert (output / "notes" / "mine.txt").read_text() == "what I saw"
    assert open_artifact(output).manifest == made.manifest
    (output / "notes" / "mine.txt").unlink()
    assert not pack(replace(asked, force=True), workspace)[1]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_no_checkpoint_is_never_replaced(
    quantize: Quantize, workspace: Workspace, tmp_path: Path, force: bool
) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="taken") as refused:
        pack(PackRequest(quantize("int4-sym-g16"), "hf", tmp_path / "papers", force), workspace)
    assert refused.value.hint == "-o another folder"
    assert (tmp_path / "papers" / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_filled(quantize: Quantize, workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    checkpoint, _ = pack(PackRequest(quantize("int4-sym-g16"), "hf", tmp_path / "out"), workspace)
    assert (checkpoint.path / "config.json").is_file()


def test_a_refusal_comes_before_any_work(quantize: Quantize, workspace: Workspace) -> None:
    exporter = Faulty(check=UsageError("it does not fit"))
    with pytest.raises(UsageError, match="does not fit"):
        pack(PackRequest(quantize("int4-sym-g16"), "hf"), using(workspace, exporter))
    assert exporter.done == ["check"]
    assert left_in(workspace) == []


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("write", ResourceError("no space left")),
        ("write", KeyboardInterrupt()),
        ("verify", ArtifactError("`q_proj` differs")),
    ],
)
def test_nothing_is_left_behind(quantize: Quantize, workspace: Workspace, step: str, error: BaseException) -> None:
    with pytest.raises(type(error)):
        pack(PackRequest(quantize("int4-sym-g16"), "hf"), using(workspace, Faulty(**{step: error})))
    assert left_in(workspace) == []


def test_codes_that_were_changed_are_not_packed(quantize: Quantize, workspace: Workspace, tmp_path: Path) -> None:
    changed = tmp_path / "changed.safetensors"
    shutil.copy(quantize("int4-sym-g16"), changed)
    slot = read_header(changed).slots["model.layers.1.mlp.up_proj.codes"]
    content = bytearray(changed.read_bytes())
    content[slot.start] ^= 1
    changed.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tensor `model.layers.1.mlp.up_proj.codes` of .* was changed"):
        pack(PackRequest(str(changed), "compressed-tensors", tmp_path / "out"), workspace)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


def test_a_checkpoint_that_was_changed_is_not_given_again(
    quantize: Quantize, workspace: Workspace, tmp_path: Path
) -> None:
    asked = PackRequest(quantize("int4-sym-g16"), "hf", tmp_path / "out")
    weights = pack(asked, workspace)[0].path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=r"`model.safetensors` of .* was changed") as refused:
        pack(asked, workspace)
    assert refused.value.hint == "make the checkpoint again with qtool pack --force"
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"`model.safetensors` of .* is missing"):
        pack(asked, workspace)
    assert not pack(replace(asked, force=True), workspace)[1]
    assert weights.read_bytes() == whole


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq"])
def test_torch_has_its_threads_again(quantize: Quantize, workspace: Workspace, to: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pack(PackRequest(quantize("int4-sym-g16"), to), workspace)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_all_may_read_a_checkpoint_who_may_read_its_folder(
    quantize: Quantize, workspace: Workspace, tmp_path: Path
) -> None:
    """safetensors itself leaves files to their owner alone, and servers run as somebody else."""
    before = os.umask(0o027)
    try:
        checkpoint, _ = pack(PackRequest(quantize("int4-sym-g16"), "hf", tmp_path / "out"), workspace)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in checkpoint.path.iterdir()} == {0o640}


def test_a_failure_by_force_keeps_the_old_checkpoint(quantize: Quantize, workspace: Workspace, tmp_path: Path) -> None:
    old, _ = pack(PackRequest(quantize("int4-sym-g16"), "hf", tmp_path / "out"), workspace)
    broken = using(workspace, Faulty(verify=ArtifactError("`q_proj` differs")))
    with pytest.raises(ArtifactError):
        pack(PackRequest(quantize("int8-sym-channel"), "hf", tmp_path / "out", force=True), broken)
    assert open_artifact(tmp_path / "out").manifest == old.manifest
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("target", ["shutil.copyfile", "qtool.builtin.exporters.shards.save_file", "os.fsync"])
@pytest.mark.parametrize("to", ["compressed-tensors", "hf"])
def test_a_full_disk_is_an_error_of_resources(
    quantize: Quantize, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, target: str, to: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    quantized = quantize("int4-sym-g16")
    monkeypatch.setattr(target, full)
    with pytest.raises(ResourceError, match="no space left on the disk"):
        pack(PackRequest(quantized, to), workspace)
    assert left_in(workspace) == []


def test_every_file_is_flushed(quantize: Quantize, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, fsync = set[int](), os.fsync

    def noted(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    quantized = quantize("int4-sym-g16")
    monkeypatch.setattr(os, "fsync", noted)
    checkpoint, _ = pack(PackRequest(quantized, "hf"), workspace)
    assert {(checkpoint.path / name).stat().st_ino for name in checkpoint.manifest.tensors} <= flushed


def test_only_quantized_artifacts_are_packed(source: Path, quantize: Quantize, workspace: Workspace) -> None:
    with pytest.raises(ArtifactError, match="holds nothing to pack") as refused:
        pack(PackRequest(str(source), "hf"), workspace)
    assert ("received", "model") in refused.value.facts
    checkpoint, _ = pack(PackRequest(quantize("int4-sym-g16"), "hf"), workspace)
    with pytest.raises(ArtifactError) as refused:
        pack(PackRequest(str(checkpoint.path), "hf"), workspace)
    assert ("received", "checkpoint") in refused.value.facts
    assert refused.value.hint.startswith("the quantized artifact that it was packed from")


def test_an_unknown_exporter_is_met_with_the_nearest(quantize: Quantize, workspace: Workspace) -> None:
    with pytest.raises(UsageError) as refused:
        pack(PackRequest(quantize("int4-sym-g16"), "compressed-tensor"), workspace)
    assert refused.value.hint == "did you mean `compressed-tensors`?"


def test_an_exporter_must_say_what_it_wrote(quantize: Quantize, workspace: Workspace) -> None:
    with pytest.raises(PluginError, match="how many bytes"):
        pack(PackRequest(quantize("int4-sym-g16"), "hf"), using(workspace, Faulty()))
    assert left_in(workspace) == []


def test_a_damaged_artifact_is_not_packed(quantize: Quantize, workspace: Workspace, tmp_path: Path) -> None:
    damaged = shutil.copy(quantize("int4-sym-g16"), tmp_path / "damaged.safetensors")
    content = bytearray(Path(damaged).read_bytes())
    Path(damaged).write_bytes(content[:-8])
    with pytest.raises(QtoolError, match="truncated"):
        pack(PackRequest(str(damaged), "hf"), workspace)


def test_the_manifest_is_valid_json_beside_the_weights(quantize: Quantize, workspace: Workspace) -> None:
    checkpoint: Artifact
    checkpoint, _ = pack(PackRequest(quantize("nvfp4"), "compressed-tensors"), workspace)
    stated = json.loads((checkpoint.path / "qtool.json").read_text())
    assert stated["key"] == checkpoint.manifest.key
    assert stated["details"]["written"]["layout"] == "nvfp4-pack-quantized"


@pytest.mark.parametrize("rotated", [False, True])
def test_heads_for_further_tokens_behind_a_rotation_are_spoken_of(
    source: Path, workspace: Workspace, tmp_path: Path, rotated: bool
) -> None:
    model = shutil.copytree(source, tmp_path / "with-heads")
    head = {"mtp.fc.weight": torch.randn(32, 64).bfloat16()}
    save_file(load_file(model / "model.safetensors") | head, model / "model.safetensors", {"format": "pt"})
    scheme = ModelScheme(weights=parse_tensor_scheme("int4-g16", workspace.plugins.format))
    settings = {"r1": str(rotated).lower(), "r4": "false"}
    plan, _ = transform(TransformRequest(str(model), "quarot", settings), workspace)
    quantized, _ = mitigate(MitigateRequest(str(plan.path), "rtn", scheme), workspace)
    warned: list[str] = []
    packed, _ = pack(PackRequest(str(quantized.path), "hf"), replace(workspace, warn=warned.append))
    assert [text for text in warned if "MTP" in text] == warned[: int(rotated)]
    assert torch.equal(load_file(packed.path / "model.safetensors")["mtp.fc.weight"], head["mtp.fc.weight"])
