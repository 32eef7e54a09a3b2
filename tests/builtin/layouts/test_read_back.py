"""Read-back looks at every byte, and has the consumer decode rows; memory holds a block of codes at most."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.builtin.exporters import compressed_tensors, modelopt
from qtool.builtin.exporters.awq import AWQ
from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.gptq import GPTQ, GPTQv2
from qtool.builtin.exporters.hf import HuggingFace
from qtool.builtin.exporters.modelopt import ModelOpt
from qtool.builtin.exporters.read_back import telling_rows
from qtool.engine.exporter import Exporter
from qtool.engine.packed import PackedLinear
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError
from qtool.model.graph import LinearSite
from qtool.scheme import GroupParameters
from tests.builtin.layouts.conftest import NAME, Make, altered
from tests.builtin.packed import written

LAYOUTS = [
    (CompressedTensors(), "int4-sym-g32", "weight_packed", "weight_scale"),
    (CompressedTensors(), "int3-asym-g32", "weight_packed", "weight_zero_point"),
    (CompressedTensors(), "nvfp4", "weight_packed", "weight_scale"),
    (CompressedTensors(), "mxfp4", "weight_packed", "weight_scale"),
    (CompressedTensors(), "fp8-channel", "weight", "weight_scale"),
    (ModelOpt(), "nvfp4", "weight", "weight_scale"),
    (GPTQ(), "int4-sym-g32", "qweight", "scales"),
    (GPTQv2(), "int3-asym-g32", "qweight", "qzeros"),
    (AWQ(), "int4-asym-g32", "qweight", "scales"),
]


def with_byte(place: int, flip: int) -> Any:  # noqa: ANN401 - what ``altered`` takes
    """Return what flips bits of one byte of a tensor."""

    def change(tensor: Tensor) -> Tensor:
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        flat[place] ^= flip
        return tensor

    return change


@pytest.mark.parametrize(("exporter", "weights", "codes", "scale"), LAYOUTS)
def test_a_nibble_or_a_byte_of_scales_is_noticed_anywhere(
    make: Make, tmp_path: Path, exporter: Exporter, weights: str, codes: str, scale: str
) -> None:
    subject = make(weights)
    written(exporter, subject, tmp_path / "out")
    for leaf, place, flip in ((codes, 5, 0x10), (codes, -9, 0x01), (codes, 1001, 0x40), (scale, 3, 1), (scale, -4, 4)):
        altered(tmp_path / "out", f"{NAME}.{leaf}", with_byte(place, flip))
        with pytest.raises(ArtifactError, match=f"`{NAME}` that was written is not"):
            exporter.verify(subject, tmp_path / "out")
        altered(tmp_path / "out", f"{NAME}.{leaf}", with_byte(place, flip))
    exporter.verify(subject, tmp_path / "out")


@pytest.mark.parametrize(
    ("exporter", "module", "weights", "leaf"),
    [
        (CompressedTensors(), compressed_tensors, "int4-sym-g32", "weight_packed"),
        (CompressedTensors(), compressed_tensors, "int4-asym-g32", "weight_zero_point"),
        (CompressedTensors(), compressed_tensors, "nvfp4", "weight_scale"),
        (CompressedTensors(), compressed_tensors, "fp8-channel", "weight"),
        (ModelOpt(), modelopt, "nvfp4", "weight"),
    ],
)
def test_the_consumers_decoder_reads_the_telling_rows_too(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    exporter: Exporter,
    module: Any,  # noqa: ANN401 - a module
    weights: str,
    leaf: str,
) -> None:
    subject = make(weights)
    written(exporter, subject, tmp_path / "out")
    linear = next(linear for linear in subject.model.graph.linears if linear.name == NAME)
    ours = subject.packed(linear)
    row = telling_rows(ours, 1)[-1].start

    def change(tensor: Tensor) -> Tensor:
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        flat[row * len(flat) // len(ours.stream)] ^= 3
        return tensor

    altered(tmp_path / "out", f"{NAME}.{leaf}", change)
    monkeypatch.setattr(module, "compare_codes", lambda *_: None)
    with pytest.raises(ArtifactError, match=f"`{NAME}` that was written is not"):
        exporter.verify(subject, tmp_path / "out")


@pytest.mark.parametrize("weights", ["int4-asym-g32", "int3-sym-channel", "fp8-tensor", "fp8-b32", "nvfp4"])
def test_rows_of_a_packed_linear_are_those_of_the_linear(make: Make, weights: str) -> None:
    subject = make(weights)
    for linear in subject.linears[:7]:
        whole, grid, packed = subject.linear(linear), subject.weight_grid(linear), subject.packed(linear)
        for rows in (slice(0, 32), slice(32, 64), slice(0, len(whole.codes))):
            assert torch.equal(packed.rows(rows).weight(grid), whole.weight(grid)[rows])


@pytest.mark.parametrize(
    "weights", ["int4-asym-g32", "int3-sym-channel", "fp8-tensor", "fp8-b32", "nvfp4", "int3-asym-g16-scales3g16"]
)
def test_a_weight_decoded_piece_by_piece_is_that_of_the_linear(
    make: Make, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    monkeypatch.setattr("qtool.engine.packed._PIECE", 1)
    subject = make(weights)
    for linear in subject.linears[:7]:
        grid = subject.weight_grid(linear)
        assert subject.only_codes(linear)
        for dtype in (torch.bfloat16, torch.float32):
            decoded = subject.packed(linear).weight(grid, dtype)
            assert torch.equal(decoded, subject.linear(linear).weight(grid).to(dtype))


@pytest.mark.parametrize(("weights", "method"), [("int4-sym-g32", "rtn"), ("nvfp4", "rtn"), ("nvfp4", "rtn+lorc")])
def test_a_bit_of_a_decoded_weight_is_noticed_anywhere(make: Make, tmp_path: Path, weights: str, method: str) -> None:
    subject = make(weights, method=method)
    assert subject.only_codes(subject.linears[0]) == (method == "rtn")
    written(HuggingFace(), subject, tmp_path / "out")
    for place, flip in ((0, 1), (5, 0x80), (-1, 0x80), (1001, 0x10)):  # a sign of 0 too
        altered(tmp_path / "out", f"{NAME}.weight", with_byte(place, flip))
        with pytest.raises(ArtifactError, match=f"`{NAME}` that was written is not"):
            HuggingFace().verify(subject, tmp_path / "out")
        altered(tmp_path / "out", f"{NAME}.weight", with_byte(place, flip))
    HuggingFace().verify(subject, tmp_path / "out")


def test_pieces_are_all_rows_in_whole_words() -> None:
    for n_out, n_in in ((70, 1 << 13), (8, 16), (4096, 4096), (33, 1 << 20)):
        stream = torch.empty(n_out, n_in, dtype=torch.uint8, device="meta")
        packed = PackedLinear(stream, 8, n_in, GroupParameters(torch.ones(n_out, 1)))
        pieces = list(packed.pieces())
        assert [row for rows in pieces for row in range(rows.start, rows.stop)] == list(range(n_out))
        assert all(rows.start % 32 == 0 for rows in pieces)
        assert all((rows.stop - rows.start) * n_in <= max(1 << 20, 32 * n_in) for rows in pieces)


def test_the_telling_rows_hold_the_least_and_the_largest_scale(make: Make) -> None:
    subject = make("int4-sym-g32-signed_full")
    for linear in subject.linears:
        ours = subject.packed(linear)
        scale = ours.parameters.scale.abs()
        told = torch.cat([scale[rows] for rows in telling_rows(ours, 1)])
        assert (told.min(), told.max()) == (scale.min(), scale.max())
        assert telling_rows(ours, 48) == [slice(0, len(scale))] or len(scale) % 48 == 0


@pytest.mark.parametrize("exporter", [CompressedTensors(), GPTQ(), AWQ()])
def test_codes_of_a_block_at_most_are_held(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exporter: Exporter
) -> None:
    subject, held, most = make("int4-sym-g32"), list[weakref.ref[Tensor]](), [0]
    read = Subject.packed

    def counted(self: Subject, linear: LinearSite) -> PackedLinear:
        packed = read(self, linear)
        held.append(weakref.ref(packed.stream))
        most[0] = max(most[0], sum(one() is not None for one in held))
        return packed

    monkeypatch.setattr(Subject, "packed", counted)
    (tmp_path / "out").mkdir()
    exporter.write(subject, tmp_path / "out")
    block = len(subject.linears_of(0))
    assert len(subject.linears) == 2 * block
    assert most[0] <= block + 1
    held.clear()
    most[0] = 0
    exporter.verify(subject, tmp_path / "out")
    assert len(held) == 2 * block
    assert most[0] <= 2


@pytest.mark.parametrize(("exporter", "weights"), [(AWQ(), "int4-asym-g32"), (GPTQv2(), "int3-asym-g32")])
def test_pieces_are_put_side_by_side(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exporter: Exporter, weights: str
) -> None:
    subject = make(weights)
    written(exporter, subject, tmp_path / "whole")
    monkeypatch.setattr("qtool.engine.packed._PIECE", 1)
    written(exporter, subject, tmp_path / "pieces")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "pieces"))
    assert first == second
