"""Static scales of a KV cache in checkpoints, in float32: one for keys and one for values, of each block or head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qtool.builtin.exporters.read_back import CheckpointReader, weight_difference
from qtool.engine.cache import KEYS, VALUES
from qtool.engine.stored import INPUT_GLOBAL_SCALE
from qtool.engine.subject import Subject
from qtool.errors import SchemeError
from qtool.model.graph import ModelGraph
from qtool.model.naming import Place

_LATENT = "kv_b_in"
"""The site where families have a latent that keys and values are made of."""
IN_ATTENTION = {KEYS: "k_scale", VALUES: "v_scale"}
"""What they are called inside an attention; other layouts have them inside the projections."""
CACHE_ZEROS = ("k_zero_point", "v_zero_point")
"""What others write beside the scales of a symmetric cache too: nothing but 0."""
QUERIES = ("q_scale", "q_zero_point", "q_global_scale", "k_global_scale", "v_global_scale")
"""What others write where queries are quantized, or a cache in FP4: nothing that is read."""


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


def cache_places(graph: ModelGraph, places: Mapping[str, Place]) -> dict[str, tuple[str, Place]]:
    """Return the names and places of stored scales, in the attention or its projections, by their names in artifacts.

    Args:
        graph: The model.
        places: Of all tensors of a checkpoint, by the names that the graph knows.
    """
    found: dict[str, tuple[str, Place]] = {}
    for layer in range(graph.dims.num_layers):
        attention = f"{graph.block_name(layer)}.{graph.family.attention}"
        for part, leaf in IN_ATTENTION.items():
            for name in (f"{attention}.{leaf}", f"{attention}.{leaf[0]}_proj.{leaf}"):
                if name in places:
                    found[f"layers.{layer}.{part}{INPUT_GLOBAL_SCALE}"] = (name, places[name])
    return found


def cache_scales(subject: Subject, names: Mapping[str, str], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the static scales of a cache by their full names; none where it has none.

    Args:
        subject: A quantized subject.
        names: What those of keys and of values are called inside an attention.
        shape: Of each scale that has one value; those of heads stay as they are.
    """
    found: dict[str, Tensor] = {}
    graph, cache, quantized = subject.model.graph, subject.cache, subject.quantized
    if cache is None or quantized is None:
        return found
    for layer in range(graph.dims.num_layers):
        attention = f"{graph.block_name(layer)}.{graph.family.attention}"
        for place in cache.static:
            scale = quantized.tensor(f"layers.{layer}.{place}{INPUT_GLOBAL_SCALE}")
            found[f"{attention}.{names[place]}"] = scale.float() if scale.ndim else scale.float().reshape(shape)
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
