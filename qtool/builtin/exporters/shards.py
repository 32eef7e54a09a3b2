"""Safetensors shards written by streaming: tensors gathered on disk, and put in order in files of a few gigabytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qtool.artifacts.layout import TensorSlot, write_assembled
from qtool.artifacts.mapped import DTYPE_NAMES
from qtool.artifacts.store import disk_errors
from qtool.model.files import INDEX, WEIGHTS

SHARD_BYTES = 4_000_000_000


class Shards:
    """Gathers tensors in a file and puts them in order in ``model.safetensors``, or numbered shards with an index.

    Args:
        directory: Folder of the shards; what is gathered lies in it until a shard is full.
        limit: Bytes to a shard; tensors that belong together may exceed it.
    """

    def __init__(self, directory: Path, *, limit: int = SHARD_BYTES) -> None:
        self.directory, self.limit = directory, limit
        self.total = 0
        self._gathered = directory / ".tensors"
        self._slots: dict[str, TensorSlot] = {}
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
        if self._slots and self._pending + size > self.limit:
            self._join()
        with disk_errors(self.directory), self._gathered.open("ab") as file:
            for name, tensor in tensors.items():
                file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
                start, self._pending = self._pending, self._pending + tensor.nbytes
                kind, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
                self._slots[name] = TensorSlot(kind, shape, start, self._pending)
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
        """Stream what was gathered into one shard."""
        if not self._slots:
            return
        shard = self.directory / f".shard-{len(self._shards)}.safetensors"
        places = {name: (self._gathered, slot) for name, slot in self._slots.items()}
        with disk_errors(self.directory):
            with shard.open("wb") as output:
                write_assembled(output, places, {"format": "pt"})
            self._gathered.unlink()
        self._shards.append((shard, list(self._slots)))
        self._slots, self._pending = {}, 0


def write_json(path: Path, value: object) -> None:
    """Write JSON as transformers does: indented, keys sorted.

    Raises:
        ResourceError: The disk is full.
    """
    with disk_errors(path):
        path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
