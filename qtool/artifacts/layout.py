"""The safetensors layout, read and written by streaming: a header of JSON, then the tensors' bytes.

The library writes a file from tensors that are all in memory; an artifact is assembled from parts that are not.
Format: eight bytes of little-endian header length, the header (tensor name to dtype, shape and byte range, plus the
string map ``__metadata__``), padded with spaces to a multiple of eight, then the data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from qtool.artifacts.identity import CHUNK, canonical_json, digest_bytes
from qtool.errors import ArtifactError

AGAIN = "make it again with the step that wrote it, or download it again"
_MAX_HEADER = 100_000_000
_ITEMSIZE: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 1),
}


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor's bytes are in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A safetensors file's table of contents; slots are absolute positions in the file."""

    metadata: Mapping[str, str]
    slots: Mapping[str, TensorSlot]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        ArtifactError: The file is missing, truncated or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _MAX_HEADER):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            table = json.loads(file.read(length))
        start = 8 + length
        metadata = dict(table.pop("__metadata__", {}))
        slots = {name: _slot(row, start) for name, row in table.items()}
        _check_places(list(slots.values()), start)
    except FileNotFoundError as error:
        raise ArtifactError(f"no such file `{path}`", hint="check the path, or run the step that writes it") from error
    except IsADirectoryError as error:
        raise ArtifactError(f"`{path}` is a directory, not an artifact", hint="give the file in it") from error
    except OSError as error:
        raise ArtifactError(
            f"cannot read `{path}`", facts=(("reason", error.strerror),), hint="check the owner of the file"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ArtifactError(
            f"`{path}` is not a safetensors file, or is truncated",
            facts=(("reason", error),),
            hint=AGAIN,
        ) from error
    end = max((slot.stop for slot in slots.values()), default=start)
    if end != size:
        raise ArtifactError(
            f"`{path}` is truncated" if end > size else f"`{path}` has bytes that belong to no tensor",
            facts=(("bytes expected", end), ("bytes found", size)),
            hint=AGAIN,
        )
    return Header(metadata, slots)


def read_chunks(path: Path, slot: TensorSlot) -> Iterator[memoryview]:
    """Yield a tensor's bytes in pieces, each in the place of the one before."""
    place = memoryview(bytearray(min(CHUNK, slot.nbytes)))
    with path.open("rb", buffering=0) as file:
        file.seek(slot.start)
        left = slot.nbytes
        while left:
            count = file.readinto(place[:left])
            if not count:
                raise ArtifactError(f"`{path}` is truncated", hint=AGAIN)
            left -= count
            yield place[:count]


def digest_slot(path: Path, slot: TensorSlot) -> str:
    """Return the SHA-256 of a stored tensor: its type and shape, then its bytes, read by streaming."""
    described = canonical_json([slot.dtype, slot.shape]).encode()
    return digest_bytes(chain((described,), read_chunks(path, slot)))


def write_assembled(
    output: BinaryIO, parts: Mapping[str, tuple[Path, TensorSlot]], metadata: Mapping[str, str]
) -> None:
    """Write one safetensors file from tensors that lie in other files, holding one piece at a time.

    Args:
        output: File open for writing bytes.
        parts: Tensor name to the file and place of its bytes; widest types first, then by name.
        metadata: Strings for the header.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    names = sorted(parts, key=lambda name: (-_ITEMSIZE.get(parts[name][1].dtype, 1), name))
    for name in names:
        slot = parts[name][1]
        table[name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [offset, offset + slot.nbytes]}
        offset += slot.nbytes
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    output.write(struct.pack("<Q", len(header)))
    output.write(header)
    for name in names:
        for chunk in read_chunks(*parts[name]):
            output.write(chunk)


def _slot(row: dict[str, Any], start: int) -> TensorSlot:
    """Read one row of the header; the data begin at ``start``."""
    first, stop = row["data_offsets"]
    return TensorSlot(row["dtype"], tuple(row["shape"]), start + first, start + stop)


def _check_places(slots: list[TensorSlot], start: int) -> None:
    """Refuse tensors that overlap, leave gaps, or fill another number of bytes than their shape and type say."""
    for slot in sorted(slots, key=lambda slot: (slot.start, slot.stop)):
        if slot.start != start or slot.stop < slot.start:
            raise ValueError(f"a tensor at byte {slot.start}, not at {start}")
        if slot.dtype in _ITEMSIZE and slot.nbytes != math.prod(slot.shape) * _ITEMSIZE[slot.dtype]:
            raise ValueError(f"{slot.nbytes} bytes for the shape {list(slot.shape)} of {slot.dtype}")
        start = slot.stop
