"""What a step is going to take, from what it was asked: the memory of statistics, and bytes on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Any

import torch

from qtool.artifacts.manifest import Manifest
from qtool.engine.block import needs_of, static_inputs
from qtool.engine.carry import can_carry_hessians
from qtool.engine.embedding import round_nearest
from qtool.engine.experts import Mode
from qtool.engine.gather import Gathering, GuidedStatistic, SizedStatistic, sites_to_observe
from qtool.engine.grid import Grid
from qtool.engine.outputs import calibrated_outputs
from qtool.engine.solve import Method
from qtool.engine.stored import linear_tensors
from qtool.engine.subject import Subject
from qtool.model.graph import EXPERTS, TOKENS, LinearSite, ModelGraph
from qtool.model.plan import Plan
from qtool.model.source import Model
from qtool.model.statistics import BLOCKS, HESSIAN
from qtool.numerics.token_weights import TokenWeight
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme
from qtool.steps.transform import gathered_behind

_COUNT = 8
_TOKEN = 4
_SCALE = 4
_ZERO_POINT = 1


@dataclass(frozen=True)
class Demand:
    """What a step takes beside the weights of a block and the activations between blocks.

    Attributes:
        statistics: Largest number of bytes of statistics that are held at once: one layer's.
        layer: That layer.
        disk: Bytes that the tensors of its artifact take: exactly, but weights that turn out to be outliers, what is
            added to blocks, and statistics that cannot tell how large they get, are not in it.
    """

    statistics: int
    layer: int
    disk: int


@dataclass(frozen=True)
class StatisticSizes:
    """How large the statistics of a site get.

    Attributes:
        graph: Knows the widths of sites.
        statistics: Those that can tell.
        gathering: What their accumulators are told.
        routed: Whether experts have statistics of their own tokens.
        own: Those that each linear has for itself.
    """

    graph: ModelGraph
    statistics: tuple[SizedStatistic, ...]
    gathering: Gathering
    routed: bool
    own: tuple[SizedStatistic, ...] = ()

    @classmethod
    def of(
        cls, graph: ModelGraph, config: Mapping[str, Any], names: Iterable[str], tokens: int, plugins: Plugins
    ) -> StatisticSizes:
        """Return the sizes that statistics of these names have, as a step's config asks for them.

        What no plugin offers by a name, or cannot tell its size, counts as nothing.
        """
        known = plugins.offers["statistics"]
        loaded = [plugins.load("statistics", name) for name in names if name in known]
        sized = tuple(one for one in loaded if isinstance(one, SizedStatistic))
        own = tuple(one for one in sized if isinstance(one, GuidedStatistic))
        gathering = Gathering(tokens, TokenWeight(), sample_size=config["sample_size"])
        shared = tuple(one for one in sized if one not in own)
        return cls(graph, shared, gathering, config.get("experts") == "routed", own)

    def at(self, site: str) -> int:
        """Return the bytes of all statistics of a site, by its name inside a block."""
        gathering, dims = self.gathering, self.graph.dims
        if self.routed and site.startswith(EXPERTS):  # an expert's share of the sampled tokens
            gathering = replace(gathering, sample_size=round(gathering.sample_size * dims.chosen / dims.experts))
        n, readers = self.graph.width(site), sum(one.spec.reads == site for one in self.graph.linears_of(0))
        return sum(one.nbytes(n, gathering) for one in (*self.statistics, *self.own * readers))

    def of_layers(self, *, head: LinearSite | None = None) -> list[int]:
        """Return the bytes of the statistics of each layer, and behind them of what a head reads, if it is solved."""
        mode: Mode = "routed" if self.routed else "all"
        blocks = [self.graph.readers_of(layer) for layer in range(self.graph.dims.num_layers)]
        solved = (*blocks, *([] if head is None else [(head,)]))
        return [sum(self.at(site) for site in sites_to_observe(linears, mode)) for linears in solved]


def demand_of(
    manifest: Manifest, model: Model, plugins: Plugins, gathered: Manifest | None = None, plan: Plan | None = None
) -> Demand | None:
    """Return what the step of a manifest is going to take; None for other steps than calibrate and mitigate.

    Args:
        manifest: The manifest without tensors.
        model: The model that it speaks of.
        plugins: Where statistics, methods and formats are found.
        gathered: For mitigate, the manifest of the statistics.
        plan: For mitigate, the transform.
    """
    config, graph = manifest.step.config, model.graph
    if manifest.kind == "statistics":
        windows, tokens = config["shape"]
        layers = StatisticSizes.of(graph, config, config["gather"], windows * tokens, plugins).of_layers()
        counts = _COUNT * graph.dims.experts * sum(graph.dims.sparse) if config["gather"] else 0
        return _largest(layers, disk=sum(layers) + counts + _TOKEN * windows * tokens)
    if manifest.kind != "quantized":
        return None
    subject = Subject(model, plugins, plan or Plan(), ModelScheme.from_json(manifest.schemes))
    methods, layers = methods_of(manifest, plugins), list[int]()
    needs = needs_of(methods, static_inputs(subject))
    if gathered is not None and (known := known_of(needs, config["propagate"], gathered, subject)):
        told = {**gathered.step.config, **config}
        sizes = StatisticSizes.of(graph, told, known, gathered.details["tokens"], plugins)
        layers = sizes.of_layers(head=subject.head)
    return _largest(layers, disk=sum(stored_bytes(subject, methods).values()) + _input_scale_bytes(subject))


def methods_of(manifest: Manifest, plugins: Plugins) -> list[Method]:
    """Return the mitigators that a quantized artifact is made by, with their options."""
    loaded = [(plugins.load("mitigators", one["name"]), one["config"]) for one in manifest.step.config["methods"]]
    return [Method(mitigator, mitigator.Config(**options)) for mitigator, options in loaded]


def known_of(needs: Sequence[str], propagate: str, gathered: Manifest | None, subject: Subject) -> tuple[str, ...]:
    """Return which statistics problems come with: what is needed, and the Hessian that the loss of all is told in.

    Passes gather it. Without them it is there, also for methods without needs, if calibration gathered it of all tokens
    and it can be carried to the inputs of all linears. Blocks of it come from it then.

    Args:
        needs: What is needed.
        propagate: ``none`` without passes.
        gathered: The manifest of the statistics.
        subject: What they are carried to.
    """
    config = {} if gathered is None else gathered.step.config
    if propagate == "none" and (gathered is None or HESSIAN not in config.get("gather", ())):
        return tuple(needs)
    known = [HESSIAN if need == BLOCKS else need for need in needs]
    if propagate != "none" or (gathered is not None and _all_told_in(gathered, subject)):
        known.append(HESSIAN)
    return tuple(dict.fromkeys(known))


def told_in(known: Sequence[str], propagate: str, gathered: Manifest | None, token_weight: str) -> dict[str, str]:
    """Return what there is to say of the Hessians that losses are told in; nothing where there are none.

    Args:
        known: Which statistics problems come with.
        propagate: ``none`` without passes: they are then those that were gathered before.
        gathered: The manifest of the statistics.
        token_weight: The rule for the weight of a token in passes.
    """
    if HESSIAN not in known:
        return {}
    carried = gathered if propagate == "none" else None
    return {"token_weight": token_weight if carried is None else carried.step.config["token_weight"]}


def _all_told_in(gathered: Manifest, subject: Subject) -> bool:
    """Say whether the losses of all linears can be told in Hessians that were gathered before."""
    config, plan = gathered.step.config, subject.plan if gathered_behind(gathered) is None else Plan()
    return config.get("experts") != "routed" and can_carry_hessians(subject.model, plan, config["token_weight"])


def _largest(layers: Sequence[int], *, disk: int) -> Demand:
    layer = max(range(len(layers)), key=layers.__getitem__, default=0)
    return Demand(layers[layer] if layers else 0, layer, disk)


def stored_bytes(subject: Subject, methods: Sequence[Method] = ()) -> dict[str, int]:
    """Return the bytes of the codes, scales and zero points of each linear, by name, and of what methods put beside."""
    known: dict[tuple[int, int, Grid], int] = {}
    found: dict[str, int] = {}
    for linear in subject.coded:
        rows, n = subject.shape(linear)
        key = (rows, n, subject.weight_grid(linear))
        if key not in known:
            known[key] = _code_bytes(*key)
        solving = () if linear.reads == TOKENS else methods  # an embedding is rounded to nearest by all
        beside = (one.bytes_beside(rows, n, expert=linear.expert is not None) for one in solving)
        found[linear.name] = known[key] + sum(beside)
    return found


def _code_bytes(rows: int, n: int, grid: Grid) -> int:
    """Return the bytes that a weight takes as it is stored, from those of a few rows: the rest is alike.

    Pairs, because two rows may share a byte of scales; and one block more, where rows share scales.
    """

    def stored(count: int) -> int:
        weight = round_nearest(torch.rand(count, n), grid)
        return sum(tensor.nbytes for tensor in linear_tensors("", weight, grid).values())

    blocks = [part.scheme.scale_rows for part in grid.parts if part.scheme.scale_rows is not None]
    if blocks:  # scales that are codes: those of a group are one stream of bits, and their ranges come once a block
        period = lcm(8, *blocks)
        if rows < 2 * period:
            return stored(rows)
        return stored(period + rows % period) + (rows // period - 1) * (stored(2 * period) - stored(period))
    side = max(part.block_rows for part in grid.parts)
    if side > 1:
        last = rows % side or side
        return stored(last) + (rows - last) // side * (stored(2 * side) - stored(side) if rows > last else 0)
    two = stored(2)
    return two - -(rows - 2) * (stored(4) - two) // 2


def _input_scale_bytes(subject: Subject) -> int:
    """Return the bytes of what is calibrated of activations and outputs, for each site and part, and of caches."""
    inputs = static_inputs(subject)
    if inputs is None:
        return 0
    dims, cache = subject.model.graph.dims, subject.cache
    shapes = {} if cache is None else cache.static_shapes(dims)
    asymmetric = {place for place, needs in ({} if cache is None else cache.needs).items() if len(needs) > 1}
    found = ((linear.reads, inputs.grid_of(linear)) for linear in subject.coded)
    grids = {site: grid for site, grid in found if grid is not None}
    outputs = calibrated_outputs(subject, subject.linears).values()
    parts = [part for grid in (*grids.values(), *outputs) for part in grid.parts]
    zeros = sum(part.scheme.static and not part.scheme.symmetric for part in parts)
    zeros += dims.num_layers * sum(prod(shape) for place, shape in shapes.items() if place in asymmetric)
    scales = dims.num_layers * sum(map(prod, shapes.values())) + sum(part.has_global_scale for part in parts)
    return _SCALE * scales + _ZERO_POINT * zeros
