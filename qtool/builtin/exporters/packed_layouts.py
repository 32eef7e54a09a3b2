"""Codes and scales of a packed checkpoint, read back as they are: what its config says, and its tensors.

compressed-tensors and ModelOpt are read, whoever wrote them: their layouts are those of the exporters of these names.
A global scale that compressed-tensors divides by is taken as its reciprocal in float32, which is what vLLM multiplies
with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from qtool.builtin.exporters.ct_tensors import global_divisor
from qtool.engine.grid import Grid
from qtool.engine.packed import PackedLinear
from qtool.errors import ArtifactError, NumericalError
from qtool.numerics.packing import pack_codes, packed_size, unpack_codes
from qtool.numerics.scales import decode_scale
from qtool.scheme import GroupParameters, TensorScheme

LEAVES = ("weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_zero_point", "weight_shape")
INPUT_LEAVES = ("input_scale", "input_global_scale", "input_zero_point")
OUTPUT_LEAVES = ("output_scale", "output_global_scale", "output_zero_point")
_WORD, _BYTE = 32, 8
_E2M1 = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def read_packed(
    method: str, tensors: Mapping[str, Tensor], n_in: int, weights: TensorScheme, grid: Grid
) -> PackedLinear:
    """Return a linear's codes and scales from its stored tensors.

    Args:
        method: One of ``METHODS``.
        tensors: By the last part of their names. Not modified.
        n_in: Its inputs.
        weights: Scheme of the weights.
        grid: That of the scheme.

    Raises:
        KeyError: A tensor lacks.
        ArtifactError: A tensor has another shape than the layout.
    """
    (part,) = grid.parts
    raw = tensors.get("weight_packed", tensors.get("weight"))
    if raw is None:
        raise KeyError("weight")
    bits = part.format.bits
    stream = _stream_of(raw, bits, n_in)
    codes = torch.empty((len(stream), n_in), dtype=torch.uint8, device="meta")
    shape = part.groups(codes).shape[:-1]
    scale = part.repeated(decode_scale(tensors["weight_scale"], weights.scale), len(codes))
    if stream.shape[1] != packed_size(n_in, bits) or scale.numel() != shape.numel():
        facts = (
            ("bytes of codes", tuple(stream.shape)),
            ("inputs", n_in),
            ("scales", tuple(scale.shape)),
            ("expected", tuple(shape)),
        )
        raise ArtifactError("the tensors of a linear do not fit its scheme", facts=facts)
    zeros = tensors.get("weight_zero_point")
    if not weights.symmetric:
        if zeros is None:
            raise KeyError("weight_zero_point")
        zeros = _zero_points(zeros, bits, len(codes)).float().reshape(shape)
    multiplier = (
        tensors.get("weight_scale_2") if method == "modelopt" else _reciprocal(tensors.get("weight_global_scale"))
    )
    parameters = GroupParameters(
        scale.reshape(shape),
        None if weights.symmetric else zeros,
        None if multiplier is None else multiplier.float().reshape(()),
    )
    return PackedLinear(stream, bits, n_in, parameters)


def read_multiplier(tensors: Mapping[str, Tensor], end: str = "input") -> Float[Tensor, ""] | None:
    """Return the calibrated multiplier of a linear's ``input`` or ``output``, None without one."""
    found = tensors.get(f"{end}_scale")
    if found is not None:
        return found.float().reshape(())
    return _reciprocal(tensors.get(f"{end}_global_scale"))


def read_zero_point(tensors: Mapping[str, Tensor], bits: int, end: str = "input") -> UInt8[Tensor, ""] | None:
    """Return the code that stands for zero in a linear's ``input`` or ``output``, None without one."""
    found = tensors.get(f"{end}_zero_point")
    return None if found is None else _unsigned(found.reshape(1, 1), bits).reshape(())


