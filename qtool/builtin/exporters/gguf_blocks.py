"""The bytes of a linear in each type of GGUF, from its codes and scales: nothing is rounded.

A block is its scale (or scales) and then its codes. Of 4-bit codes the first half lies in the low nibbles, the second
half in the high ones. With ``d`` the scale and ``q`` the code:

========  =====  =================================================  =====================================
type      bytes  layout                                             value
========  =====  =================================================  =====================================
Q4_0      18     float16 d, 16 bytes of nibbles                     ``d * (q - 8)``
Q4_1      20     float16 d, float16 m, 16 bytes of nibbles          ``d * q + m``
Q8_0      34     float16 d, 32 signed bytes                         ``d * q``
MXFP4     17     E8M0 d, 16 bytes of nibbles                        ``d * e2m1(q)``
NVFP4     36     four E4M3 d, four times 8 bytes of nibbles         ``d * e2m1(q)``, and the tensor's scale
========  =====  =================================================  =====================================
"""

from __future__ import annotations

import gguf
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from qtool.builtin.exporters.gguf_types import BLOCKS, SCALED, Kind, offset_of
from qtool.builtin.exporters.read_back import same_bytes
from qtool.engine.grid import Grid
from qtool.engine.packed import PackedLinear, one_thread
from qtool.numerics.groups import each_parameter
from qtool.numerics.packing import unpack_codes
from qtool.numerics.scales import decode_scale, encode_scale

_SCALES = {"Q4_0": 2, "Q4_1": 2, "Q8_0": 2, "MXFP4": 1, "NVFP4": 4}
_OFFSETS = {"Q4_1": 2}
_HALVES = {32: torch.int64, 16: torch.int32}
"""What holds half of the codes of 4 bits that share a scale."""
_LOW = 0x0F0F0F0F


