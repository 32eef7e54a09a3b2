"""A packed checkpoint as a subject: its codes and scales stand for an artifact, its other tensors for the model.

Nothing is decoded on the way and nothing is written: tensors are read when an exporter asks for them. Of the weight of
a quantized linear the model has the name and the shape, and no values, which no exporter looks at. Linears without
scales are as they are stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from qtool.artifacts.layout import Header, TensorSlot
from qtool.artifacts.manifest import Manifest, Step
from qtool.artifacts.store import Artifact
from qtool.builtin.exporters.cache_scales import (
    CACHE_ZEROS,
    IN_ATTENTION,
    cache_places,
    check_stored_cache,
    has_zero_points,
    place_of,
    read_scale,
    stored_shape,
    unsigned_zero_point,
    zero_places,
)
from qtool.builtin.exporters.packed_layouts import (
    INPUT_LEAVES,
    LEAVES,
    check_reciprocal,
    is_reciprocal,
    read_input_zero_point,
    read_multiplier,
    read_packed,
)
from qtool.builtin.exporters.packed_schemes import Seen, packed_method, read_scheme
from qtool.engine.grid import Grid
from qtool.engine.packed import PackedLinear
from qtool.engine.stored import INPUT_GLOBAL_SCALE, INPUT_ZERO_POINT, packed_tensors
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, UsageError
from qtool.model.family import Family
from qtool.model.files import StoredTensor, folder_digest
from qtool.model.graph import LinearSite
from qtool.model.naming import Place, places_of
from qtool.model.reading import read_place
from qtool.model.source import Model, family_of
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, TensorScheme

_CODES = ("F8_E4M3", "U8", "I8", "I32")
_OWN = frozenset({*LEAVES, *INPUT_LEAVES, *IN_ATTENTION.values(), "weight", "bias"})
_SCALE, _INPUT_ZERO = ".weight_scale", "input_zero_point"
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
_UNREADABLE = (KeyError, ValueError, RuntimeError, IndexError)


@dataclass(frozen=True)
class PackedModel(Model):
    """What a packed checkpoint holds besides the weights of its quantized linears."""

    @cached_property
    def packed(self) -> Mapping[str, Place]:
        """Where every tensor of the checkpoint lies, by the name that the graph knows."""
        return places_of(self.stored, self.family)

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Where every tensor lies that is not a linear's codes or scales, and a place for each linear's weight."""
        leaves = (*LEAVES, *INPUT_LEAVES, "weight")
        own = {f"{linear.name}.{leaf}" for linear in self.coded for leaf in leaves}
        own |= {name for name, _ in self.cached.values()} | {name for name in self.packed if _leaf(name) in CACHE_ZEROS}
        places = {name: place for name, place in self.found_places().items() if name not in own}
        return places | {f"{linear.name}.weight": self._placeholder(linear) for linear in self.coded}

    @cached_property
    def coded(self) -> tuple[LinearSite, ...]:
        """The linears that have scales; a head and an embedding that have some come last."""
        linears = (*self.graph.linears, *self.graph.ends)
        return tuple(linear for linear in linears if f"{linear.name}{_SCALE}" in self.packed)

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

    def _placeholder(self, linear: LinearSite) -> Place:
        """Return the place of a weight of as many rows as its codes have; there are no bytes in it."""
        codes = self.packed.get(f"{linear.name}.weight_packed") or self.packed.get(f"{linear.name}.weight")
        if codes is None or codes.expert is not None or codes.stored.slot.dtype not in _CODES:
            raise ArtifactError(
                f"`{linear.name}` of `{self.path}` has scales and no codes, or all experts are one tensor",
                facts=(("weight", codes.stored.slot.dtype if codes else "none"), ("expected", ", ".join(_CODES))),
                hint="save it compressed, with the tool that made it",
            )
        rows, columns = codes.shape[0], self.graph.width(linear.spec.reads)
        said = getattr(self.config.get_text_config(), "dtype", None)
        dtype = {torch.float16: "F16", torch.float32: "F32"}.get(said or torch.bfloat16, "BF16")
        slot = TensorSlot(dtype, (rows, columns), 0, 0)
        return Place(f"{codes.name.rpartition('.')[0]}.weight", StoredTensor(codes.stored.file, slot))


