"""The streaming layout is safetensors, byte for byte as the library reads it, and damage is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.artifacts import layout
from qtool.artifacts.layout import TensorSlot, digest_slot, read_chunks, read_header, write_assembled
from qtool.errors import ArtifactError

Blocks = dict[str, dict[str, Tensor]]


@pytest.fixture
def parts(tmp_path: Path, blocks: Blocks) -> dict[str, tuple[Path, TensorSlot]]:
    """The blocks as the library saves them, a file each."""
    places: dict[str, tuple[Path, TensorSlot]] = {}
    for name, tensors in blocks.items():
        save_file(tensors, tmp_path / name, {"any": "string"})
        places |= {tensor: (tmp_path / name, slot) for tensor, slot in read_header(tmp_path / name).slots.items()}
    return places


def raw(table: object, data: bytes = b"") -> bytes:
    """Return a safetensors file with any header."""
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(header)) + header + data


def row(start: int, stop: int, **other: object) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]} | other


def assemble(parts: dict[str, tuple[Path, TensorSlot]], path: Path, metadata: dict[str, str]) -> bytes:
    with path.open("wb") as output:
        write_assembled(output, parts, metadata)
    return path.read_bytes()


def test_the_library_reads_what_is_assembled_from_parts(
    parts: dict[str, tuple[Path, TensorSlot]], blocks: Blocks, tmp_path: Path
) -> None:
    expected = {name: tensor for tensors in blocks.values() for name, tensor in tensors.items()}
    assemble(parts, tmp_path / "whole", {"qtool": '{"é": "\\"quoted\\""}'})
    found = load_file(tmp_path / "whole")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else True
        assert found[name].shape == tensor.shape
    with safe_open(tmp_path / "whole", framework="pt") as file:
        assert file.metadata() == {"qtool": '{"é": "\\"quoted\\""}'}


def test_reads_the_header_that_the_library_writes(blocks: Blocks, tmp_path: Path) -> None:
    tensors = blocks["layers.0"]
    save_file(tensors, tmp_path / "file", {"a": "b"})
    header = read_header(tmp_path / "file")
    assert header.metadata == {"a": "b"}
    for name, tensor in tensors.items():
        slot = header.slots[name]
        assert slot.shape == tuple(tensor.shape)
        assert slot.nbytes == tensor.nbytes
        stored = b"".join(read_chunks(tmp_path / "file", slot))
        assert stored == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_tensor_is_aligned_to_its_type(parts: dict[str, tuple[Path, TensorSlot]], tmp_path: Path) -> None:
    assemble(parts, tmp_path / "whole", {"qtool": "x"})
    sizes = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2}
    slots = read_header(tmp_path / "whole").slots.values()
    assert {slot.dtype for slot in slots} >= set(sizes)
    assert all(slot.start % sizes.get(slot.dtype, 1) == 0 for slot in slots)


def test_bytes_do_not_depend_on_the_order_of_parts_or_on_how_tensors_are_spread_over_files(
    parts: dict[str, tuple[Path, TensorSlot]], blocks: Blocks, tmp_path: Path
) -> None:
    together = {name: tensor for tensors in blocks.values() for name, tensor in tensors.items()}
    save_file(together, tmp_path / "one")
    single = {name: (tmp_path / "one", slot) for name, slot in read_header(tmp_path / "one").slots.items()}
    first = assemble(parts, tmp_path / "a", {"qtool": "x"})
    assert first == assemble(dict(reversed(parts.items())), tmp_path / "b", {"qtool": "x"})
    assert first == assemble(single, tmp_path / "c", {"qtool": "x"})


def test_streams_in_pieces(
    parts: dict[str, tuple[Path, TensorSlot]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = assemble(parts, tmp_path / "a", {})
    digests = {name: digest_slot(*place) for name, place in parts.items()}
    monkeypatch.setattr(layout, "CHUNK", 3)
    assert max(len(chunk) for place in parts.values() for chunk in read_chunks(*place)) == 3
    assert assemble(parts, tmp_path / "b", {}) == whole
    assert {name: digest_slot(*place) for name, place in parts.items()} == digests


def test_a_digest_speaks_of_type_and_shape_as_well_as_of_bytes(tmp_path: Path) -> None:
    zeros = torch.zeros(2, 6)
    variants = {
        "a": zeros,
        "same": zeros.clone(),
        "shape": torch.zeros(3, 4),
        "type": torch.zeros(2, 6, dtype=torch.int32),
        "value": zeros + 1,
    }
    save_file(variants, tmp_path / "file")
    digests = {name: digest_slot(tmp_path / "file", s) for name, s in read_header(tmp_path / "file").slots.items()}
    assert digests["a"] == digests["same"]
    assert len(set(digests.values())) == 4


def test_no_tensors_make_a_file_that_the_library_reads(tmp_path: Path) -> None:
    assemble({}, tmp_path / "empty", {"qtool": "x"})
    assert load_file(tmp_path / "empty") == {}
    assert read_header(tmp_path / "empty").metadata == {"qtool": "x"}


@pytest.mark.parametrize("kept", [0, 4, 8, 20, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    save_file({"a": torch.arange(100)}, tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:kept] if kept >= 0 else content[:-1])
    with pytest.raises(ArtifactError, match="truncated") as error:
        read_header(tmp_path / "file")
    assert error.value.hint == "make it again with the step that wrote it, or download it again"


DAMAGED = {
    "html": b"<!DOCTYPE html><html></html>",
    "zip": b"PK\x03\x04" + bytes(60),
    "huge header": struct.pack("<Q", 1 << 62) + b"{}",
    "not UTF-8": raw(b'{"\xff": 1}'),
    "nested": raw(b"[" * 100_000),
    "list": raw([1, 2]),
    "number": raw(5),
    "text": raw("header"),
    "row is a number": raw({"a": 5}),
    "no offsets": raw({"a": {"dtype": "U8", "shape": [1]}}, b"x"),
    "one offset": raw({"a": row(0, 1, data_offsets=[0])}, b"x"),
    "offsets are text": raw({"a": row(0, 1, data_offsets=["0", "1"])}, b"x"),
    "metadata is a number": raw({"__metadata__": 5}),
    "backwards": raw({"a": row(0, 4), "b": row(4, 2)}, bytes(4)),
    "overlap": raw({"a": row(0, 4), "b": row(2, 6)}, bytes(6)),
    "gap": raw({"a": row(0, 2), "b": row(4, 6)}, bytes(6)),
    "before the data": raw({"a": row(-4, 4)}, bytes(4)),
    "bytes and shape differ": raw({"a": row(0, 4, shape=[3])}, bytes(4)),
    "bytes and type differ": raw({"a": row(0, 4, dtype="F32")}, bytes(4)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_what_is_not_safetensors_is_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ArtifactError, match="not a safetensors file, or is truncated") as error:
        read_header(tmp_path / "file")
    assert error.value.facts[0][0] == "reason"


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(raw({"a": row(0, 4)}, bytes(5)))
    with pytest.raises(ArtifactError, match="bytes that belong to no tensor") as error:
        read_header(tmp_path / "file")
    expected, found = (value for _, value in error.value.facts)
    assert (expected, found) == (found - 1, (tmp_path / "file").stat().st_size)


def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        read_header(tmp_path / "missing")
    with pytest.raises(ArtifactError, match="is a directory"):
        read_header(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtifactError, match="cannot read"):
        read_header(tmp_path / "file" / "below")


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.arange(100)}, tmp_path / "file")
    slot = read_header(tmp_path / "file").slots["a"]
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="truncated"):
        assemble({"a": (tmp_path / "file", slot)}, tmp_path / "whole", {})
