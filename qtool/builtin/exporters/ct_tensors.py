"""The tensors of one linear in each layout of compressed-tensors, from its codes and scales: nothing is rounded."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int32, UInt8
from torch import Tensor

from qtool.builtin.exporters.ct_layout import ELEMENTS, Layout
from qtool.engine.packed import PackedLinear
from qtool.numerics.packing import pack_codes
from qtool.numerics.scales import encode_scale
from qtool.scheme import TensorScheme

_WORD = 4  # bytes of an int32


def stored_tensors(found: PackedLinear, scheme: TensorScheme, layout: Layout) -> dict[str, Tensor]:
    """Return what is stored of a linear, named below it.

    Codes are unsigned here and in packed layouts; ``int-quantized`` has signed bytes. A zero point is stored as the
    code that stands for zero, so both sides agree on it. compressed-tensors divides by its global scale, so it gets
    the reciprocal of the multiplier. Of the rows of a block one scale is stored.

    Args:
        found: Codes, scales, zero points.
        scheme: Scheme of the weights.
        layout: One that ``choose_layout`` gives for the scheme.
    """
    parameters = found.parameters
    rows = scheme.block_rows or scheme.group_size if scheme.strategy == "block" else 1
    tensors = {"weight_scale": encode_scale(parameters.scale[::rows], scheme.scale)}
    if layout == "int-quantized":
        tensors["weight"] = _signed(found.stream)
    elif layout in ("float-quantized", "mxfp8-quantized"):
        tensors["weight"] = found.stream.view(torch.float8_e4m3fn)
    elif layout == "pack-quantized":
        bits = ELEMENTS[scheme.format][1]
        tensors["weight_packed"] = as_words(found.stream)
        tensors["weight_shape"] = torch.tensor((len(found.stream), found.n_in), dtype=torch.int64)
        if parameters.zero_point is not None:
            zeros = parameters.zero_point.to(torch.uint8)
            tensors["weight_zero_point"] = pack_words(zeros.T.contiguous(), bits).T.contiguous()
    else:
        tensors["weight_packed"] = found.stream
    if parameters.global_scale is not None:
        tensors["weight_global_scale"] = global_divisor(parameters.global_scale)
    return tensors


def pack_words(codes: UInt8[Tensor, "rows n"], bits: int) -> Int32[Tensor, "rows words"]:
    """Pack rows of codes densely into little-endian 32-bit words; bits that fill up the last word are 0."""
    return as_words(pack_codes(codes, bits))


def as_words(stream: UInt8[Tensor, "rows bytes"]) -> Int32[Tensor, "rows words"]:
    """Return rows of packed codes as words; bits that fill up the last word are 0."""
    if stream.shape[1] % _WORD == 0:
        return stream.flatten().contiguous().view(torch.int32).reshape(len(stream), -1)
    words = stream.new_zeros(stream.shape[0], -(-stream.shape[1] // _WORD) * _WORD)
    words[:, : stream.shape[1]] = stream
    return words.view(torch.int32)


def global_divisor(multiplier: Float[Tensor, "*one"]) -> Float[Tensor, " 1"]:
    """Return the reciprocal of a tensor-level multiplier in float32."""
    return (1 / multiplier.double()).float().reshape(1)


def _signed(codes: UInt8[Tensor, "out in"]) -> Int[Tensor, "out in"]:
    """Return 8-bit codes without their offset of 128: flipping the top bit subtracts it in two's complement."""
    return (codes ^ 0x80).view(torch.int8)