@dataclass(frozen=True)
class PackedArtifact(Artifact):
    """The codes and scales of a packed checkpoint under the names that an artifact has for them."""

    model: PackedModel
    scheme: ModelScheme
    plugins: Plugins
    method: str

    @cached_property
    def header(self) -> Header:
        """The names of all tensors; shapes and places are those of the checkpoint's own."""
        slots: dict[str, TensorSlot] = {}
        for linear in self.model.coded:
            symmetric = _weights_of(self.scheme, linear.name).symmetric
            leaves = ["codes", "scale", *([] if symmetric else ["zero_point"])]
            leaves += ["global_scale"] if self._global_leaf(linear.name) else []
            slots |= dict.fromkeys((f"{linear.name}.{leaf}" for leaf in leaves), TensorSlot("U8", (), 0, 0))
            if any(f"{linear.name}.{leaf}" in self.model.packed for leaf in INPUT_LEAVES):
                slots[f"{linear.reads}{INPUT_GLOBAL_SCALE}"] = TensorSlot("F32", (), 0, 4)
            inputs = self.scheme.of(linear.name).activations
            if inputs is not None and inputs.static and not inputs.symmetric:
                slots[f"{linear.reads}{INPUT_ZERO_POINT}"] = TensorSlot("U8", (), 0, 1)
        for names, dtype, size in ((self.model.cached, "F32", 4), (self.cached_zeros, "U8", 1)):
            shapes = {name: self.cached_shape(name) for name in names}
            slots |= {name: TensorSlot(dtype, shape, 0, size * prod(shape)) for name, shape in shapes.items()}
        return Header({}, slots)

    @property
    def cached_zeros(self) -> Mapping[str, tuple[str, Place]]:
        """The zero points of a cache that has some."""
        return self.model.cached_zeros if has_zero_points(self.scheme) else {}

    def cached_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a static scale of a cache, or of its zero point, by its name in artifacts."""
        return stored_shape(name, self.scheme, self.model.graph.dims)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor as an artifact stores it."""
        if name in self.model.cached:
            return read_scale(*self.model.cached[name]).reshape(self.cached_shape(name))
        if name in self.cached_zeros and self.scheme.keys is not None:
            bits = self.plugins.format(self.scheme.keys.format).bits
            return unsigned_zero_point(read_place(self.cached_zeros[name][1]), bits).reshape(self.cached_shape(name))
        for leaf in (INPUT_GLOBAL_SCALE, INPUT_ZERO_POINT):
            if name.endswith(leaf):
                return self._calibrated(name.removesuffix(leaf), zero_point=leaf == INPUT_ZERO_POINT)
        linear, _, leaf = name.rpartition(".")
        return self.tensors(f"{linear}.")[leaf]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors of a linear as an artifact stores them, keyed by the last parts of their names."""
        name = prefix.removesuffix(".")
        if name not in {linear.name for linear in self.model.coded}:
            return {}
        stored = packed_tensors(name, self.read(name), self._grid(name))
        return {full.removeprefix(prefix): tensor for full, tensor in stored.items()}

    def read(self, name: str) -> PackedLinear:
        """Return a linear's codes and scales.

        Raises:
            ArtifactError: They do not fit the config.
        """
        linear, weights = self.model.graph.linear(name), _weights_of(self.scheme, name)
        try:
            return read_packed(
                self.method, self.stored_of(name), self.model.graph.width(linear.spec.reads), weights, self._grid(name)
            )
        except (*_UNREADABLE, ArtifactError) as error:
            reason = str(error).split("\n")[0]
            raise ArtifactError(
                f"cannot read the codes of `{name}`", facts=(("checkpoint", self.path), ("reason", reason))
            ) from error

    def stored_of(self, name: str) -> dict[str, Tensor]:
        """Read the tensors of a linear as the checkpoint has them, keyed by the last parts of their names."""
        places = self.model.packed
        leaves = (leaf for leaf in (*LEAVES, *INPUT_LEAVES, "weight") if f"{name}.{leaf}" in places)
        return {leaf: read_place(places[f"{name}.{leaf}"]) for leaf in leaves}

    def _global_leaf(self, name: str) -> bool:
        return any(f"{name}.{leaf}" in self.model.packed for leaf in ("weight_scale_2", "weight_global_scale"))

    def _grid(self, name: str) -> Grid:
        weights = _weights_of(self.scheme, name)
        return Grid.of(weights, self.plugins.format(weights.format))

    def _calibrated(self, site: str, *, zero_point: bool) -> Tensor:
        """Return the multiplier or zero point of a site's activations, on which the linears that read it must agree."""
        stored = {linear.name: self.stored_of(linear.name) for linear in self.model.coded if linear.reads == site}
        found = {
            name: read_input_zero_point(own) if zero_point else read_multiplier(self.method, own)
            for name, own in stored.items()
        }
        first, *others = found.values()
        if first is None or any(other is None or not torch.equal(first, other) for other in others):
            raise UsageError(
                f"linears that read one input have different input {'zero points' if zero_point else 'scales'}",
                facts=(("input", site), ("linears", ", ".join(found))),
                hint="pack it from the artifact that it came from",
            )
        return first