def check_reciprocal(name: str, parameters: GroupParameters, divisor: Tensor | None = None) -> None:
    """Refuse a linear whose weights differ in bfloat16 when a divisor stands for its multiplier.

    compressed-tensors divides a scale by its divisor and decodes to bfloat16; others multiply.

    Args:
        name: Name of the linear, for the message.
        parameters: Its scales.
        divisor: The divisor that is stored; None for the one that would be.

    Raises:
        NumericalError: A weight would differ; says how many scales do.
    """
    if parameters.global_scale is None:
        return
    stored = divisor is not None
    divisor = global_divisor(parameters.global_scale) if divisor is None else divisor.float()
    scales = parameters.scale.unique().unsqueeze(-1)  # type: ignore[no-untyped-call]
    multiplied = (scales * parameters.global_scale) * _E2M1
    divided = (scales / divisor) * _E2M1
    differ = (multiplied.bfloat16() != divided.bfloat16()).any(-1)
    if bool(differ.any()):
        raise NumericalError(
            f"the global scale of `{name}` has no reciprocal that gives the same weights",
            facts=(("multiplier", float(parameters.global_scale)), ("scales that differ", int(differ.sum()))),
            hint="pack it from the artifact that it came from" + ("" if stored else ", or --to hf"),
        )


def is_reciprocal(multiplier: Float[Tensor, ""]) -> bool:
    """Say whether the divisor that stands for a multiplier (or the other way round) gives the same back, in float32."""
    return bool(reciprocal(global_divisor(multiplier)) == multiplier)


def _stream_of(raw: Tensor, bits: int, n_in: int) -> UInt8[Tensor, "out bytes"]:
    """Return codes as ``pack_codes`` makes them: from words, from signed bytes, or as they are."""
    if raw.dtype == torch.int32:
        return _stream_of_words(raw, bits, n_in)
    if raw.dtype != torch.int8:
        return raw.view(torch.uint8)
    return raw.view(torch.uint8) ^ 0x80 if bits == 8 else pack_codes(_unsigned(raw, bits), bits)


def _stream_of_words(words: Int32[Tensor, "rows words"], bits: int, n: int) -> UInt8[Tensor, "rows bytes"]:
    """Return codes in words of 32 bits as ``pack_codes`` makes them.

    Before 0.20 compressed-tensors began each word with a code, and left bits of words that no code fits into.

    Raises:
        ArtifactError: There are as many words in neither layout.
    """
    whole, size = _WORD // bits, packed_size(n, bits)
    dense, apart = -(-n * bits // _WORD), -(-n // whole)
    if words.shape[1] == dense:
        return words.contiguous().view(torch.uint8)[:, :size].contiguous()
    if words.shape[1] != apart:
        facts = (("words", words.shape[1]), ("expected", dense), ("codes", n), ("bits", bits))
        raise ArtifactError("the tensors of a linear do not fit its scheme", facts=facts)
    codes = (words.unsqueeze(-1) >> torch.arange(whole, dtype=torch.int32) * bits) & (1 << bits) - 1
    return pack_codes(codes.flatten(1)[:, :n].to(torch.uint8), bits)


def _zero_points(stored: Tensor, bits: int, n_out: int) -> UInt8[Tensor, "out groups"]:
    """Return the codes that stand for zero, from words along the outputs or from signed bytes."""
    if stored.dtype != torch.int32:
        return _unsigned(stored, bits)
    return unpack_codes(_stream_of_words(stored.T.contiguous(), bits, n_out), bits, n_out).T


def _unsigned(signed: Tensor, bits: int) -> UInt8[Tensor, "rows columns"]:
    """Return signed codes with their offset.

    Raises:
        ArtifactError: One does not fit the bits.
    """
    codes = signed.to(torch.int16) + (1 << bits - 1)
    if bool(((codes < 0) | (codes >= 1 << bits)).any()):
        facts = (("bits", bits), ("least", int(signed.min())), ("largest", int(signed.max())))
        raise ArtifactError("the tensors of a linear do not fit its scheme", facts=facts)
    return codes.to(torch.uint8)


def reciprocal(divisor: Tensor) -> Float[Tensor, ""]:
    """Return the multiplier that a divisor stands for."""
    return (1 / divisor.double()).float().reshape(())


def _reciprocal(divisor: Tensor | None) -> Float[Tensor, ""] | None:
    return None if divisor is None else reciprocal(divisor)
