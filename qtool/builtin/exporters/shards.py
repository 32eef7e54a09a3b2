"""Safetensors shards: tensors are gathered until they fill one. Memory holds a shard; each byte is written once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from qtool.artifacts.store import disk_errors
from qtool.model.files import INDEX, WEIGHTS, share

SHARD_BYTES = 2_000_000_000


class Shards:
    """Gathers tensors and writes them into ``model.safetensors``, or into numbered shards with an index.

    Args:
        directory: Folder of the shards.
        limit: Bytes to a shard; tensors that belong together may exceed it.
    """

    def __init__(self, directory: Path, *, limit: int = SHARD_BYTES) -> None:
        self.directory, self.limit = directory, limit
        self.total = 0
        self._gathered: dict[str, Tensor] = {}
        self._pending = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors that belong together; they are not to be changed afterwards.

        Raises:
            ResourceError: The disk is full.
        """
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending + size > self.limit:
            self._write()
        self._gathered |= {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._pending += size
        self.total += size

    def finish(self) -> None:
        """Write what is left, give the shards their names and write the index.

        Raises:
            ResourceError: The disk is full.
        """
        self._write()
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

    def _write(self) -> None:
        """Write what was gathered as one shard."""
        if not self._gathered:
            return
        shard = self.directory / f".shard-{len(self._shards)}.safetensors"
        with disk_errors(self.directory):
            save_file(self._gathered, shard, metadata={"format": "pt"})
            share(shard)
        self._shards.append((shard, list(self._gathered)))
        self._gathered, self._pending = {}, 0


def write_json(path: Path, value: object) -> None:
    """Write JSON as transformers does: indented, keys sorted.

    Raises:
        ResourceError: The disk is full.
    """
    with disk_errors(path):
        path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
