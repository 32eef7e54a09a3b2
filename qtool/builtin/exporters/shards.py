"""Safetensors shards written by streaming: parts on disk, joined into files of a few gigabytes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from qtool.artifacts.layout import TensorSlot, read_header, write_assembled
from qtool.artifacts.store import disk_errors
from qtool.model.files import INDEX, WEIGHTS

SHARD_BYTES = 4_000_000_000


class Shards:
    """Collects tensors in parts and joins them into ``model.safetensors``, or numbered shards with an index.

    Args:
        directory: Folder of the shards; parts lie in it until they are joined.
        limit: Bytes to a shard; a single part may exceed it.
    """

    def __init__(self, directory: Path, *, limit: int = SHARD_BYTES) -> None:
        self.directory, self.limit = directory, limit
        self.total = 0
        self._parts: list[Path] = []
        self._pending = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that belong together.

        Raises:
            ResourceError: The disk is full.
        """
        if not tensors:
            return
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._parts and self._pending + size > self.limit:
            self._join()
        part = self.directory / f".part-{len(self._shards)}-{len(self._parts)}.safetensors"
        with disk_errors(self.directory):
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
        self._parts.append(part)
        self._pending += size
        self.total += size

    def finish(self) -> None:
        """Join what is left, give the shards their names and write the index.

        Raises:
            ResourceError: The disk is full.
        """
        self._join()
        count = len(self._shards)
        with disk_errors(self.directory):
            if count == 1:
                self._shards[0][0].rename(self.directory / WEIGHTS)
                return
            places: dict[str, str] = {}
            for index, (shard, names) in enumerate(self._shards, start=1):
                name = f"model-{index:05d}-of-{count:05d}.safetensors"
                shard.rename(self.directory / name)
                places |= dict.fromkeys(names, name)
            table = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(places.items()))}
            write_json(self.directory / INDEX, table)

    def _join(self) -> None:
        """Stream the parts at hand into one shard and remove them."""
        if not self._parts:
            return
        slots: dict[str, tuple[Path, TensorSlot]] = {}
        for part in self._parts:
            slots |= {name: (part, slot) for name, slot in read_header(part).slots.items()}
        shard = self.directory / f".shard-{len(self._shards)}.safetensors"
        with disk_errors(self.directory):
            with shard.open("wb") as output:
                write_assembled(output, slots, {"format": "pt"})
                output.flush()
                os.fsync(output.fileno())
            for part in self._parts:
                part.unlink()
        self._shards.append((shard, list(slots)))
        self._parts, self._pending = [], 0


def write_json(path: Path, value: object) -> None:
    """Write JSON as transformers does: indented, keys sorted.

    Raises:
        ResourceError: The disk is full.
    """
    with disk_errors(path):
        path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
