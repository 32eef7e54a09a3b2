"""Whether the files of a model hold what its config promises; only headers are looked at."""

from __future__ import annotations

from collections.abc import Iterator

from qtool.errors import ModelError
from qtool.model.family import Linear
from qtool.model.graph import RESIDUAL, ModelGraph
from qtool.model.prequantized import require_plain_names
from qtool.model.reading import require_readable
from qtool.model.source import Model

Shape = tuple[int | None, ...]
"""A shape whose unknown lengths are None."""


def require_complete(model: Model) -> None:
    """Refuse a model that lacks tensors, or whose tensors have other shapes than its config promises.

    Raises:
        ModelError: Names the first such tensor.
    """
    promised = dict(promised_tensors(model))
    missing = [name for name in promised if name not in model.places]
    if missing:
        require_plain_names(model.path, model.stored)
        raise ModelError(
            f"the config of `{model.path}` promises {len(missing)} tensors that the files lack",
            facts=(("first", missing[0]), ("promised", len(promised)), ("family", model.family.name)),
            hint="check that the download is complete, and that config.json belongs to these weights",
        )
    for name, shape in promised.items():
        _check_shape(name, shape, model)
        require_readable(name, model.places[name], model.float8)


def promised_tensors(model: Model) -> Iterator[tuple[str, Shape]]:
    """Yield the name and shape of every tensor that the family needs of a model with this config."""
    graph, family = model.graph, model.family
    dims = graph.dims
    yield f"{family.embedding}.weight", (dims.vocab, dims.hidden)
    if not dims.tied:
        yield f"{family.head}.weight", (dims.vocab, dims.hidden)
    yield f"{family.final_norm.module}.weight", (dims.hidden,)
    for layer in range(dims.num_layers):
        block = graph.block_name(layer)
        for site in graph.input_sites_of(layer):
            norm = graph.norm_of(site)
            if norm is not None:
                yield f"{block}.{norm.module}.weight", (graph.width(site),)
        for linear in graph.readers_of(layer):
            yield f"{linear.name}.weight", (rows_of(graph, linear.spec), graph.width(linear.spec.reads))
            if linear.spec.writes_through:
                yield f"{block}.{linear.spec.writes_through}.weight", (dims.hidden,)


def rows_of(graph: ModelGraph, linear: Linear) -> int | None:
    """Return the number of outputs of a linear, None where the family does not say."""
    if linear.parts:
        repeats = graph.dims.num_kv_heads if linear.per_head else 1
        return repeats * sum(graph.dims.sizes[part.size] for part in linear.parts)
    if linear.writes == RESIDUAL:
        return graph.dims.hidden
    if linear.writes == "vo":
        return graph.dims.sizes["values"]
    return graph.width(linear.writes) if linear.writes else None


def _check_shape(name: str, promised: Shape, model: Model) -> None:
    place = model.places[name]
    found, stored = place.shape, place.stored.slot.shape
    fits = len(found) == len(promised) and all(p in (None, f) for p, f in zip(promised, found, strict=True))
    if place.expert is not None and stored[0] != model.graph.dims.experts:
        fits, promised, found = False, (model.graph.dims.experts, *promised[::-1]), stored
    if not fits:
        raise _misshapen(place.name, promised, found)
    bias = model.places.get(f"{name.removesuffix('weight')}bias")
    if len(promised) > 1 and bias is not None and bias.shape != found[:1]:
        raise _misshapen(bias.name, found[:1], bias.shape)


def _misshapen(name: str, promised: Shape, found: tuple[int, ...]) -> ModelError:
    expected, received = (
        " x ".join("?" if length is None else str(length) for length in shape) for shape in (promised, found)
    )
    return ModelError(
        f"the tensor `{name}` has another shape than the config promises",
        facts=(("expected", expected), ("received", received)),
        hint="check that config.json belongs to these weights",
    )
