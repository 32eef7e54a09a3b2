"""AWQ checkpoints in the layout ``gemm``: 4-bit codes in words along the output axis, in an order of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int32, Integer, UInt8
from torch import Tensor
from torch.nn.functional import pad

from qtool.builtin.exporters.compressed_tensors import not_quantized
from qtool.builtin.exporters.packed_schemes import unread
from qtool.builtin.exporters.words import IntegerWords, group_size
from qtool.engine.packed import PackedLinear
from qtool.engine.subject import Subject
from qtool.errors import UsageError
from qtool.model.graph import LinearSite
from qtool.numerics.packing import pack_codes
from qtool.scheme import TensorScheme

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs each nibble of a word holds, from the lowest on."""
_LANES = len(_ORDER)


class AWQ(IntegerWords):
    """``qweight``, ``qzeros`` and ``scales``; symmetric weights have the zero point 8, since readers ask for one."""

    method = layout = "awq"
    bits = (4,)

    def tensors(self, found: PackedLinear, zeros: UInt8[Tensor, "out groups"]) -> dict[str, Tensor]:
        """Return ``qweight`` and ``qzeros``, both in words along the outputs."""
        return {"qweight": _pack(found.stream)[: found.n_in], "qzeros": _pack(pack_codes(zeros, 4))[: zeros.shape[1]]}

    def read_stream(self, words: Int32[Tensor, "in words"]) -> UInt8[Tensor, "out bytes"]:
        """Return all codes as ``pack_codes`` makes them: the nibbles of a word to eight outputs."""
        return _unpack(pad(words, (0, 0, 0, len(words) % 2)))

    def read_codes(self, words: Int32[Tensor, "columns rows"], config: Mapping[str, Any]) -> UInt8[Tensor, "out in"]:
        """Return the codes of some outputs, each read from its own place in a word."""
        return _outputs(words)

    def read_groups(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> tuple[Integer[Tensor, "out groups"], Integer[Tensor, " in"]]:
        """Return zero points and the group of each input."""
        n_in, size = len(tensors["qweight"]), config["group_size"]
        return _outputs(tensors["qzeros"].T), torch.arange(n_in) // (n_in if size == -1 else size)

    def read_config(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a ``quantization_config`` says, under any of the names that it has for sizes and version.

        Raises:
            SchemeError: Codes are laid out for another kernel, or have no zero points, of which readers differ.
        """
        names = {"bits": ("bits", "w_bit"), "group_size": ("group_size", "q_group_size")}
        config = {name: next((said[one] for one in either if one in said), None) for name, either in names.items()}
        versions = {str(one).lower() for name in ("version", "format", "checkpoint_format") if (one := said.get(name))}
        config |= {"version": "gemm", "zero_point": said.get("zero_point", True)}
        if versions - {"gemm"} or not config["zero_point"]:
            raise unread("a layout of AWQ that is not read", dict(said))
        if config["bits"] not in self.bits or not config["group_size"]:
            raise unread(f"codes of {config['bits']} bits in groups of {config['group_size']}", dict(said))
        return config

    def config(self, weights: TensorScheme, subject: Subject) -> dict[str, Any]:
        """Return the ``quantization_config``."""
        return {
            "quant_method": self.method,
            "bits": 4,
            "group_size": group_size(weights),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": sorted(not_quantized(subject.model, subject.kept)),
        }

    def check_linear(self, linear: LinearSite, zeros: UInt8[Tensor, "out groups"], n_in: int, bits: int) -> None:
        """Refuse a linear whose outputs do not fill whole words."""
        if len(zeros) % _LANES:
            raise UsageError(
                f"awq stores eight outputs to a word, which does not divide those of `{linear.name}`",
                facts=(("outputs", len(zeros)),),
                hint="qtool pack SOURCE --to compressed-tensors",
            )


def _pack(stream: UInt8[Tensor, "out bytes"]) -> Int32[Tensor, "in words"]:
    """Return codes, of which a byte holds those of two inputs, with those of eight outputs in a word.

    Words are made along the inputs, as bytes lie, and then turned whole.
    """
    lanes = stream.reshape(-1, _LANES, stream.shape[1])
    words = stream.new_empty(len(lanes), stream.shape[1], 2, _LANES // 2)
    for byte, (low, high) in enumerate(zip(_ORDER[::2], _ORDER[1::2], strict=True)):
        one, other = lanes[:, low], lanes[:, high]
        words[:, :, 0, byte] = one & 0xF | other << 4
        words[:, :, 1, byte] = one >> 4 | other & 0xF0
    return words.view(torch.int32).reshape(len(lanes), -1).T.contiguous()


def _unpack(words: Int32[Tensor, "in words"]) -> UInt8[Tensor, "out bytes"]:
    """Undo ``_pack``."""
    pairs = words.T.contiguous().view(torch.uint8).reshape(words.shape[1], -1, _LANES).transpose(1, 2).contiguous()
    lanes = torch.empty_like(pairs)
    for byte, (low, high) in enumerate(zip(_ORDER[::2], _ORDER[1::2], strict=True)):
        one, other = pairs[:, byte], pairs[:, byte + _LANES // 2]
        lanes[:, low] = one & 0xF | other << 4
        lanes[:, high] = one >> 4 | other & 0xF0
    return lanes.flatten(0, 1)


def _outputs(words: Int32[Tensor, "words n"]) -> UInt8[Tensor, "out n"]:
    """Return the code of each output: of eight, even ones lie in the low half of a word, odd ones in the high half."""
    codes = words.new_empty(len(words), _LANES, words.shape[1], dtype=torch.uint8)
    for lane in range(_LANES):
        codes[:, lane] = words >> 16 * (lane % 2) + 4 * (lane // 2) & 0xF
    return codes.flatten(0, 1)
