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

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qtool.builtin.exporters.gguf_types import BLOCKS, SCALED, Kind, offset_of
from qtool.engine.problem import QuantizedLinear
from qtool.numerics.scales import encode_scale


def stored_blocks(found: QuantizedLinear, kind: Kind) -> UInt8[Tensor, "out bytes"]:
    """Return the blocks of every row, one behind the other.

    Args:
        found: Codes, scales, zero points, for which ``check_values`` found nothing to refuse. Not modified.
        kind: The type.
    """
    (parameters,) = found.parameters
    rows, n_in = found.codes.shape
    scale = _of_each_block(parameters.scale, rows, n_in // SCALED[kind])
    codes = found.codes.reshape(rows, -1, SCALED[kind])
    if kind == "NVFP4":
        scales = encode_scale(scale, "e4m3").view(torch.uint8).reshape(rows, -1, BLOCKS[kind] // SCALED[kind])
        packed = _nibbles(codes).reshape(rows, scales.shape[1], -1)
        return torch.cat([scales, packed], dim=-1).reshape(rows, -1)
    if kind == "MXFP4":
        return torch.cat([encode_scale(scale, "e8m0").unsqueeze(-1), _nibbles(codes)], dim=-1).reshape(rows, -1)
    parts = [_half_bytes(scale)]
    if kind == "Q4_1":
        parts.append(_half_bytes(_of_each_block(offset_of(parameters), rows, scale.shape[1])))
    # Flipping the top bit takes the offset of 128 from codes of 8 bits, in two's complement.
    parts.append(codes ^ 0x80 if kind == "Q8_0" else _nibbles(codes))
    return torch.cat(parts, dim=-1).reshape(rows, -1)


def bytes_by_part(kind: Kind, size: int) -> dict[str, int]:
    """Return how many of the bytes of a tensor in blocks are codes, scales and offsets, which stand for zero points."""
    codes = BLOCKS[kind] if kind == "Q8_0" else BLOCKS[kind] // 2
    scales = {"MXFP4": 1, "NVFP4": 4}.get(kind, 2)
    zeros = 2 if kind == "Q4_1" else 0
    blocks = size // (codes + scales + zeros)
    return {"codes": blocks * codes, "scales": blocks * scales, "zeros": blocks * zeros}


def _of_each_block(values: Float[Tensor, "*groups"], rows: int, blocks: int) -> Float[Tensor, "out blocks"]:
    """Repeat what a row, or the whole tensor, has one of."""
    grouped = values.reshape(-1, values.shape[-1]).expand(rows, -1)
    return grouped.repeat_interleave(blocks // grouped.shape[1], dim=1)


def _nibbles(codes: UInt8[Tensor, "out blocks size"]) -> UInt8[Tensor, "out blocks half"]:
    low, high = codes.chunk(2, dim=-1)
    return low | high << 4


def _half_bytes(values: Float[Tensor, "out blocks"]) -> UInt8[Tensor, "out blocks 2"]:
    return values.half().unsqueeze(-1).contiguous().view(torch.uint8)