@one_thread()
def stored_blocks(found: PackedLinear, kind: Kind) -> UInt8[Tensor, "out bytes"]:
    """Return the blocks of every row, one behind the other.

    Args:
        found: Codes, scales, zero points, for which ``check_values`` found nothing to refuse. Not modified.
        kind: The type.
    """
    parameters, rows = found.parameters, len(found.stream)
    scale = _of_each_group(parameters.scale, found, kind)
    if kind in ("MXFP4", "NVFP4"):
        heads = [encode_scale(scale, "e8m0" if kind == "MXFP4" else "e4m3").view(torch.uint8)]
    else:
        heads = [scale.half().view(torch.uint8)]
    if kind == "Q4_1":
        heads.append(_of_each_group(offset_of(parameters), found, kind).half().view(torch.uint8))
    # Flipping the top bit takes the offset of 128 from codes of 8 bits, in two's complement.
    codes = found.stream ^ 0x80 if kind == "Q8_0" else _with_halves_paired(found.stream, SCALED[kind])
    blocks = rows * (found.n_in // BLOCKS[kind])
    return torch.cat([part.reshape(blocks, -1) for part in (*heads, codes)], dim=-1).reshape(rows, -1)


def read_blocks(
    blocks: UInt8[Tensor, "out stored"], kind: Kind
) -> tuple[UInt8[Tensor, "out bytes"], Float[Tensor, "out groups"], Float[Tensor, "out groups"] | None]:
    """Return codes as ``pack_codes`` makes them, scales, and the offsets of Q4_1; shares no code with the above."""
    rows, each = len(blocks), _each_block(blocks, kind)
    start = _SCALES[kind] + _OFFSETS.get(kind, 0)
    first, codes = each[:, : _SCALES[kind]].contiguous(), each[:, start:].contiguous()
    if kind == "MXFP4":
        scale = decode_scale(first, "e8m0")
    else:
        scale = first.view(torch.float8_e4m3fn if kind == "NVFP4" else torch.float16)
        scale = decode_scale(scale, "e4m3") if kind == "NVFP4" else scale.float()
    offset = each[:, _SCALES[kind] : start].contiguous().view(torch.float16).float() if kind in _OFFSETS else None
    if kind == "Q8_0":
        stream = (codes.view(torch.int8).short() + 128).to(torch.uint8)
    else:
        words = codes.flatten().view(torch.int32)
        pairs = ((half | half >> 4).view(torch.int16) for half in (words & _LOW, words >> 4 & _LOW))
        halves = [pair.to(torch.uint8).view(_HALVES[SCALED[kind]]) for pair in pairs]
        stream = torch.stack(halves, dim=-1).view(torch.uint8)
    return stream.reshape(rows, -1), scale.reshape(rows, -1), None if offset is None else offset.reshape(rows, -1)


def one_of_each_scale(blocks: UInt8[Tensor, "out bytes"], kind: Kind) -> Int[Tensor, " some"]:
    """Return the number of a block for each scale that a tensor has."""
    first = _each_block(blocks, kind)[:, : _SCALES[kind]].contiguous().flatten()
    scales = first.view(torch.int16) if kind not in ("MXFP4", "NVFP4") else first
    places = torch.full((1 << 16,), -1).scatter_(0, scales.long() & 0xFFFF, torch.arange(len(scales)))
    return places[places >= 0] // (BLOCKS[kind] // SCALED[kind])


@one_thread()
def same_blocks(blocks: UInt8[Tensor, "out stored"], ours: PackedLinear, kind: Kind, grid: Grid) -> bool:
    """Say whether blocks hold what was packed, and the official package decodes them as we do.

    Every code, scale and offset is compared as it is stored. A block is decoded by itself, so one of each scale is.

    Args:
        blocks: What the file holds.
        ours: What was packed, without the scale of the tensor.
        kind: The type.
        grid: That of the weight.
    """
    if blocks.shape != (len(ours.stream), _each_block(blocks, kind).shape[1] * (ours.n_in // BLOCKS[kind])):
        return False
    if not all(_same_numbers(blocks[rows], ours.take(rows), kind) for rows in ours.pieces()):
        return False
    numbers = one_of_each_scale(blocks, kind)
    some = _each_block(blocks, kind)[numbers].reshape(1, -1).numpy()
    decoded = torch.from_numpy(gguf.dequantize(some, gguf.GGMLQuantizationType[kind]))
    return torch.equal(decoded.reshape(len(numbers), -1), _block_values(ours, numbers, kind, grid))


def _same_numbers(blocks: UInt8[Tensor, "out stored"], ours: PackedLinear, kind: Kind) -> bool:
    stream, scale, offset = read_blocks(blocks, kind)
    same = same_bytes(stream, ours.stream) and torch.equal(scale, _of_each_group(ours.parameters.scale, ours, kind))
    if offset is None:
        return same
    return same and torch.equal(offset.double(), _of_each_group(offset_of(ours.parameters), ours, kind))


def _block_values(
    ours: PackedLinear, numbers: Int[Tensor, " some"], kind: Kind, grid: Grid
) -> Float[Tensor, "some size"]:
    """Return what some blocks of a linear stand for."""
    size, each = BLOCKS[kind], BLOCKS[kind] // SCALED[kind]
    codes = unpack_codes(ours.stream.reshape(-1, size * ours.bits // 8)[numbers], ours.bits, size)
    own = each_parameter(ours.parameters, lambda one: _of_each_group(one, ours, kind).reshape(-1, each)[numbers])
    return grid.parts[0].format.decode(codes.reshape(len(codes), each, SCALED[kind]), own).reshape(len(codes), size)


def bytes_by_part(kind: Kind, size: int) -> dict[str, int]:
    """Return how many of the bytes of a tensor in blocks are codes, scales and offsets, which stand for zero points."""
    parts = {"codes": _bytes_of_codes(kind), "scales": _SCALES[kind], "zeros": _OFFSETS.get(kind, 0)}
    return {part: size // sum(parts.values()) * own for part, own in parts.items()}


def _bytes_of_codes(kind: Kind) -> int:
    return BLOCKS[kind] if kind == "Q8_0" else BLOCKS[kind] // 2


def _each_block(blocks: UInt8[Tensor, "out bytes"], kind: Kind) -> UInt8[Tensor, "blocks size"]:
    return blocks.reshape(-1, _SCALES[kind] + _OFFSETS.get(kind, 0) + _bytes_of_codes(kind))


def _of_each_group(values: Float[Tensor, "*groups"], found: PackedLinear, kind: Kind) -> Float[Tensor, "out groups"]:
    """Repeat what a row, or the whole tensor, has one of for all that share a scale in the type."""
    grouped = values.reshape(-1, values.shape[-1]).expand(len(found.stream), -1)
    return grouped.repeat_interleave(found.n_in // SCALED[kind] // grouped.shape[1], dim=1)


def _with_halves_paired(stream: UInt8[Tensor, "out bytes"], size: int) -> UInt8[Tensor, " all"]:
    """Return codes of 4 bits with the first half of ``size`` neighbours in the low nibbles, the second in the high."""
    low = int.from_bytes(b"\x0f" * (size // 4), "little")
    first, second = stream.flatten().view(_HALVES[size]).reshape(-1, 2).unbind(1)
    even, odd = first & low | (second & low) << 4, first >> 4 & low | second & ~low
    return torch.stack((even.view(torch.uint8), odd.view(torch.uint8)), dim=-1).flatten()
