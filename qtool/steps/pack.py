"""pack: a quantized artifact becomes a checkpoint that consumers load, read back before it is given its name.

A packed checkpoint becomes one of another layout in the same way, with the same codes and scales, or is refused.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qtool.artifacts.identity import digest_file
from qtool.artifacts.manifest import Manifest, Step
from qtool.artifacts.store import (
    CHECKPOINT_MANIFEST,
    Artifact,
    ArtifactWriter,
    disk_errors,
    open_artifact,
    write_atomically,
)
from qtool.consumers.agreement import require_agreement
from qtool.engine.exporter import Exported, Exporter, PackedReader
from qtool.engine.packed import PackedLinear
from qtool.engine.problem import QuantizedLinear
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, PluginError, ResourceError, UsageError
from qtool.model.extras import FURTHER_HEADS
from qtool.model.graph import RESIDUAL, LinearSite
from qtool.steps.allocator import freed_memory_kept
from qtool.steps.labels import labels_of, makers_of
from qtool.steps.model_card import CARD, measured_section, model_card, with_measured
from qtool.steps.packed import open_checkpoint, packed_reader
from qtool.steps.storage import STORAGE, written_storage
from qtool.steps.subjects import Opened, open_subject
from qtool.steps.verify import verify_files
from qtool.steps.workspace import Workspace, measured

UNKNOWN = "unknown"


@dataclass(frozen=True)
class PackRequest:
    """Which artifact, for which consumers.

    Attributes:
        source: A quantized artifact, or a checkpoint in a packed layout of this or another tool.
        to: Name of an exporter.
        output: The folder to write; None for a name that follows from the key.
        force: Whether a checkpoint that is there already is replaced.
    """

    source: str
    to: str
    output: Path | None = None
    force: bool = False


def pack(request: PackRequest, workspace: Workspace) -> tuple[Artifact, bool]:
    """Write a checkpoint, read it back, and only then give it its name.

    Returns:
        The checkpoint, and whether it was there already.

    Raises:
        UsageError: The exporter cannot hold the artifact (refused before any work), or the path is taken.
        ArtifactError: The source holds no codes, or what was written reads back as something else.
        ResourceError: The disk is full; nothing is left behind.
    """
    exporter: Exporter = workspace.plugins.load("exporters", request.to)
    reader = _reader(request, workspace)
    opened = _opened(request, workspace) if reader is None else _opened_checkpoint(request, reader, workspace)
    exporter.check(opened.subject)
    inexact = 0 if reader is None else reader.check_scales(opened.subject, request.to)
    if inexact:
        workspace.warn(f"{inexact} global scales have no exact reciprocal in float32: last bits may differ")
    rotated = bool(opened.subject.plan.at(RESIDUAL).operators)
    if rotated and FURTHER_HEADS in opened.model.left_alone.values():
        workspace.warn("heads for further tokens (MTP) are copied and read a rotated residual: they will draft badly")
    manifest = _manifest(request, exporter, opened, workspace)
    path = (request.output or workspace.home / f"pack-{request.to}-{manifest.key[:12]}").resolve()
    done = _present(path, manifest.key, force=request.force)
    if done is not None:
        _measured_anew(done, opened, workspace)
        return done, True
    with freed_memory_kept():
        return _written(exporter, opened, manifest, path, workspace), False


def _reader(request: PackRequest, workspace: Workspace) -> PackedReader | None:
    """Return the exporter that reads the source, if that is a packed checkpoint."""
    _, found = packed_reader(request.source, workspace) or ("", None)
    return found


def _opened(request: PackRequest, workspace: Workspace) -> Opened:
    """Open a quantized artifact."""
    opened = open_subject(request.source, workspace)
    kind = "model" if opened.artifact is None else opened.artifact.manifest.kind
    if kind != "quantized":
        require_agreement(Path(request.source), workspace.plugins.every("families"))
        again = "the quantized artifact that it was packed from; packed checkpoints, of codes, are read themselves"
        raise ArtifactError(
            f"`{request.source}` holds nothing to pack",
            facts=(("expected", "quantized"), ("received", kind)),
            hint=again if kind == "checkpoint" else f"qtool mitigate {request.source} --method rtn --scheme W4A16",
        )
    return opened


def _opened_checkpoint(request: PackRequest, reader: PackedReader, workspace: Workspace) -> Opened:
    """Open a packed checkpoint of another layout than the one that was asked for.

    Raises:
        UsageError: It is of that.
    """
    opened = open_checkpoint(request.source, reader, workspace)
    source = opened.subject.quantized
    if source is not None and source.manifest.step.method == request.to:
        raise UsageError(f"`{request.source}` is laid out for {request.to} already", hint="--to another exporter")
    return opened


def _labels(opened: Opened, workspace: Workspace) -> dict[str, str]:
    """Return the labels of what is packed; of a checkpoint of another tool only the scheme is known."""
    labels, scheme = labels_of(opened, workspace), opened.subject.scheme
    if opened.artifact is not None:
        return labels
    return (
        labels | replace(scheme, rules=()).parts() | {"transform": UNKNOWN, "mitigator": UNKNOWN, "scheme": str(scheme)}
    )


def _present(path: Path, key: str, *, force: bool) -> Artifact | None:
    """Return the checkpoint at ``path`` if it answers ``key``; refuse whatever else is there.

    An empty folder is no obstacle, and with ``force`` no checkpoint of qtool's is that holds nothing else.

    Raises:
        UsageError: Something else is there.
        ArtifactError: The checkpoint was changed after it was written.
    """
    if path.is_dir() and not any(path.iterdir()):
        return None
    ours = (path / CHECKPOINT_MANIFEST).is_file()
    if force and ours:
        _refuse_strangers(path)
        return None
    try:
        done = ArtifactWriter.finished(path, key)
    except UsageError as error:
        hint = "-o another folder" + (", or --force to replace the checkpoint" if ours else "")
        facts = error.facts if ours or not force else (("not replaced", f"it has no {CHECKPOINT_MANIFEST}"),)
        raise UsageError(error.message, facts=facts, hint=hint) from error
    if done is not None:
        verify_files(done)
    return done


def _refuse_strangers(checkpoint: Path) -> None:
    """Refuse to replace a checkpoint with files beside its own, since they would be gone.

    Raises:
        UsageError: Names them.
    """
    own = {*open_artifact(checkpoint).manifest.tensors, CHECKPOINT_MANIFEST, CARD}
    there = {file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*") if not file.is_dir()}
    if strangers := sorted(there - own):
        raise UsageError(
            f"`{checkpoint}` holds files that qtool did not write, and replacing it would delete them",
            facts=(("files", ", ".join(strangers)),),
            hint="move them, or -o another folder",
        )


def _measured_anew(checkpoint: Artifact, opened: Opened, workspace: Workspace) -> None:
    """Put on the card of a checkpoint, if it still has one, what was measured since it was written."""
    file = checkpoint.path / CARD
    if not file.is_file():
        return
    try:
        old = file.read_text(encoding="utf-8")
        new = with_measured(old, measured_section(opened.artifact, checkpoint, workspace))
        if new != old:
            write_atomically(file, new)
    except (OSError, ValueError, ResourceError) as error:
        workspace.warn(f"`{file}` does not tell what was measured since: {' '.join(str(error).split())}")


def _written(exporter: Exporter, opened: Opened, manifest: Manifest, path: Path, workspace: Workspace) -> Artifact:
    """Write beside ``path``, verify, and rename once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    about: dict[str, object] = {}
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        with disk_errors(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        with measured(about, workspace.device):
            with _compared(opened.artifact), _shown(opened.subject, "pack", workspace) as subject:
                exported = exporter.write(subject, temporary)
            files = sorted(file for file in temporary.rglob("*") if file.is_file())
            with _digested(files) as digests:
                with _shown(opened.subject, "read back", workspace) as subject:
                    read_back = exporter.verify(subject, temporary)
                named = {str(file.relative_to(temporary)): digest for file, digest in zip(files, digests, strict=True)}
        final = replace(manifest, details={**manifest.details, **_details(exported, opened, read_back)}, about=about)
        final = final.with_tensors(named)
        write_atomically(temporary / CHECKPOINT_MANIFEST, final.to_text())
        source = opened.artifact
        makers = [] if source is None else list(makers_of(source, workspace))[::-1]
        measured_of = measured_section(source, Artifact(path, final), workspace)
        write_atomically(temporary / CARD, model_card(final, makers, measured_of))
        with disk_errors(path):
            _give_name(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)
    return Artifact(path, final)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, up to the first that holds something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def _compared(source: Artifact | None) -> Iterator[None]:
    """Compare what is packed with its digests meanwhile; a checkpoint of another tool has none.

    Raises:
        ArtifactError: It was changed after it was written.
    """
    beside = ThreadPoolExecutor(1)
    try:
        found = beside.submit(_compare, source)
        yield
        found.result()
    finally:
        beside.shutdown(cancel_futures=True)


def _compare(source: Artifact | None) -> None:
    if source is not None and source.manifest.kind == "checkpoint":
        verify_files(source)
    elif source is not None:
        source.verify()


@contextmanager
def _digested(files: Sequence[Path]) -> Iterator[Iterator[str]]:
    """Flush files and digest them while they are read back, and give their digests; one thread waits for the disk."""
    beside = ThreadPoolExecutor(2)
    try:
        flushed = beside.map(_flush, files)
        yield beside.map(digest_file, files)
        deque(flushed, maxlen=0)
    finally:
        beside.shutdown(cancel_futures=True)


def _flush(file: Path) -> None:
    with disk_errors(file), file.open("rb") as written:
        os.fsync(written.fileno())


@dataclass(frozen=True)
class _Counted(Subject):
    """A subject that tells when one of its linears is read."""

    seen: Callable[[], object] = lambda: None

    def linear(self, linear: LinearSite) -> QuantizedLinear:
        """Read one quantized linear."""
        self.seen()
        return super().linear(linear)

    def packed(self, linear: LinearSite) -> PackedLinear:
        """Read one quantized linear, and leave its codes packed."""
        self.seen()
        return super().packed(linear)


@contextmanager
def _shown(subject: Subject, label: str, workspace: Workspace) -> Iterator[Subject]:
    """Give the subject to an exporter, and show how many of its linears were read."""
    linears = subject.model.graph.linears
    ticks = iter(workspace.progress(range(len(linears)), total=len(linears), label=label))
    own = {one.name: getattr(subject, one.name) for one in fields(subject)}
    yield _Counted(**own, seen=lambda: next(ticks, None))
    deque(ticks, maxlen=0)  # an exporter may read fewer; the display must end before the next begins


def _give_name(temporary: Path, path: Path) -> None:
    """Rename the finished folder, over an empty one or in place of the one that it replaces."""
    if not path.exists() or not any(path.iterdir()):
        temporary.rename(path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _manifest(request: PackRequest, exporter: Exporter, opened: Opened, workspace: Workspace) -> Manifest:
    provider = str(workspace.plugins.offer("exporters", request.to).provider)
    return Manifest(
        kind="checkpoint",
        step=Step("pack", request.to, exporter.version, provider),
        inputs=opened.inputs,
        subject=opened.model.id,
        family=opened.model.family.name,
        schemes=opened.subject.scheme.to_json(),
        details={"to": request.to, "labels": _labels(opened, workspace)},
    )


def _details(exported: Exported, opened: Opened, read_back: str) -> dict[str, Any]:
    """Return what is known once the checkpoint is written: its consumers, its size, and who read it back.

    Raises:
        PluginError: The exporter does not say how many bytes it wrote, or who read them back.
    """
    written = exported.details.get("bytes", {})
    if not {"linears", "model"} <= set(written):
        raise PluginError("the exporter does not say how many bytes of linears and of the model it wrote")
    if not read_back:
        raise PluginError("the exporter does not say who read back what it wrote")
    storage = written_storage(opened.model, written)
    return {
        "consumers": dict(exported.consumers),
        "bits": storage.bits,
        STORAGE: storage.to_json(),
        "written": dict(exported.details),
        "read_back_with": read_back,
    }
