"""Static scales and zero points of a KV cache in checkpoints, of each block or head: of keys, of values, of queries.

Scales are in float32. Zero points are signed, as codes are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from math import prod

import torch
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from jaxtyping import Int8, UInt8
from torch import Tensor, nn

from qtool.builtin.exporters.ct_tensors import global_divisor
from qtool.builtin.exporters.packed_layouts import reciprocal
from qtool.builtin.exporters.read_back import CheckpointReader, empty_model, weight_difference
from qtool.engine.cache import KEYS, QUERIES, VALUES, heads_at, scale_shape
from qtool.engine.stored import INPUT_GLOBAL_SCALE, INPUT_ZERO_POINT
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, SchemeError
from qtool.model.graph import Dimensions, ModelGraph
from qtool.model.naming import Place
from qtool.model.reading import read_place
from qtool.model.source import Model
from qtool.scheme import ModelScheme

_LATENT = "kv_b_in"
"""The site where families have a latent that keys and values are made of."""
IN_ATTENTION = {KEYS: "k_scale", VALUES: "v_scale", QUERIES: "q_scale"}
"""What they are called inside an attention; other layouts have them inside the projections."""
_SCALE, _ZERO, _DIVISOR = "_scale", "_zero_point", "_global_scale"
CACHE_ZEROS = tuple(leaf.replace(_SCALE, _ZERO) for leaf in IN_ATTENTION.values())
"""Their zero points. Others write them beside the scales of a symmetric cache too: nothing but 0."""


def check_cache_scales(subject: Subject) -> None:
    """Refuse a static cache of models whose engines cache something else than keys and values.

    Raises:
        SchemeError: Keys and values are made of one latent, which engines cache.
    """
    cache = subject.cache
    if cache is not None and cache.static and _LATENT in subject.model.graph.input_sites_of(0):
        raise SchemeError(
            "engines cache the latent that these keys and values are made of, and the scales are of those",
            facts=(("kv", subject.scheme.kv), ("family", subject.model.family.name)),
            hint="qtool mitigate without --kv",
        )


def attention_classes(model: Model) -> dict[str, bool]:
    """Return what the attentions of a model are called in transformers, and whether compressed-tensors has hooks there.

    It looks for ``k_proj`` or ``qkv_proj`` and the like, and for a cache among the arguments.
    """
    module, graph = empty_model(deepcopy(model.config), model), model.graph
    names = (f"{graph.block_name(layer)}.{graph.family.attention}" for layer in range(graph.dims.num_layers))
    found = (module.get_submodule(name) for name in names)
    return {type(one).__name__: is_cached_attention_module(one) for one in found}


def check_hooked_attentions(subject: Subject) -> None:
    """Refuse attentions whose cache and queries the library leaves as they are.

    Raises:
        SchemeError: Names the attention.
    """
    bare = next((name for name, hooked in attention_classes(subject.model).items() if not hooked), None)
    if bare is not None:
        raise SchemeError(
            "compressed-tensors quantizes no cache of an attention without `k_proj` or `qkv_proj`, and rotates no keys",
            facts=(("attention", bare), ("kv", subject.scheme.kv or "16 bits")),
            hint="qtool mitigate without --kv, and qtool transform with --method quarot --set r3=off",
        )


def cache_places(graph: ModelGraph, places: Mapping[str, Place]) -> dict[str, tuple[str, Place]]:
    """Return the names and places of stored scales, in the attention or its projections, by their names in artifacts.

    What the library divides scales by stands there in place of them (``read_scale``).

    Args:
        graph: The model.
        places: Of all tensors of a checkpoint, by the names that the graph knows.
    """
    endings = (_SCALE, _DIVISOR)
    return {name: place for one in endings for name, place in _places(graph, places, one, INPUT_GLOBAL_SCALE)}


def zero_places(graph: ModelGraph, places: Mapping[str, Place]) -> dict[str, tuple[str, Place]]:
    """Return those of stored zero points, as ``cache_places`` does."""
    return dict(_places(graph, places, _ZERO, INPUT_ZERO_POINT))


def _places(
    graph: ModelGraph, places: Mapping[str, Place], ending: str, ours: str
) -> Iterator[tuple[str, tuple[str, Place]]]:
    for layer in range(graph.dims.num_layers):
        attention = f"{graph.block_name(layer)}.{graph.family.attention}"
        for part, leaf in ((part, scale.replace(_SCALE, ending)) for part, scale in IN_ATTENTION.items()):
            for name in (f"{attention}.{leaf}", f"{attention}.{leaf[0]}_proj.{leaf}"):
                if name in places:
                    yield f"layers.{layer}.{part}{ours}", (name, places[name])


def read_scale(name: str, place: Place) -> Tensor:
    """Return a stored scale, or the multiplier of scales for what is stored to divide them by, in float32."""
    stored = read_place(place)
    return reciprocal(stored) if name.endswith(_DIVISOR) else stored.float()


def signed_zero_point(zero_point: Tensor, bits: int) -> Int8[Tensor, ...]:
    """Return zero points as checkpoints have them."""
    return (zero_point.short() - (1 << bits - 1)).to(torch.int8)


def unsigned_zero_point(stored: Tensor, bits: int) -> UInt8[Tensor, ...]:
    """Undo ``signed_zero_point``."""
    return (stored.short() + (1 << bits - 1)).to(torch.uint8)


def place_of(name: str) -> str:
    """Return the place that a scale or zero point is of, by its name in artifacts."""
    return name.split(".")[-2]


def stored_shape(name: str, scheme: ModelScheme, dims: Dimensions) -> tuple[int, ...]:
    """Return the shape that a static scale of a cache, or its zero point, has in artifacts, by its name there."""
    return () if scheme.keys is None else scale_shape(scheme.keys, heads_at(place_of(name), dims))


def has_zero_points(scheme: ModelScheme) -> bool:
    """Say whether a cache has static zero points."""
    return scheme.keys is not None and scheme.keys.static and not scheme.keys.symmetric


def check_stored_cache(
    scheme: ModelScheme,
    dims: Dimensions,
    scales: Mapping[str, tuple[str, Place]],
    zeros: Mapping[str, tuple[str, Place]],
) -> None:
    """Refuse stored scales of a cache that the config does not speak of, and zero points that lack.

    Args:
        scheme: What the config says.
        dims: Sizes of the model.
        scales: What ``cache_places`` returned.
        zeros: What ``zero_places`` returned.

    Raises:
        ArtifactError: Names the first.
    """
    static, divides = (False, False) if scheme.keys is None else (scheme.keys.static, scheme.keys.scale == "e4m3")
    unsaid = [
        ours
        for ours, (name, _) in scales.items()
        if not (divides if name.endswith(_DIVISOR) else static)
        or (scheme.queries is None and place_of(ours) == QUERIES)
    ]
    if unsaid:
        raise ArtifactError(
            "the checkpoint has scales of a KV cache and does not say that it is quantized with those",
            facts=(("first", scales[unsaid[0]][0]),),
            hint="quantize the original model again: qtool mitigate MODEL --kv fp8-tensor-static",
        )
    of_zeros = zeros if has_zero_points(scheme) else {}
    for ours, (name, place) in {**scales, **of_zeros}.items():
        expected = prod(stored_shape(ours, scheme, dims))
        if prod(place.shape) != expected:
            raise ArtifactError(
                f"`{name}` has another number of scales than the config says",
                facts=(("kv", scheme.kv), ("expected", expected), ("received", prod(place.shape))),
                hint="quantize the original model again: qtool mitigate MODEL --kv fp8-head-static",
            )
        if has_zero_points(scheme) and ours.replace(INPUT_GLOBAL_SCALE, INPUT_ZERO_POINT) not in zeros:
            raise ArtifactError(
                "the config says that a KV cache has calibrated zero points, and the checkpoint lacks one",
                facts=(("first", name.replace(_SCALE, _ZERO)),),
                hint="check that the download is complete",
            )


def cache_scales(subject: Subject, names: Mapping[str, str], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the static scales of a cache, and their zero points, by their full names; none where it has none.

    Args:
        subject: A quantized subject.
        names: What the scales of keys, of values and of queries are called inside an attention.
        shape: Of each scale that has one value; those of heads stay as they are.
    """
    found: dict[str, Tensor] = {}
    graph, cache, quantized = subject.model.graph, subject.cache, subject.quantized
    if cache is None or quantized is None:
        return found
    for layer in range(graph.dims.num_layers):
        attention = f"{graph.block_name(layer)}.{graph.family.attention}"
        for place, rounding in cache.static.items():
            site, name = f"layers.{layer}.{place}", f"{attention}.{names[place]}"
            own = {name: quantized.tensor(f"{site}{INPUT_GLOBAL_SCALE}").float()}
            if not rounding.grid.parts[0].scheme.static:
                own = {name.replace(_SCALE, _DIVISOR): global_divisor(own[name])}
            elif not rounding.grid.parts[0].scheme.symmetric:
                bits, zero = rounding.grid.parts[0].format.bits, quantized.tensor(f"{site}{INPUT_ZERO_POINT}")
                own[name.replace(_SCALE, _ZERO)] = signed_zero_point(zero, bits)
            found |= {key: one if one.ndim else one.reshape(shape) for key, one in own.items()}
    return found


def with_cache_scales(module: nn.Module, scales: Mapping[str, Tensor]) -> nn.Module:
    """Make room for scales in a model without weights, which is modified, and return it."""
    for name, scale in scales.items():
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner).register_buffer(leaf, torch.empty_like(scale, device="meta"))
    return module


def compare_cache_scales(scales: Mapping[str, Tensor], reader: CheckpointReader) -> None:
    """Compare the scales of a checkpoint with ours.

    Raises:
        ArtifactError: One differs; names it.
    """
    for name, scale in scales.items():
        owner, _, leaf = name.rpartition(".")
        stored = reader.module(owner)[leaf]
        if stored.dtype != scale.dtype or not torch.equal(stored, scale):
            raise weight_difference(name, stored, scale)
