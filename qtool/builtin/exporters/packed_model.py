"""What a packed checkpoint holds besides the weights of its quantized linears, and what it may not hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from qtool.artifacts.layout import TensorSlot
from qtool.builtin.exporters.cache_scales import (
    CACHE_ZEROS,
    IN_ATTENTION,
    cache_places,
    has_zero_points,
    zero_places,
)
from qtool.builtin.exporters.packed_layouts import INPUT_LEAVES, LEAVES, OUTPUT_LEAVES
from qtool.builtin.exporters.read_back import empty_model
from qtool.errors import ArtifactError
from qtool.model.files import StoredTensor
from qtool.model.graph import LinearSite
from qtool.model.naming import Place, places_of
from qtool.model.reading import read_place
from qtool.model.source import Model
from qtool.scheme import ModelScheme

_CODES = ("F8_E4M3", "U8", "I8", "I32")
_OWN = frozenset({*IN_ATTENTION.values(), "weight", "bias"})
_ZEROS = ("input_zero_point", "output_zero_point")


@dataclass(frozen=True)
class PackedModel(Model):
    """What a packed checkpoint holds besides the weights of its quantized linears.

    Class attributes: ``leaves`` (what a layout calls the tensors of a quantized linear), and of them ``scale``,
    ``codes`` and ``needed`` (those that all have beside codes).

    Attributes:
        apart: What modules are called that hold matrices of rotations, which are no weights of the model.
    """

    leaves: ClassVar[tuple[str, ...]] = (*LEAVES, *INPUT_LEAVES, *OUTPUT_LEAVES)
    scale: ClassVar[str] = "weight_scale"
    codes: ClassVar[tuple[str, ...]] = ("weight_packed", "weight")
    needed: ClassVar[tuple[str, ...]] = ("weight_scale",)

    apart: frozenset[str] = frozenset()

    @cached_property
    def packed(self) -> Mapping[str, Place]:
        """Where every tensor of the checkpoint lies, by the name that the graph knows."""
        return places_of(self.stored, self.family)

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Where every tensor lies that is not a linear's codes or scales, and a place for each linear's weight."""
        own = {f"{linear.name}.{leaf}" for linear in self.coded for leaf in (*self.leaves, "weight")}
        own |= {name for name, _ in self.cached.values()} | {name for name in self.packed if _leaf(name) in CACHE_ZEROS}
        own |= self.matrices.keys()
        places = {name: place for name, place in self.found_places().items() if name not in own}
        return places | {f"{linear.name}.weight": self._placeholder(linear) for linear in self.coded}

    @cached_property
    def parameters(self) -> frozenset[str]:
        """What transformers calls the parameters of the model of this config; a tied head has none of its own."""
        tied = {f"{self.family.head}.weight"} if self.graph.dims.tied else set()
        return frozenset(name for name, _ in empty_model(deepcopy(self.config), self).named_parameters()) - tied

    @cached_property
    def matrices(self) -> Mapping[str, Place]:
        """Where the matrices of rotations lie, by their names."""
        return {name: place for name, place in self.packed.items() if self.apart.intersection(name.split(".")[-2:-1])}

    @cached_property
    def coded(self) -> tuple[LinearSite, ...]:
        """The linears that have scales; a head and an embedding that have some come last."""
        linears = (*self.graph.linears, *self.graph.ends)
        return tuple(linear for linear in linears if f"{linear.name}.{self.scale}" in self.packed)

    @cached_property
    def cached(self) -> Mapping[str, tuple[str, Place]]:
        """The names and places of static scales of keys and values, by their names in artifacts."""
        return cache_places(self.graph, self.packed)

    @cached_property
    def cached_zeros(self) -> Mapping[str, tuple[str, Place]]:
        """Those of their zero points, some of which may be 0 and belong to nothing."""
        return zero_places(self.graph, self.packed)

    def tensors(self, prefix: str, *, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Read the tensors below ``prefix``, keyed by the rest of their names; no weights that are codes."""
        return super().tensors(prefix, without={*without, *self._weights})

    @cached_property
    def _weights(self) -> frozenset[str]:
        return frozenset(f"{linear.name}.weight" for linear in self.coded)

    def rows(self, linear: LinearSite) -> int:
        """Return the outputs of a linear that has codes."""
        return next(self.packed[name].shape[0] for name in self.codes_of(linear) if name in self.packed)

    def codes_of(self, linear: LinearSite) -> tuple[str, ...]:
        """Return what the codes of a linear may be called."""
        return tuple(f"{linear.name}.{leaf}" for leaf in self.codes)

    def _placeholder(self, linear: LinearSite) -> Place:
        """Return the place of a weight of as many rows as its codes have; there are no bytes in it."""
        codes = next((self.packed[name] for name in self.codes_of(linear) if name in self.packed), None)
        if codes is None or codes.expert is not None or codes.stored.slot.dtype not in _CODES:
            raise ArtifactError(
                f"`{linear.name}` of `{self.path}` has scales and no codes, or all experts are one tensor",
                facts=(("weight", codes.stored.slot.dtype if codes else "none"), ("expected", ", ".join(_CODES))),
                hint="save it compressed, with the tool that made it",
            )
        rows, columns = self.rows(linear), self.graph.width(linear.spec.reads)
        said = getattr(self.config.get_text_config(), "dtype", None)
        dtype = {torch.float16: "F16", torch.float32: "F32"}.get(said or torch.bfloat16, "BF16")
        slot = TensorSlot(dtype, (rows, columns), 0, 0)
        return Place(f"{codes.name.rpartition('.')[0]}.weight", StoredTensor(codes.stored.file, slot))


def refuse_codes(model: PackedModel) -> None:
    """Refuse codes of what is not transcoded, and a linear or a model that lacks a tensor.

    Raises:
        ArtifactError: Names the first.
    """
    _refuse_half_linears(model)
    _refuse_other_codes(model)
    _refuse_shared_codes(model)
    _refuse_missing(model)


def refuse_tensors(model: PackedModel, scheme: ModelScheme) -> None:
    """Refuse what a scheme does not speak of.

    Raises:
        ArtifactError: Names the first.
    """
    _refuse_zero_points(model, scheme)
    _refuse_other_tensors(model, scheme)
    _refuse_other_biases(model)


def _refuse_half_linears(model: PackedModel) -> None:
    """Refuse a linear whose codes have no scales, or lack what else they always have."""
    for linear in (*model.graph.linears, *model.graph.ends):
        stored = [model.packed[name].stored.slot.dtype for name in model.codes_of(linear) if name in model.packed]
        lacking = [f"{linear.name}.{leaf}" for leaf in model.needed if f"{linear.name}.{leaf}" not in model.packed]
        if lacking and not {*_CODES}.isdisjoint(stored):
            raise ArtifactError(
                f"the checkpoint has codes of `{linear.name}`, and lacks `{lacking[0]}`",
                facts=(("stored as", stored[0]), ("family", model.family.name)),
                hint="check that the download is complete",
            )


def _refuse_other_codes(model: PackedModel) -> None:
    """Refuse a checkpoint with codes outside of the linears that are transcoded, such as a vision tower."""
    coded, leaves = {linear.name for linear in model.coded}, {*model.leaves}
    named = (name.rpartition(".") for name in model.packed)
    odd = next((f"{owner}.{leaf}" for owner, _, leaf in named if leaf in leaves and owner not in coded), None)
    if odd is not None:
        raise ArtifactError(
            "the checkpoint has codes of what qtool does not quantize",
            facts=(("first", odd), ("family", model.family.name)),
            hint="quantize the original model without it: qtool mitigate MODEL",
        )


def _refuse_shared_codes(model: PackedModel) -> None:
    """Refuse an embedding of codes that a tied head would have to share."""
    family, graph = model.family, model.graph
    head = f"{family.head}.weight"
    if graph.embedding in model.coded and graph.head not in model.coded and head not in model.packed:
        raise ArtifactError(
            "the embedding is quantized, and the head, which is tied to it, has no weights of its own",
            facts=(("embedding", family.embedding), ("head", family.head)),
            hint="quantize the original model: qtool mitigate MODEL, which gives the head weights of its own",
        )


def _refuse_missing(model: PackedModel) -> None:
    """Refuse a model without a tensor that it needs.

    Of experts, which transformers has in one tensor, only the linears are looked for.
    """
    experts, linears = model.family.experts, [f"{one.name}.weight" for one in model.graph.linears]
    others = (name for name in sorted(model.parameters) if experts is None or f".{experts.module}." not in name)
    wanted = (name for name in dict.fromkeys((*linears, *others)) if not name.startswith(tuple(model.family.untouched)))
    lacking = [name for name in wanted if name not in model.places]
    if lacking:
        raise ArtifactError(
            f"the checkpoint lacks `{lacking[0]}`" + (", and codes in its place" if lacking[0] in linears else ""),
            facts=(("lacking", len(lacking)), ("family", model.family.name)),
            hint="check that the download is complete",
        )


def _refuse_zero_points(model: PackedModel, scheme: ModelScheme) -> None:
    """Refuse zero points of what is symmetric that are others than 0, and inputs or outputs that lack one."""
    zeros = {name: place for name, place in model.packed.items() if _leaf(name) in (*CACHE_ZEROS, *_ZEROS)}
    if has_zero_points(scheme):
        zeros = {name: place for name, place in zeros.items() if _leaf(name) not in CACHE_ZEROS}
    for linear in model.coded:
        own = scheme.of(linear.name)
        for leaf, part in zip(_ZEROS, (own.activations, own.outputs), strict=True):
            name, end = f"{linear.name}.{leaf}", leaf.partition("_")[0]
            if part is not None and part.static and not part.symmetric and zeros.pop(name, None) is None:
                raise ArtifactError(
                    f"the config says that {end}s have calibrated zero points, and the checkpoint lacks one",
                    facts=(("first", name),),
                    hint="check that the download is complete",
                )
    odd = next((name for name, place in zeros.items() if read_place(place).float().any()), None)
    if odd is not None:
        named = dict(zip(_ZEROS, (("inputs", "--activations"), ("outputs", "--outputs")), strict=True))
        what, option = named.get(_leaf(odd), ("a KV cache", "--kv"))
        raise ArtifactError(
            f"the checkpoint has {what} with zero points, and its config says that there are none",
            facts=(("first", odd),),
            hint=f"quantize the original model again: qtool mitigate MODEL {option} fp8-tensor-static",
        )


def _refuse_other_tensors(model: PackedModel, scheme: ModelScheme) -> None:
    """Refuse what a linear has beside codes, scales and a bias, such as the order of its columns.

    Scales of outputs are such, too, where the config does not say that they are quantized: nothing reads them then.
    """
    own = {*_OWN, *model.leaves} - {*OUTPUT_LEAVES}
    known = {one.name: own | {*(OUTPUT_LEAVES if scheme.of(one.name).outputs else ())} for one in model.coded}
    named = (name.rpartition(".") for name in model.packed)
    odd = next((f"{owner}.{leaf}" for owner, _, leaf in named if leaf not in known.get(owner, (leaf,))), None)
    if odd is not None:
        raise ArtifactError(
            "a linear of the checkpoint has more than codes and scales",
            facts=(("first", odd),),
            hint="quantize the original model again, without it: qtool mitigate MODEL",
        )


def _refuse_other_biases(model: PackedModel) -> None:
    """Refuse biases that the model does not have, which some engines would add and others would not."""
    biased = (f"{one.name}.bias" for one in model.coded if one.expert is None)
    if odd := [name for name in biased if name in model.places and name not in model.parameters]:
        raise ArtifactError(
            "the checkpoint has biases that its model does not have",
            facts=(("first", odd[0]), ("of", len(odd))),
            hint="quantize the original model again: qtool mitigate MODEL",
        )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
