"""A packed checkpoint as a subject: its codes and scales stand for an artifact, its other tensors for the model.

Nothing is decoded on the way and nothing is written: tensors are read when an exporter asks for them. Of the weight of
a quantized linear the model has the name and the shape, and no values, which no exporter looks at. Linears without
scales are as they are stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    check_stored_cache,
    has_zero_points,
    place_of,
    read_scale,
    stored_shape,
    unsigned_zero_point,
)
from qtool.builtin.exporters.ct_rotations import matrix_modules, read_rotations
from qtool.builtin.exporters.packed_codes import require_finite, require_numbers, unreadable, weights_of
from qtool.builtin.exporters.packed_layouts import (
    INPUT_LEAVES,
    LEAVES,
    OUTPUT_LEAVES,
    check_reciprocal,
    is_reciprocal,
    read_multiplier,
    read_packed,
    read_zero_point,
)
from qtool.builtin.exporters.packed_model import PackedModel, refuse_codes, refuse_tensors
from qtool.builtin.exporters.packed_schemes import Seen, packed_method, read_scheme, unread
from qtool.consumers.checkpoint import ADAPTER
from qtool.engine.grid import Grid
from qtool.engine.packed import PackedLinear
from qtool.engine.stored import INPUT_GLOBAL_SCALE, INPUT_ZERO_POINT, packed_tensors
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, UsageError
from qtool.model.files import folder_digest
from qtool.model.naming import Place, stored_name
from qtool.model.reading import read_place
from qtool.model.source import family_of
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
_UNREADABLE = (KeyError, ValueError, RuntimeError, IndexError)


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
            symmetric = weights_of(self.scheme, linear.name).symmetric
            leaves = ["codes", "scale", *([] if symmetric else ["zero_point"])]
            leaves += ["global_scale"] if self._global_leaf(linear.name) else []
            slots |= dict.fromkeys((f"{linear.name}.{leaf}" for leaf in leaves), TensorSlot("U8", (), 0, 0))
            if any(f"{linear.name}.{leaf}" in self.model.packed for leaf in INPUT_LEAVES):
                slots[f"{linear.reads}{INPUT_GLOBAL_SCALE}"] = TensorSlot("F32", (), 0, 4)
            inputs = self.scheme.of(linear.name).activations
            if inputs is not None and inputs.static and not inputs.symmetric:
                slots[f"{linear.reads}{INPUT_ZERO_POINT}"] = TensorSlot("U8", (), 0, 1)
            outputs, place = self.scheme.of(linear.name).outputs, f"layers.{linear.layer}.{linear.puts_out}"
            if any(f"{linear.name}.{leaf}" in self.model.packed for leaf in OUTPUT_LEAVES[:2]):
                slots[f"{place}{INPUT_GLOBAL_SCALE}"] = TensorSlot("F32", (), 0, 4)
            if outputs is not None and outputs.static and not outputs.symmetric:
                slots[f"{place}{INPUT_ZERO_POINT}"] = TensorSlot("U8", (), 0, 1)
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
            scale = read_scale(*self.model.cached[name]).reshape(self.cached_shape(name))
            require_finite(self, self.model.cached[name][0], {"scale": scale})
            return scale
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
            NumericalError: They hold NaN or Inf.
        """
        linear, weights = self.model.graph.linear(name), weights_of(self.scheme, name)
        stored, n_in, grid = self.stored_of(name), self.model.graph.width(linear.spec.reads), self._grid(name)
        try:
            found = read_packed(self.method, stored, n_in, weights, grid)
        except (*_UNREADABLE, ArtifactError) as error:
            raise unreadable(self, name, error) from error
        require_finite(self, name, {"weight_global_scale": stored.get("weight_global_scale")})  # 0 stands for Inf
        require_numbers(self, name, found, grid)
        return found

    def stored_of(self, name: str) -> dict[str, Tensor]:
        """Read the tensors of a linear as the checkpoint has them, keyed by the last parts of their names."""
        places = self.model.packed
        leaves = (leaf for leaf in (*LEAVES, *INPUT_LEAVES, *OUTPUT_LEAVES, "weight") if f"{name}.{leaf}" in places)
        return {leaf: read_place(places[f"{name}.{leaf}"]) for leaf in leaves}

    def _bits_of(self, name: str, end: str) -> int:
        """Return the bits of what a linear reads or puts out, 16 where that is not quantized."""
        own = self.scheme.of(name)
        scheme = own.activations if end == "input" else own.outputs
        return 16 if scheme is None else self.plugins.format(scheme.format).bits

    def _global_leaf(self, name: str) -> bool:
        return any(f"{name}.{leaf}" in self.model.packed for leaf in ("weight_scale_2", "weight_global_scale"))

    def _grid(self, name: str) -> Grid:
        weights = weights_of(self.scheme, name)
        return Grid.of(weights, self.plugins.format(weights.format))

    def _calibrated(self, site: str, *, zero_point: bool) -> Tensor:
        """Return the multiplier or zero point of a site's activations, on which the linears that read it must agree."""
        end, at_site = "input", [linear for linear in self.model.coded if linear.reads == site]
        if not at_site:
            outputs = (one for one in self.model.coded if f"layers.{one.layer}.{one.puts_out}" == site)
            end, at_site = "output", list(outputs)
        stored = {linear.name: self.stored_of(linear.name) for linear in at_site}
        for name, own in stored.items():
            require_finite(self, name, {leaf: own.get(leaf) for leaf in (*INPUT_LEAVES, *OUTPUT_LEAVES)})
        bits = {linear.name: self._bits_of(linear.name, end) for linear in at_site}
        found = {
            name: read_zero_point(own, bits[name], end) if zero_point else read_multiplier(own, end)
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
    if (directory / ADAPTER).is_file():
        raise unread("a LoRA adapter beside its codes", ADAPTER, "adapter")
    config = AutoConfig.from_pretrained(directory)
    rotations = (getattr(config, "quantization_config", None) or {}).get("transform_config")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    family = family_of(config, plugins.every("families"))
    model = PackedModel(directory, config, family, identity, apart=matrix_modules(rotations))
    seen = {linear.name: _seen(model, linear.name) for linear in model.coded}
    if not seen:
        raise ArtifactError(f"`{directory}` has no scales of weights", hint="check that the download is complete")
    refuse_codes(model)
    model = replace(model, id=identity or folder_digest(directory, cache))
    plain = [linear.name for linear in model.graph.linears if linear.name not in seen]
    of_places = Counter(map(place_of, model.cached))
    cached = [place for place, count in of_places.items() if count == model.graph.dims.num_layers]
    scheme = read_scheme(directory, seen, plain, plugins.format, cached=cached)
    check_stored_cache(scheme, model.graph.dims, model.cached, model.cached_zeros)
    refuse_tensors(model, scheme)
    step = Step("pack", method, 1, "checkpoint")
    manifest = Manifest("quantized", step, {}, model.id, model.family.name, scheme.to_json())
    artifact = PackedArtifact(directory, manifest, model, scheme, plugins, method)
    return Subject(model, plugins, read_rotations(model, rotations), scheme, artifact)


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
            turned = [stored.get(f"{part}_global_scale") for part in ("weight", "input", "output")]
        elif to == "compressed-tensors":
            check_reciprocal(linear.name, parameters)
            turned = [parameters.global_scale, read_multiplier(stored)]
        else:
            continue
        inexact |= {float(one) for one in turned if one is not None and not is_reciprocal(one.float().reshape(()))}
    return len(inexact)


def _seen(model: PackedModel, name: str) -> Seen:
    """Return what the files say of a linear that has scales.

    Raises:
        ArtifactError: They are of a type that no layout has.
    """
    place = model.packed[f"{name}.{model.scale}"]
    dtype = _DTYPES.get(place.stored.slot.dtype)
    if dtype is None:
        raise ArtifactError(
            f"the scales of `{name}` are of a type that is not read",
            facts=(("expected", ", ".join(_DTYPES)), ("received", place.stored.slot.dtype)),
            hint="quantize the original model: qtool mitigate MODEL",
        )
    own = place.name.removesuffix(f".{model.scale}")
    names = (own, stored_name(f"{name}.weight", model.family).removesuffix(".weight"))
    return Seen(names, dtype, f"{name}.input_scale" in model.packed, name == model.family.embedding)