class PackedSource:
    """What ``PackedReader`` asks of the exporters whose layouts are read."""

    def open(self, directory: Path, plugins: Plugins, *, cache: Path, identity: str = "") -> Subject:
        """Open a packed checkpoint as what is to be packed."""
        return open_packed(directory, plugins, cache=cache, identity=identity)

    def check_scales(self, subject: Subject, to: str) -> int:
        """Refuse global scales that another exporter would turn into other weights."""
        return check_global_scales_of(subject, to)


def open_packed(directory: Path, plugins: Plugins, *, cache: Path, identity: str = "") -> Subject:
    """Open a packed checkpoint as what is to be packed.

    Args:
        directory: A checkpoint of one of ``METHODS``.
        plugins: Where families and formats are found.
        cache: Where digests of large files are remembered.
        identity: What the original model is called; the checkpoint's own digest if empty.

    Raises:
        SchemeError: It has more than codes and scales, or a scheme that is not read back.
        ArtifactError: Something is quantized that qtool does not quantize, or a linear has more than codes and scales.
    """
    method = packed_method(directory)
    if method is None:
        raise LookupError(directory)
    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    families: dict[str, Family] = {name: plugins.load("families", name) for name in plugins.offers["families"]}
    model = PackedModel(directory, config, family_of(config, families), identity or folder_digest(directory, cache))
    seen = {linear.name: _seen(model, linear.name) for linear in model.coded}
    if not seen:
        raise ArtifactError(f"`{directory}` has no scales of weights", hint="check that the download is complete")
    _refuse_other_codes(model)
    _refuse_shared_codes(model)
    plain = [linear.name for linear in model.graph.linears if linear.name not in seen]
    of_places = Counter(map(place_of, model.cached))
    cached = [place for place, count in of_places.items() if count == model.graph.dims.num_layers]
    scheme = read_scheme(directory, seen, plain, plugins.format, cached=cached)
    check_stored_cache(scheme, model.graph.dims, model.cached, model.cached_zeros)
    _refuse_zero_points(model, scheme)
    _refuse_other_tensors(model)
    step = Step("pack", method, 1, "checkpoint")
    manifest = Manifest("quantized", step, {}, model.id, model.family.name, scheme.to_json())
    artifact = PackedArtifact(directory, manifest, model, scheme, plugins, method)
    return Subject(model, plugins, scheme=scheme, quantized=artifact)


