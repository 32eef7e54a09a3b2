"""Integer weights as GPTQ and AWQ lay them out: codes and zero points in 32-bit words, scales in float16 beside them.

Both are for weights only, and both have the matrices of a linear transposed. Symmetric codes, which qtool offsets by
``2^(b-1)``, have that zero point in every group. Scales keep their sign. Nothing is rounded on writing: a scale that
float16 cannot hold exactly is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int32, Integer, UInt8
from torch import Tensor, nn
from transformers import AutoConfig

from qtool.builtin.exporters.checkpoint import left_alone_counts, write_checkpoint
from qtool.builtin.exporters.consumer_process import consumer_reader
from qtool.builtin.exporters.mixed import (
    fused_apart,
    groups_of,
    mixed_consumers,
    refuse_mixed_experts,
    refuse_several,
)
from qtool.builtin.exporters.nearest import check_schemes
from qtool.builtin.exporters.packed_words import open_words
from qtool.builtin.exporters.read_back import (
    CheckpointReader,
    empty_model,
    same_bytes,
    telling_rows,
    weight_difference,
    with_linear_experts,
    with_stored_shapes,
)
from qtool.builtin.exporters.refusals import (
    quantized_weights,
    refuse_all_but_codes,
    refuse_ends,
    refuse_real,
    refuse_scale_codes,
)
from qtool.consumers.checkpoint import artifact_facts
from qtool.consumers.config import cases_of
from qtool.consumers.shapes import shapes_of
from qtool.engine.exporter import Exported
from qtool.engine.packed import PackedLinear, one_thread, take_rows
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, NumericalError, SchemeError, UsageError
from qtool.model.graph import LinearSite
from qtool.numerics.packing import unpack_codes
from qtool.numerics.scales import decode_scale
from qtool.plugins import Plugins
from qtool.scheme import GroupParameters, ModelScheme, TensorScheme

_SIXTEEN_BIT = {"bf16": torch.bfloat16, "fp16": torch.float16}
_UNREADABLE = (KeyError, IndexError, ValueError, RuntimeError)


class IntegerWords(ABC):
    """Writes one layout of integers in words; what sets the layouts apart is left to them.

    Class attributes: ``version``, ``method`` and ``layout`` (what configs and qtool call it), ``bits`` (those that it
    has codes of) and ``several`` (whether its config can say that linears differ in scheme).
    """

    version = 1
    method: ClassVar[str]
    layout: ClassVar[str]
    bits: ClassVar[tuple[int, ...]]
    several: ClassVar[bool] = False

    @abstractmethod
    def tensors(self, found: PackedLinear, zeros: UInt8[Tensor, "out groups"]) -> dict[str, Tensor]:
        """Return codes and zero points as they are stored, named below the linear."""

    @abstractmethod
    def read_stream(self, words: Int32[Tensor, "columns rows"]) -> UInt8[Tensor, "out bytes"]:
        """Return all codes of ``qweight`` as ``pack_codes`` makes them."""

    @abstractmethod
    def read_codes(self, words: Int32[Tensor, "columns rows"], config: Mapping[str, Any]) -> UInt8[Tensor, "out in"]:
        """Return the codes of some outputs, whose columns of ``qweight`` are given, as a reader of the config has them.

        Shares no code with ``tensors``.
        """

    @abstractmethod
    def read_groups(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> tuple[Integer[Tensor, "out groups"], Integer[Tensor, " in"]]:
        """Return zero points and the group of each input, likewise."""

    @abstractmethod
    def read_config(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a ``quantization_config``, whoever wrote it, says, in the words of ``config``.

        Raises:
            SchemeError: Something that makes the tensors another layout, or that readers understand differently.
        """

    @abstractmethod
    def config(self, weights: TensorScheme, subject: Subject) -> dict[str, Any]:
        """Return the ``quantization_config``."""

    @abstractmethod
    def check_linear(self, linear: LinearSite, zeros: UInt8[Tensor, "out groups"], n_in: int, bits: int) -> None:
        """Refuse a linear whose codes do not fill whole words, or whose zero points the layout cannot hold.

        Raises:
            UsageError: Names the linear.
        """

    def open(self, directory: Path, plugins: Plugins, *, cache: Path, identity: str = "") -> Subject:
        """Open a checkpoint of such a layout, of either version, as what is to be packed."""
        return open_words(self, directory, plugins, cache=cache, identity=identity)

    def check_scales(self, subject: Subject, to: str) -> int:
        """Say that no scale is turned into another: there are none that others divide by."""
        del subject, to
        return 0

    @one_thread()
    def check(self, subject: Subject) -> None:
        """Refuse schemes, shapes, scales and zero points that the layout cannot hold, and what no consumer reads.

        Raises:
            UsageError: Names what does not fit and the nearest that does.
            NumericalError: A scale that float16 cannot hold.
        """
        refuse_ends(subject, self.layout)
        refuse_real(subject, self.layout)
        refuse_scale_codes(subject, self.layout)
        check_schemes(subject, partial(self._check_scheme, subject))
        bits = {weights: subject.plugins.format(weights.format).bits for weights, _ in _weights_of(subject)}
        if not self.several:
            refuse_several(subject, self.layout)
        refuse_mixed_experts(subject, self.layout)
        refuse_all_but_codes(subject, self.layout)
        experts = subject.model.graph.dims.experts > 0
        told = self._consumers(subject) if experts else {}
        if experts and told["vllm"].startswith("refused"):
            raise UsageError(
                f"no consumer reads these experts from {self.layout}",
                facts=(("vllm", told["vllm"]), ("transformers", told["transformers"])),
                hint="qtool pack SOURCE --to compressed-tensors",
            )
        for weights, linears in _weights_of(subject):
            for linear in linears:
                scale, zeros = _stored_parameters(subject, linear, weights, bits[weights])
                _check_scales(linear, scale, weights)
                n_in = subject.model.places[f"{linear.name}.weight"].shape[1]
                self.check_linear(linear, zeros, n_in, bits[weights])

    def write(self, subject: Subject, directory: Path) -> Exported:
        """Write the checkpoint into an empty folder."""
        weights = quantized_weights(subject)
        dtype = _model_dtype(weights, subject.model.dtype)

        @one_thread()
        def made(linear: LinearSite, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
            own = subject.scheme.of(linear.name).weights
            if linear.spec.kept or own is None:
                return {}
            found: PackedLinear = subject.packed(linear)
            tensors = self.tensors(found, zero_points(found.parameters, found.bits))
            return tensors | {"scales": found.parameters.scale.half().T.contiguous()}

        config = self.config(weights, subject)
        sizes = write_checkpoint(subject, directory, made, dtype=dtype, quantization=config)
        details: dict[str, object] = {"layout": self.layout, "dtype": str(dtype).removeprefix("torch.")}
        details |= {"bytes": vars(sizes), "left_alone": left_alone_counts(subject.model)}
        return Exported(self._consumers(subject), details)

    @one_thread()
    def verify(self, subject: Subject, directory: Path) -> str:
        """Unpack every linear as the written config says and compare codes, zero points, scales and groups with ours.

        Names and shapes are compared with the model of the config with such linears. Where GPTQModel is installed it
        decodes rows of every linear, by the config as it reads it.

        Raises:
            ArtifactError: Names the first weight that differs.
        """
        model = subject.model
        config = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
        stated, plain = config.quantization_config, deepcopy(config)
        del plain.quantization_config
        module = with_linear_experts(empty_model(plain, model), model)
        reader = CheckpointReader(directory, model)

        def shapes(child: nn.Linear, linear: LinearSite) -> dict[str, tuple[int, ...]]:
            return self.shapes(child.out_features, child.in_features, self.config_of(linear.name, stated))

        reader.compare(with_stored_shapes(module, subject.linears, shapes))
        with consumer_reader("gptqmodel", directory) as theirs:
            for linear in subject.linears:
                said, ours = self.config_of(linear.name, stated), subject.packed(linear)
                self._compare(linear.name, reader.module(linear.name), said, ours)
                theirs.compare_rows(linear.name, reader.name(linear.name), ours, subject.weight_grid(linear))
        return theirs.said

    def _compare(self, name: str, tensors: Mapping[str, Tensor], said: Mapping[str, Any], ours: PackedLinear) -> None:
        """Compare what is stored of a linear with what was packed: all codes packed, telling rows unpacked as well."""
        own, n_in, n_out = ours.parameters, ours.n_in, len(ours.stream)
        try:
            words = tensors["qweight"]
            if not same_bytes(self.read_stream(words), ours.stream):
                whole = slice(0, n_out)
                raise weight_difference(name, self.read_codes(words.T.contiguous(), said), ours.codes(whole))
            for rows in telling_rows(ours, 1):
                some = take_rows(words, rows, n_out, axis=1).T.contiguous()
                codes, wanted = self.read_codes(some, said), ours.codes(rows)
                if codes.shape != wanted.shape or not torch.equal(codes, wanted):
                    raise weight_difference(name, codes, wanted)
            zeros, groups = self.read_groups(tensors, said)
        except _UNREADABLE as error:
            reason = str(error).split("\n")[0]
            raise ArtifactError(f"cannot unpack `{name}`", facts=(("reason", reason),)) from error
        for found, expected in (
            (zeros, zero_points(own, ours.bits)),
            (tensors["scales"].T, own.scale),
            (groups, torch.arange(n_in) // (n_in // own.scale.shape[-1])),
        ):
            if found.shape != expected.shape or not bool((found == expected).all()):
                raise weight_difference(name, found, expected)

    def shapes(self, n_out: int, n_in: int, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a linear's tensors, without its bias, as a reader of the config expects them."""
        (case,) = cases_of({**config, "quant_method": self.method, "dynamic": None})
        return shapes_of(case, n_out, n_in)

    def config_of(self, linear: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what a reader of the config takes it to say of a linear."""
        del linear
        return config

    def _consumers(self, subject: Subject) -> dict[str, str]:
        """Return what loads the checkpoint, and what each loader executes of which linears."""
        config = self.config(quantized_weights(subject), subject)
        about = {"apart": bool(fused_apart(subject)), "experts": subject.model.graph.dims.experts > 0}
        each = []
        for weights, linears in _weights_of(subject):
            dtype = _model_dtype(weights, subject.model.dtype)
            facts = artifact_facts(replace(subject.scheme, weights=weights, rules=()), dtype=dtype)
            own = {key: value for key, value in self.config_of(linears[0].name, config).items() if key != "dynamic"}
            (case,) = cases_of(own, **facts, **about)
            each.append((linears, case))
        return mixed_consumers(each)

    def _check_scheme(self, subject: Subject, scheme: ModelScheme) -> None:
        """Refuse a scheme that the layout cannot say."""
        weights = scheme.weights
        if weights is None:
            return
        if any(part is not None for part in (scheme.activations, scheme.kv, scheme.outputs)):
            raise SchemeError(
                f"{self.layout} is for weights only, and its consumers would run the rest in 16 bits",
                facts=(("scheme", scheme),),
            )
        bits = subject.plugins.format(weights.format).bits
        has = ", ".join(str(own) for own in self.bits)
        if weights.format != f"int{bits}":
            raise SchemeError(f"{self.layout} has integers only", facts=(("weights", weights), ("bits", has)))
        if bits not in self.bits:
            raise SchemeError(f"{self.layout} has codes of {has} bits", facts=(("weights", weights),))
        if weights.strategy == "tensor":
            rows = replace(weights, strategy="channel")
            raise _refusal(f"{self.layout} has no scale for a whole tensor", weights, rows)
        if weights.scale not in _SIXTEEN_BIT:
            nearest = replace(weights, scale="fp16")
            raise _refusal(f"{self.layout} has float16 scales, which hold bf16 and fp16 ones", weights, nearest)


def _weights_of(subject: Subject) -> list[tuple[TensorScheme, tuple[LinearSite, ...]]]:
    """Return the schemes of weights, that of most linears first, each with its linears."""
    return [(one.weights, linears) for one, linears in groups_of(subject) if one.weights is not None]


def zero_points(parameters: GroupParameters, bits: int) -> UInt8[Tensor, "out groups"]:
    """Return the codes that stand for zero: of symmetric integers the middle of the grid."""
    if parameters.zero_point is None:
        return torch.full_like(parameters.scale, 2 ** (bits - 1), dtype=torch.uint8)
    return parameters.zero_point.to(torch.uint8)


def group_size(weights: TensorScheme) -> int:
    """Return the group size as these layouts spell it: -1 for a scale an output row."""
    return -1 if weights.group_size is None else weights.group_size


def _model_dtype(weights: TensorScheme, stored: torch.dtype) -> torch.dtype:
    """Return what is not quantized is stored in: the model's own 16 bits, or those of the scales."""
    return stored if stored in _SIXTEEN_BIT.values() else _SIXTEEN_BIT[weights.scale]


def _stored_parameters(
    subject: Subject, linear: LinearSite, weights: TensorScheme, bits: int
) -> tuple[Float[Tensor, "out groups"], UInt8[Tensor, "out groups"]]:
    """Read the scales and zero points of a linear, and not its codes."""
    artifact = subject.quantized
    if artifact is None:
        raise LookupError(linear.name)
    scale = decode_scale(artifact.tensor(f"{linear.name}.scale"), weights.scale)
    if weights.symmetric:
        return scale, zero_points(GroupParameters(scale), bits)
    return scale, unpack_codes(artifact.tensor(f"{linear.name}.zero_point"), bits, scale.shape[-1])


def _check_scales(linear: LinearSite, scale: Float[Tensor, "out groups"], weights: TensorScheme) -> None:
    """Refuse scales that float16 does not hold exactly."""
    lost = scale.half().float() != scale
    if bool(lost.any()):
        largest = float(scale[lost].abs().max())
        raise NumericalError(
            f"float16 cannot hold scales of `{linear.name}`",
            facts=(("scales", int(lost.sum())), ("of", scale.numel()), ("largest of them", f"{largest:.3g}")),
            hint=f"nearest that fits: --weights {replace(weights, scale='fp16')}",
        )


def _refusal(reason: str, weights: TensorScheme, nearest: TensorScheme) -> SchemeError:
    return SchemeError(reason, facts=(("weights", weights),), hint=f"nearest that fits: --weights {nearest}")
