"""GPTQ checkpoints: codes of 2, 3, 4 or 8 bits in words along the input axis.

Of the two versions of the layout the first (``checkpoint_format: gptq``) stores zero points less one, the second
(``gptq_v2``) as they are. Both are a dense little-endian stream of bits, so codes of 3 bits straddle words: 32 of them
take 3. Codes are in the order of the inputs (``desc_act`` is false) whatever order a method rounded them in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import gcd
from typing import Any

import torch
from jaxtyping import Int32, Integer, UInt8
from torch import Tensor

from qtool.builtin.exporters.ct_tensors import as_words, pack_words
from qtool.builtin.exporters.mixed import groups_of
from qtool.builtin.exporters.packed_schemes import unread
from qtool.builtin.exporters.stored_names import stored_tensor_name
from qtool.builtin.exporters.words import IntegerWords, group_size
from qtool.engine.packed import PackedLinear
from qtool.engine.subject import Subject
from qtool.errors import UsageError
from qtool.model.graph import LinearSite
from qtool.scheme import TensorScheme

_V2 = "gptq_v2"
_WORD = 32  # bits
_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the codes in them, a byte for each
_EXPERTS = r".*\.experts(?:\..*|$)"
_FUSED: Mapping[str, frozenset[str]] = {
    "qkv_proj": frozenset({"q_proj", "k_proj", "v_proj"}),
    "gate_up_proj": frozenset({"gate_proj", "up_proj"}),
}


class GPTQv2(IntegerWords):
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx``, zero points as they are."""

    method = "gptq"
    layout = _V2
    bits = (2, 3, 4, 8)
    several = True
    offset = 0

    def tensors(self, found: PackedLinear, zeros: UInt8[Tensor, "out groups"]) -> dict[str, Tensor]:
        """Return ``qweight`` in words along the inputs, ``qzeros`` along the outputs, and the group of each input."""
        n_in, groups = found.n_in, zeros.shape[1]
        return {
            "qweight": as_words(found.stream).T.contiguous(),
            "qzeros": pack_words((zeros - self.offset).T.contiguous(), found.bits),
            "g_idx": torch.arange(n_in, dtype=torch.int32) // (n_in // groups),
        }

    def read_stream(self, words: Int32[Tensor, "columns rows"]) -> UInt8[Tensor, "out bytes"]:
        """Return all codes as ``pack_codes`` makes them: words along the inputs are that stream."""
        return words.T.contiguous().view(torch.uint8)

    def read_codes(self, words: Int32[Tensor, "columns rows"], config: Mapping[str, Any]) -> UInt8[Tensor, "out in"]:
        """Return the codes of some outputs, unpacked place by place."""
        return _from_stream(words, config["bits"])

    def read_groups(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> tuple[Integer[Tensor, "out groups"], Integer[Tensor, " in"]]:
        """Return zero points and the group of each input; symmetric ones some readers take for granted.

        Raises:
            ValueError: The config says that they are symmetric, and they are not in the middle.
        """
        offset, bits = 0 if config["checkpoint_format"] == _V2 else 1, config["bits"]
        zeros = _from_stream(tensors["qzeros"], bits).T.int() + offset
        if config["sym"] and bool((zeros != 1 << bits - 1).any()):
            raise ValueError("the config says `sym`, and zero points are not in the middle")
        return zeros, tensors["g_idx"]

    def config(self, weights: TensorScheme, subject: Subject) -> dict[str, Any]:
        """Return the ``quantization_config``."""
        dynamic = dynamic_rules(subject)
        return {
            "quant_method": self.method,
            **_choices(weights),
            **({"dynamic": dynamic} if dynamic else {}),
            "desc_act": False,
            "lm_head": False,
            "checkpoint_format": self.layout,
            "pack_dtype": "int32",
        }

    def read_config(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a ``quantization_config`` says, with what it leaves unsaid.

        The version is its ``format``, as GPTQModel and transformers name it now, or ``checkpoint_format``.

        Raises:
            SchemeError: Codes are in words of another size, or laid out for one kernel, or it names two versions.
        """
        config = {"sym": True, "group_size": 128, **said}
        formats = {str(one).lower() for name in ("format", "checkpoint_format") if (one := said.get(name))}
        config["checkpoint_format"] = next(iter(formats), GPTQ.layout)
        words = str(said.get("pack_dtype") or "int32").removeprefix("torch.")
        known = len(formats) < 2 and formats <= {GPTQ.layout, _V2}
        if not known or said.get("is_marlin_format") or words != "int32":
            raise unread("a layout of GPTQ that is not read", dict(said))
        if config["bits"] not in self.bits:
            raise unread(f"codes of {config['bits']} bits", dict(said))
        return config

    def config_of(self, linear: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the config with what the first rule that matches a linear says, as GPTQModel and vLLM read it."""
        rules = (config.get("dynamic") or {}).items()
        found = (own for pattern, own in rules if re.match(pattern.removeprefix("+:").removeprefix("-:"), linear))
        return {**config, **next(found, {})}

    def check_linear(self, linear: LinearSite, zeros: UInt8[Tensor, "out groups"], n_in: int, bits: int) -> None:
        """Refuse a linear whose inputs or outputs do not fill whole words."""
        step, n_out = _WORD if bits == 3 else _WORD // bits, len(zeros)
        if n_in % step or n_out % step:
            raise UsageError(
                f"{self.layout} stores whole words, which the codes of `{linear.name}` do not fill",
                facts=(("codes to fill them", step), ("outputs", n_out), ("inputs", n_in)),
                hint="qtool pack SOURCE --to compressed-tensors",
            )


class GPTQ(GPTQv2):
    """The same, zero points less one: what most readers know."""

    layout = "gptq"
    offset = 1

    def check_linear(self, linear: LinearSite, zeros: UInt8[Tensor, "out groups"], n_in: int, bits: int) -> None:
        """Refuse zero points of 0 too, which wrap round: readers disagree whether they are 0 or ``2**bits``."""
        super().check_linear(linear, zeros, n_in, bits)
        found = int((zeros == 0).sum())
        if found:
            raise UsageError(
                "gptq stores zero points less one, and one of 0 would wrap round",
                facts=(("first", linear.name), ("groups", f"{found} of {zeros.numel()}")),
                hint="qtool pack SOURCE --to gptq-v2, which stores them as they are",
            )


def dynamic_rules(subject: Subject) -> dict[str, dict[str, Any]]:
    """Return rules for linears that are not as most are, by patterns of their names.

    vLLM looks for the name of what it fuses, so that is in the pattern of linears that it fuses. Experts, which have
    one scheme, are one module to it.
    """
    _, *others = groups_of(subject)
    kept = [linear for linear in subject.model.graph.linears if linear.name in subject.kept]
    rules = {f"-:{pattern}": dict[str, Any]() for pattern in _patterns(subject, kept)}
    for scheme, linears in others:
        if scheme.weights is not None:
            choices = _choices(scheme.weights)
            rules |= {f"+:{pattern}": choices for pattern in _patterns(subject, linears)}
    return rules


def _patterns(subject: Subject, linears: Iterable[LinearSite]) -> dict[str, None]:
    """Return patterns that match linears, what they are fused into, and no other linear."""
    found: dict[str, None] = {}
    parts: dict[str, list[str]] = {}
    for linear in linears:
        if linear.expert is not None:
            found[_EXPERTS] = None
            continue
        stored = stored_tensor_name(subject.model, f"{linear.name}.weight").removesuffix(".weight")
        for name in dict.fromkeys((linear.name, stored)):
            owner, _, leaf = name.rpartition(".")
            parts.setdefault(owner, []).append(leaf)
    for owner, leaves in parts.items():
        fused = [whole for whole, shards in _FUSED.items() if shards <= set(leaves)]
        found[rf"{re.escape(owner)}\.(?:{'|'.join([*leaves, *fused])})$"] = None
    return found


def _choices(weights: TensorScheme) -> dict[str, Any]:
    return {"bits": _bits(weights), "group_size": group_size(weights), "sym": weights.symmetric}


def _bits(weights: TensorScheme) -> int:
    return int(weights.format.removeprefix("int"))


def _from_stream(words: Int32[Tensor, "rows words"], bits: int) -> UInt8[Tensor, "rows n"]:
    """Read rows of codes, the lowest bit of the first word first: each place in as many bytes as codes fill."""
    places = 8 // gcd(8, bits)
    pieces = words.view(torch.uint8).reshape(len(words), -1, places * bits // 8)
    codes = pieces.new_zeros(pieces.shape[:2], dtype=_BYTES[places])
    for place in range(places):
        byte, shift = divmod(place * bits, 8)
        code = pieces[..., byte] >> shift
        if shift + bits > 8:
            code = code | pieces[..., byte + 1] << 8 - shift
        codes |= (code & (1 << bits) - 1).to(codes.dtype) << 8 * place
    return codes.view(torch.uint8)
