"""Codes of 1 to 8 bits as dense bytes: value ``i`` of a row takes bits ``[i*b, (i+1)*b)`` of a little-endian stream.

Rows start on a whole byte. Read as little-endian 32-bit words, the stream of a row whose bits fill whole words is
that of compressed-tensors' ``pack-quantized``. With 4 bits the even value is in the low nibble, as in NVFP4 and MXFP4
checkpoints.

The fewest codes that fill whole bytes lie in an integer with a byte for each: there halves are moved together, then
halves of halves, so that no code is touched alone.
"""

from __future__ import annotations

from math import gcd

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import pad

from qtool.errors import NumericalError, ShapeError

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the codes in them, a byte for each


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
        return codes.clone(memory_format=torch.contiguous_format)
    lanes = _lanes(bits)
    words = (pad(codes, (0, -n % lanes)) if n % lanes else codes).flatten().contiguous().view(_WORDS[lanes])
    half = 1
    while half < lanes:
        low, apart = _low_halves(half, lanes, bits), half * (8 - bits)
        words = (words >> apart).bitwise_and_(low << half * bits).bitwise_or_(words & low)
        half *= 2
    whole = lanes * bits // 8
    stream = words.to(torch.uint8) if whole == 1 else _resized(words.view(torch.uint8), lanes, whole)
    return stream.reshape(rows, -1)[:, :size].contiguous()


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
        return packed.clone(memory_format=torch.contiguous_format)
    lanes = _lanes(bits)
    whole = lanes * bits // 8
    filled = (pad(packed, (0, -size % whole)) if size % whole else packed).flatten().contiguous()
    words = filled.to(_WORDS[lanes]) if whole == 1 else _resized(filled, whole, lanes).view(_WORDS[lanes])
    half = lanes // 2
    while half:
        low, apart = _low_halves(half, lanes, bits), half * (8 - bits)
        words = (words << apart).bitwise_and_(low << half * 8).bitwise_or_(words & low)
        half //= 2
    return words.view(torch.uint8).reshape(rows, -1)[:, :n].contiguous()


def _lanes(bits: int) -> int:
    """Return the fewest codes that fill whole bytes."""
    return 8 // gcd(8, bits)


def _low_halves(half: int, lanes: int, bits: int) -> int:
    """Return the mask of ``half`` codes, side by side, at the beginning of every two times ``half`` bytes."""
    return sum(((1 << half * bits) - 1) << 8 * place for place in range(0, lanes, 2 * half))


def _resized(stream: UInt8[Tensor, " bytes"], old: int, new: int) -> UInt8[Tensor, " others"]:
    """Make pieces of ``old`` bytes ones of ``new``: cut off, or filled up with 0."""
    pieces = stream.reshape(-1, old)
    resized = stream.new_zeros(len(pieces), new)
    for place in range(min(old, new)):
        resized[:, place] = pieces[:, place]
    return resized.flatten()
