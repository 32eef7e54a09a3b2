"""The safetensors files of a model's folder: which tensor lies where, and a digest of config and weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qtool.artifacts.identity import digest_file, digest_json
from qtool.artifacts.layout import TensorSlot, read_header
from qtool.artifacts.store import write_atomically
from qtool.errors import ModelError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file."""

    file: Path
    slot: TensorSlot


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a safetensors folder by its name there, sharded or not; only headers are read.

    Raises:
        ModelError: There are no weights, the index names a missing file or tensor, or two shards hold one tensor.
    """
    table, files = _shards(path)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, slot in read_header(file).slots.items():
            if name in stored:
                raise ModelError(
                    f"two files of `{path}` hold the tensor `{name}`",
                    facts=(("first", stored[name].file.name), ("second", file.name)),
                    hint="download the model again into an empty folder",
                )
            stored[name] = StoredTensor(file, slot)
    for name in table:
        if name not in stored:
            raise ModelError(
                f"the index of `{path}` promises a tensor that no file has",
                facts=(("tensor", name), ("file", table[name])),
                hint="check that the download is complete",
            )
    return stored


def folder_digest(path: Path, cache: Path) -> str:
    """Return the digest of a model's config and weights, remembering those of files that did not change.

    Args:
        path: The model's folder.
        cache: Where digests are remembered.
    """
    memory = cache / "digests.json"
    try:
        known: dict[str, str] = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    for incidental in ("_name_or_path", "transformers_version"):
        config.pop(incidental, None)
    digests, learned = {}, {}
    for file in _shards(path)[1]:
        status = file.stat()
        label = f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}"
        digests[file.name] = known.get(label) or digest_file(file)
        if label not in known:
            learned[label] = digests[file.name]
    if learned:
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps(known | learned))
    return digest_json({"config": config, "weights": digests})


def _shards(path: Path) -> tuple[dict[str, str], list[Path]]:
    """Return the index (tensor to file name; empty without one) and the files, by name."""
    if (path / INDEX).is_file():
        table: dict[str, str] = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(table.values()))
    elif (path / WEIGHTS).is_file():
        table, names = {}, [WEIGHTS]
    else:
        raise ModelError(
            f"`{path}` holds no safetensors weights",
            facts=(("expected", f"{WEIGHTS} or {INDEX}"),),
            hint="convert it with model.save_pretrained(folder)",
        )
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ModelError(
            f"the index of `{path}` names files that are not there",
            facts=(("first", missing[0]), ("missing", f"{len(missing)} of {len(names)}")),
            hint="check that the download is complete",
        )
    return table, [path / name for name in names]


def share(file: Path) -> None:
    """Let those read a file who may read its folder; safetensors leaves what it writes to its owner alone."""
    file.chmod(file.parent.stat().st_mode & 0o666)
