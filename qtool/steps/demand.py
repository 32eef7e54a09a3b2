"""What a step is going to take, from what it was asked: the memory of statistics, and bytes on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qtool.artifacts.manifest import Manifest
from qtool.engine.gather import Gathering, SizedStatistic, sites_to_observe
from qtool.engine.solve import Method
from qtool.model.graph import EXPERTS, LinearSite, ModelGraph
from qtool.model.source import Model
from qtool.numerics.packing import packed_size
from qtool.numerics.scales import encode_scale
from qtool.numerics.token_weights import TokenWeight
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme

_COUNT = 8
_TOKEN = 4


@dataclass(frozen=True)
class Demand:
    """What a step takes beside the weights of a block and the activations between blocks.

    Attributes:
        statistics: Largest number of bytes of statistics that are held at once: one layer's.
        layer: That layer.
        disk: Bytes that its artifact takes at least: low-rank corrections, what wider codes a plan sets channels apart
            for, and statistics that cannot tell how large they get, are not in it.
    """

    statistics: int
    layer: int
    disk: int


def demand_of(manifest: Manifest, model: Model, plugins: Plugins, gathered: Manifest | None = None) -> Demand | None:
    """Return what the step of a manifest is going to take; None for other steps than calibrate and mitigate.

    Args:
        manifest: The manifest without tensors.
        model: The model that it speaks of.
        plugins: Where statistics, methods and formats are found.
        gathered: For mitigate, the manifest of the statistics.
    """
    config = manifest.step.config
    if manifest.kind == "statistics":
        windows, tokens = config["shape"]
        layers = _layers(model.graph, config, config["gather"], windows * tokens, plugins)
        counts = _COUNT * model.graph.dims.experts * sum(model.graph.dims.sparse) if layers else 0
        return _largest(layers, disk=sum(layers) + counts + _TOKEN * windows * tokens)
    if manifest.kind != "quantized":
        return None
    loaded = [(plugins.load("mitigators", one["name"]), one["config"]) for one in config["methods"]]
    methods = [Method(mitigator, mitigator.Config(**options)) for mitigator, options in loaded]
    needs = tuple(dict.fromkeys(need for method in methods for need in method.needs))
    layers = []
    if needs and gathered is not None:
        told = {**gathered.step.config, **config}
        layers = _layers(model.graph, told, needs, gathered.details["tokens"], plugins)
    scheme = ModelScheme.from_json(manifest.schemes)
    return _largest(layers, disk=_code_bytes(model, scheme, plugins))


def _largest(layers: Sequence[int], *, disk: int) -> Demand:
    layer = max(range(len(layers)), key=layers.__getitem__, default=0)
    return Demand(layers[layer] if layers else 0, layer, disk)


def _layers(
    graph: ModelGraph, config: Mapping[str, Any], names: Iterable[str], tokens: int, plugins: Plugins
) -> list[int]:
    """Return the bytes of the statistics of each layer."""
    loaded = [plugins.load("statistics", name) for name in names]
    sized = [one for one in loaded if isinstance(one, SizedStatistic)]
    whole = Gathering(tokens, TokenWeight(), sample_size=config["sample_size"])
    routed = config.get("experts") == "routed"

    def layer_bytes(linears: Sequence[LinearSite]) -> int:
        total = 0
        for site in sites_to_observe(linears, "routed" if routed else "all"):
            gathering, n = whole, graph.width(site)
            if routed and site.startswith(EXPERTS):  # an expert's share of the sampled tokens
                share = graph.dims.chosen / graph.dims.experts
                gathering = replace(whole, sample_size=round(whole.sample_size * share))
            total += sum(one.nbytes(n, gathering) for one in sized)
        return total

    return [layer_bytes(graph.readers_of(layer)) for layer in range(graph.dims.num_layers)] if loaded else []


def _code_bytes(model: Model, scheme: ModelScheme, plugins: Plugins) -> int:
    """Return the bytes of codes, scales and zero points of all linears."""
    weights = scheme.weights
    if weights is None:
        return 0
    fmt = plugins.format(weights.format)
    scale_bytes = encode_scale(torch.ones(1), weights.scale).element_size()
    total = 0
    for linear in model.graph.linears:
        rows, n = model.places[f"{linear.name}.weight"].shape
        scales, across = (1, 1) if weights.strategy == "tensor" else (rows, weights.groups_of(n, layer=linear.name))
        total += rows * packed_size(n, fmt.bits) + scales * across * scale_bytes
        total += 0 if weights.symmetric else scales * packed_size(across, fmt.bits)
    return total