def check_global_scales_of(subject: Subject, to: str) -> int:
    """Refuse global scales that an exporter would turn into other weights.

    Args:
        subject: What ``open_packed`` returned.
        to: Name of the exporter.

    Returns:
        How many multipliers or divisors of weights and inputs have no exact reciprocal in float32, where it is taken.

    Raises:
        NumericalError: A weight would differ in bfloat16; names the linear.
    """
    artifact, inexact = subject.quantized, set[float]()
    if not isinstance(artifact, PackedArtifact):
        return 0
    for linear in artifact.model.coded:
        if f"{linear.name}.global_scale" not in artifact.header.slots:
            continue
        parameters = artifact.read(linear.name).parameters
        stored = artifact.stored_of(linear.name)
        if artifact.method == "compressed-tensors":
            check_reciprocal(linear.name, parameters, stored["weight_global_scale"])
            turned = (stored["weight_global_scale"], stored.get("input_global_scale"))
        elif to == "compressed-tensors":
            check_reciprocal(linear.name, parameters)
            turned = (parameters.global_scale, read_multiplier(artifact.method, stored))
        else:
            continue
        inexact |= {float(one) for one in turned if one is not None and not is_reciprocal(one.float().reshape(()))}
    return len(inexact)


def _seen(model: PackedModel, name: str) -> Seen:
    """Return what the files say of a linear that has scales.

    Raises:
        ArtifactError: They are of a type that no layout has.
    """
    place = model.packed[f"{name}{_SCALE}"]
    dtype = _DTYPES.get(place.stored.slot.dtype)
    if dtype is None:
        raise ArtifactError(
            f"the scales of `{name}` are of a type that is not read",
            facts=(("expected", ", ".join(_DTYPES)), ("received", place.stored.slot.dtype)),
            hint="quantize the original model: qtool mitigate MODEL",
        )
    return Seen(
        place.name.removesuffix(_SCALE), dtype, f"{name}.input_scale" in model.packed, name == model.family.embedding
    )


def _refuse_other_codes(model: PackedModel) -> None:
    """Refuse a checkpoint with codes outside of the linears that are transcoded, such as a vision tower."""
    coded = {linear.name for linear in model.coded}
    leaves = {*LEAVES, *INPUT_LEAVES}
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


def _refuse_zero_points(model: PackedModel, scheme: ModelScheme) -> None:
    """Refuse a cache or inputs whose zero points are others than those of symmetric ones, and inputs that lack one."""
    zeros = {name: place for name, place in model.packed.items() if _leaf(name) in (*CACHE_ZEROS, _INPUT_ZERO)}
    if has_zero_points(scheme):
        zeros = {name: place for name, place in zeros.items() if _leaf(name) not in CACHE_ZEROS}
    for linear in model.coded:
        inputs, name = scheme.of(linear.name).activations, f"{linear.name}.{_INPUT_ZERO}"
        if inputs is not None and inputs.static and not inputs.symmetric and zeros.pop(name, None) is None:
            raise ArtifactError(
                "the config says that inputs have calibrated zero points, and the checkpoint lacks one",
                facts=(("first", name),),
                hint="check that the download is complete",
            )
    odd = next((name for name, place in zeros.items() if read_place(place).float().any()), None)
    if odd is not None:
        what, option = ("inputs", "--activations") if _leaf(odd) == _INPUT_ZERO else ("a KV cache", "--kv")
        raise ArtifactError(
            f"the checkpoint has {what} with zero points, and its config says that there are none",
            facts=(("first", odd),),
            hint=f"quantize the original model again: qtool mitigate MODEL {option} fp8-tensor-static",
        )


def _refuse_other_tensors(model: PackedModel) -> None:
    """Refuse what a linear has beside codes, scales and a bias, such as the order of its columns."""
    coded = {linear.name for linear in model.coded}
    named = (name.rpartition(".") for name in model.packed)
    odd = next((f"{owner}.{leaf}" for owner, _, leaf in named if owner in coded and leaf not in _OWN), None)
    if odd is not None:
        raise ArtifactError(
            "a linear of the checkpoint has more than codes and scales",
            facts=(("first", odd),),
            hint="quantize the original model again, without it: qtool mitigate MODEL",
        )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _weights_of(scheme: ModelScheme, name: str) -> TensorScheme:
    weights = scheme.of(name).weights
    if weights is None:
        raise LookupError(name)
    return weights
