"""Codes of 1 to 8 bits as dense bytes: value ``i`` of a row takes bits ``[i*b, (i+1)*b)`` of a little-endian stream.

Rows start on a whole byte. Read as little-endian 32-bit words, the stream of a row whose bits fill whole words is
that of compressed-tensors' ``pack-quantized``. With 4 bits the even value is in the low nibble, as in NVFP4 and MXFP4
checkpoints.
"""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import pad

from qtool.errors import NumericalError, ShapeError

_LANES = 8  # eight codes of b bits fill b bytes exactly


def packed_size(n: int, bits: int) -> int:
    """Return the bytes that a row of ``n`` codes takes.

    Raises:
        ShapeError: ``bits`` is not in 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise ShapeError("codes cannot be packed", facts=(("bits", "1 to 8"), ("got", bits)))
    return -(-n * bits // 8)


def pack_codes(codes: UInt8[Tensor, "rows n"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Pack rows of codes densely.

    Args:
        codes: Unsigned codes below ``2**bits``. Not modified.
        bits: Bits of a code, 1 to 8.

    Returns:
        ``ceil(n * bits / 8)`` bytes a row; the bits that fill up the last byte are 0.

    Raises:
        NumericalError: A code does not fit ``bits``.
        ShapeError: ``bits`` is not in 1 to 8.
    """
    rows, n = codes.shape
    size = packed_size(n, bits)
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise NumericalError(f"a code does not fit {bits} bits", facts=(("largest code", int(codes.max())),))
    if bits == 8:
        return codes.clone()
    lanes = pad(codes, (0, -n % _LANES))
    if bits == 4:
        return (lanes[:, 0::2] | lanes[:, 1::2] << 4)[:, :size].contiguous()
    words = torch.zeros(rows, lanes.shape[1] // _LANES, dtype=torch.int64, device=codes.device)
    for lane in range(_LANES):
        words |= lanes[:, lane::_LANES].long() << (bits * lane)
    parts = torch.stack([words >> (8 * byte) & 0xFF for byte in range(bits)], dim=-1)
    return parts.to(torch.uint8).reshape(rows, -1)[:, :size].contiguous()


def unpack_codes(packed: UInt8[Tensor, "rows bytes"], bits: int, n: int) -> UInt8[Tensor, "rows n"]:
    """Undo ``pack_codes``.

    Args:
        packed: Dense rows. Not modified.
        bits: Bits of a code, 1 to 8.
        n: Codes in a row.

    Returns:
        The codes.

    Raises:
        ShapeError: Rows of ``n`` codes do not take this many bytes.
    """
    rows, size = packed.shape
    if size != packed_size(n, bits):
        raise ShapeError(
            f"packed rows of {n} codes of {bits} bits have the wrong size",
            facts=(("bytes", packed_size(n, bits)), ("got", size)),
        )
    if bits == 8:
        return packed.clone()
    if bits == 4:
        return torch.stack((packed & 0xF, packed >> 4), dim=-1).reshape(rows, -1)[:, :n].contiguous()
    parts = pad(packed, (0, -size % bits)).reshape(rows, -1, bits)
    words = torch.zeros(parts.shape[:2], dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        words |= parts[..., byte].long() << (8 * byte)
    mask = (1 << bits) - 1
    codes = torch.stack([(words >> (bits * lane) & mask).to(torch.uint8) for lane in range(_LANES)], dim=-1)
    return codes.reshape(rows, -1)[:, :n].contiguous()
