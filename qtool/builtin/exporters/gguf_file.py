"""Writing a GGUF file one tensor at a time, with the official package, and reading it back with its decoders."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qtool.artifacts.store import disk_errors
from qtool.builtin.exporters.gguf_types import Kind
from qtool.errors import ArtifactError

_ROWS = 128
_CHUNK = 1 << 20
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its name, its type, and its rows as they lie there."""

    name: str
    kind: str
    rows: Any

    @property
    def blocks(self) -> UInt8[Tensor, "out bytes"]:
        """The bytes of a tensor in blocks."""
        return torch.from_numpy(np.asarray(self.rows))

    def values(self) -> Float[Tensor, "*shape"]:
        """Return its values in float32, decoded by the official package."""
        kind = gguf.GGMLQuantizationType[self.kind]
        pieces = [self.rows[start : start + _ROWS] for start in range(0, len(self.rows), _ROWS)]  # that a cache holds
        return torch.from_numpy(np.concatenate([gguf.dequantize(piece, kind) for piece in pieces]))


class TensorFile:
    """Gathers tensors on disk beside the file, as they are to lie behind its head, which speaks of all of them.

    A context manager, so that no file stays open when something is refused on the way.

    Args:
        path: The file.
        architecture: ``general.architecture``.
    """

    def __init__(self, path: Path, architecture: str) -> None:
        self.path = path
        self.keys: Any = gguf.GGUFWriter(path, architecture)
        self.total = 0
        self._spool = path.with_name(f".{path.name}.tensors")
        self._output = self._spool.open("wb")

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._output.close()
        for file in self.keys.fout or ():
            file.close()
        self._spool.unlink(missing_ok=True)

    def add(self, name: str, pieces: Iterable[Tensor], kind: Kind | None = None) -> int:
        """Take a tensor in.

        Args:
            name: Its name.
            pieces: Its rows, one piece after the other: floats, or the bytes of blocks.
            kind: The type of blocks.

        Returns:
            Its bytes.

        Raises:
            ResourceError: The disk is full.
        """
        rows, size = 0, 0
        for piece in pieces:
            raw = piece.detach().cpu().contiguous().view(torch.uint8).numpy()
            with disk_errors(self.path):
                self._output.write(raw.data)
            rows, size = rows + len(raw), size + raw.nbytes
        with disk_errors(self.path):
            self.keys.write_padding(self._output, size)
        shape = (rows, *raw.shape[1:])
        stored = gguf.GGMLQuantizationType[kind or FLOATS[piece.dtype]]
        self.keys.add_tensor_info(name, shape, raw.dtype, size, stored)
        self.total += size
        return size

    def finish(self) -> None:
        """Write the file from what was gathered.

        Raises:
            ResourceError: The disk is full.
        """
        self._output.close()
        with disk_errors(self.path):
            self.keys.write_header_to_file()
            self.keys.write_kv_data_to_file()
            self.keys.write_ti_data_to_file()
            (output,) = self.keys.fout
            self.keys.write_padding(output, output.tell())
            with self._spool.open("rb") as tensors:
                shutil.copyfileobj(tensors, output, _CHUNK)
            self.keys.close()


def read_tensors(path: Path) -> Iterator[Stored]:
    """Yield the tensors of a file as the official package finds them.

    Raises:
        ArtifactError: It cannot be read.
    """
    try:
        for tensor in gguf.GGUFReader(path, "c").tensors:
            yield Stored(tensor.name, tensor.tensor_type.name, tensor.data)
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise ArtifactError(f"`{path.name}` cannot be read back", facts=(("reason", error),)) from error
