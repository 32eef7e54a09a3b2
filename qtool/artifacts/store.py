"""Artifacts on disk: opened lazily, written once, resumed after a crash.

A step writes its finished blocks as parts into ``<output>.partial/`` and assembles the one file at the end by
streaming, under a temporary name that is synced and renamed once. The same command run again finds the parts, and one
that runs beside it waits for it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qtool.artifacts.layout import AGAIN, Header, TensorSlot, digest_slot, read_header, write_assembled
from qtool.artifacts.manifest import Manifest, read_manifest
from qtool.artifacts.mapped import read_slot
from qtool.errors import ArtifactError, QtoolError, ResourceError, UsageError

MANIFEST_KEY = "qtool"
CHECKPOINT_MANIFEST = "qtool.json"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its path, its manifest, and its tensors on demand."""

    path: Path
    manifest: Manifest

    @cached_property
    def header(self) -> Header:
        """The file's table of contents."""
        return read_header(self.path)

    def names(self, prefix: str = "") -> tuple[str, ...]:
        """Return the names of the tensors that begin with ``prefix``, sorted."""
        first = bisect_left(self._sorted, prefix)
        return tuple(takewhile(lambda name: name.startswith(prefix), islice(self._sorted, first, None)))

    @cached_property
    def _size(self) -> int:
        return max(slot.stop for slot in self.header.slots.values())

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self.header.slots)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            ArtifactError: There is no tensor of this name.
        """
        if name not in self.header.slots:
            raise ArtifactError(
                f"`{self.path}` has no tensor `{name}`", facts=(("kind", self.manifest.kind),), hint=AGAIN
            )
        return read_slot(self.path, self.header.slots[name], size=self._size)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Read the tensors below ``prefix``, keyed by the rest of their names."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.names(prefix)}

    def verify(self) -> None:
        """Compare every tensor with the digest in the manifest.

        Raises:
            ArtifactError: A tensor is missing, too many, or differs; names it.
        """
        if set(self.header.slots) != set(self.manifest.tensors):
            odd = sorted(set(self.header.slots) ^ set(self.manifest.tensors))
            raise ArtifactError(
                f"`{self.path}` and its manifest list other tensors", facts=(("first", odd[0]),), hint=AGAIN
            )
        for name, slot in self.header.slots.items():
            if digest_slot(self.path, slot) != self.manifest.tensors[name]:
                raise ArtifactError(
                    f"tensor `{name}` of `{self.path}` was changed after it was written",
                    hint="make the artifact again with the step that wrote it",
                )


def open_artifact(path: Path) -> Artifact:
    """Open an artifact (or the manifest of a checkpoint directory) and check its header and manifest.

    Raises:
        ArtifactError: Missing, truncated, without a manifest, of a newer schema, or altered.
    """
    if path.is_dir():
        try:
            text = (path / CHECKPOINT_MANIFEST).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise ArtifactError(
                f"`{path}` is a directory without `{CHECKPOINT_MANIFEST}`", hint="qtool pack writes checkpoints"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(
                f"cannot read `{path / CHECKPOINT_MANIFEST}`", facts=(("reason", error),), hint="pack it again"
            ) from error
    else:
        text = read_header(path).metadata.get(MANIFEST_KEY, "")
        if not text:
            raise ArtifactError(
                f"`{path}` is a safetensors file, but no qtool artifact",
                hint="give the folder that holds the model, or an artifact that a qtool step printed",
            )
    return Artifact(path, read_manifest(text, path=str(path)))


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write of ``path`` into a typed error.

    Raises:
        ResourceError: The disk is full, or the path cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number is None:
            raise
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"no space left on the disk of `{path}`", hint="free some space, or set QTOOL_HOME to another disk"
            ) from error
        raise ResourceError(
            f"cannot write `{path}`", facts=(("reason", os.strerror(number)),), hint="choose another path with -o"
        ) from error


def _error_number(error: OSError | SafetensorError) -> int | None:
    """Return the operating system's number of an error, which safetensors states in its text only."""
    if isinstance(error, OSError):
        return error.errno
    stated = re.search(r"os error (\d+)", str(error))
    return int(stated[1]) if stated else None


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that it is either the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class ArtifactWriter:
    """Writes one artifact in parts.

    Args:
        path: Where the artifact goes.
        manifest: Its manifest without tensors; the key decides whether parts of an earlier run fit.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.parts = _parts(path)

    @classmethod
    def finished(cls, path: Path, key: str, *, wait: bool = True) -> Artifact | None:
        """Return the artifact at ``path`` if it is there and answers ``key``.

        Args:
            path: Where it would be.
            key: What it has to answer.
            wait: Whether to let another process that is making it finish first.

        Raises:
            UsageError: Something else is at ``path``.
        """
        if wait and not path.exists() and (lock := _locked(_parts(path))) is not None:
            os.close(lock)
        if not path.exists():
            return None
        with suppress(ArtifactError):
            artifact = open_artifact(path)
            if artifact.manifest.key == key:
                return artifact
        raise UsageError(
            f"the output path is taken: `{path}`",
            facts=(("key asked for", key[:12]),),
            hint="choose another path with -o, or remove the file",
        )

    @contextmanager
    def working(self) -> Iterator[None]:
        """Begin, and remove the parts again if the work is refused: the same command would be refused again.

        Parts that an interruption, a full disk or a defect of qtool or a plugin leaves behind are kept for the next
        run. Other processes that ask for the same artifact wait; whoever finishes it in here they find.

        Raises:
            ResourceError: The folder for parts cannot be written.
        """
        lock = self._entered()
        try:
            yield
        except QtoolError as error:
            if not isinstance(error, ResourceError) or not any(self.parts.glob("*.safetensors")):
                shutil.rmtree(self.parts, ignore_errors=True)
            raise
        finally:
            os.close(lock)

    def begin(self) -> None:
        """Make the folder for parts; drop parts that answer another key."""
        os.close(self._entered())

    def _entered(self) -> int:
        """Begin, and return what keeps other processes out of the folder until it is closed."""
        with disk_errors(self.path):
            lock = None
            while lock is None:
                self.parts.mkdir(parents=True, exist_ok=True)
                lock = _locked(self.parts)
            stamp = self.parts / "key"
            if not stamp.exists() or stamp.read_text() != self.manifest.key:
                for file in self.parts.iterdir():
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
                write_atomically(stamp, self.manifest.key)
        return lock

    def has(self, part: str) -> bool:
        """Say whether a part of this name is finished; a truncated one, as a power cut leaves it, is not."""
        try:
            read_header(self.parts / f"{part}.safetensors")
        except ArtifactError:
            return False
        return True

    def part(self, part: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Read a finished part: its tensors and its strings."""
        with safe_open(str(self.parts / f"{part}.safetensors"), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - not a dict

    def add(self, part: str, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
        """Finish a part: its tensors, and strings to be read back with them.

        Raises:
            ResourceError: The disk is full.
        """
        final = self.parts / f"{part}.safetensors"
        temporary = self.parts / f".{part}.{os.getpid()}.tmp"
        with disk_errors(self.path):
            try:
                # An empty map beside no tensors at all (a plan of unsigned Hadamards) would be written as broken JSON.
                save_file(_plain(tensors), temporary, dict(notes) if notes else None)
                temporary.replace(final)
            finally:
                temporary.unlink(missing_ok=True)

    def finish(self, manifest: Manifest) -> Artifact:
        """Assemble the artifact from its parts and remove them.

        Of a tensor that two parts have, that of the part counts whose name is later in the alphabet.

        Args:
            manifest: The final manifest without tensor digests; its key must be the one that was begun.

        Returns:
            The finished artifact.

        Raises:
            ResourceError: The disk is full; the parts stay for the next run.
        """
        places: dict[str, tuple[Path, TensorSlot]] = {}
        for file in sorted(self.parts.glob("*.safetensors")):
            places |= {name: (file, slot) for name, slot in read_header(file).slots.items()}
        digests = {name: digest_slot(*place) for name, place in places.items()}
        manifest = manifest.with_tensors(digests)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with disk_errors(self.path):
            try:
                with temporary.open("wb") as output:
                    write_assembled(output, places, {MANIFEST_KEY: manifest.to_text()})
                    output.flush()
                    os.fsync(output.fileno())
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)
        return Artifact(self.path, manifest)


def _parts(path: Path) -> Path:
    """Return the folder for the parts of an artifact."""
    return path.with_name(f"{path.name}.partial")


def _locked(folder: Path) -> int | None:
    """Return a handle that keeps other processes from a folder until it is closed; None if there is no such folder.

    Waits for a process that has one, and says so.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        warnings.warn(f"another process makes `{folder.name.removesuffix('.partial')}`; waiting for it", stacklevel=2)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks: nobody waits there
    with suppress(FileNotFoundError):
        if folder.stat().st_ino == os.fstat(handle).st_ino:
            return handle
    os.close(handle)
    return None


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: on the host, contiguous, no two of them in one storage."""
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        host = tensor.detach().cpu().contiguous()
        storage = host.untyped_storage().data_ptr()
        plain[name] = host.clone() if storage in storages else host
        storages.add(storage)
    return plain
