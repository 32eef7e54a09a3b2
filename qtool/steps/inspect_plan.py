"""A plan for people: which operators act at which sites, what producers absorb, and what the rest costs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from qtool.artifacts.store import Artifact
from qtool.model.graph import EXPERTS, OUTPUT, LinearSite
from qtool.model.plan import SitePlan
from qtool.model.source import Model
from qtool.numerics.operators import Block, Hadamard, Kron, Operator
from qtool.scheme import ModelScheme
from qtool.steps.description import Cell, Table
from qtool.steps.routing import alike
from qtool.steps.subjects import Opened, read_plan

QK_POST = "qk_post"

_COLUMNS = ("site", "layers", "operators", "folded", "online", "flops_per_token", "of_linears", "bytes", "condition")
_SEGMENTS = "segments"


def describe_plan(artifact: Artifact, opened: Opened | None) -> tuple[dict[str, Cell], dict[str, Table]]:
    """Describe a plan.

    Sites that share a name and their operators share a row, over layers and experts. ``flops_per_token`` is what runs
    in the forward pass, ``of_linears`` the same as a fraction of what the quantized linears take (two a weight);
    ``bytes`` is what the plan stores. ``condition`` is the largest condition number of a site's whole transform: exact
    where one operator at most is not orthogonal, the product of the operators' otherwise, which bounds it.

    Args:
        artifact: The plan.
        opened: Its model; without one there are no FLOPs.
    """
    plan, stored = read_plan(artifact), _stored_bytes(artifact)
    model = None if opened is None else opened.model
    groups: defaultdict[tuple[Cell, ...], list[str]] = defaultdict(list)
    for site_id, site in plan.sites.items():
        key = (_name(site_id), _operators(site), site.folded, _online_count(site_id, site), _segments(site))
        groups[key].append(site_id)
    rows: list[tuple[Cell, ...]] = []
    total = None if model is None else _linear_flops(model)
    for (name, operators, folded, online, segments), ids in groups.items():
        flops = None if model is None else sum(_online_flops(one, plan.at(one), model) for one in ids)
        share = None if flops is None or not total else flops / total
        nbytes = sum(stored[site_id] for site_id in ids)
        worst = max(_condition(plan.at(site_id)) for site_id in ids)
        layers = len({_layer(site_id) for site_id in ids})
        rows.append((name, layers, operators, folded, online, _whole(flops), share, nbytes, worst, segments))
    tables = {"sites": _with_totals(rows)} if rows else {}
    if plan.notes:
        tables["notes"] = Table(("note",), [(note,) for note in plan.notes])
    config = artifact.manifest.step.config
    facts: dict[str, Cell] = {
        "scheme": str(ModelScheme.from_json(config["scheme"])),
        "seed": config["seed"],
        **options_of(config["methods"]),
        "folds_norms": plan.fold_norms,
        "linears_flops_per_token": _whole(total),
    }
    return facts, tables


def options_of(methods: Iterable[Mapping[str, Any]]) -> dict[str, Cell]:
    """Return the options of each method as ``method.option`` facts."""
    return {f"{one['name']}.{name}": value for one in methods for name, value in one["config"].items()}


def _with_totals(rows: list[tuple[Cell, ...]]) -> Table:
    """Return the table of sites with a last row of totals; the column of segments only where there are any."""

    def total(column: str) -> Cell:
        values = [row[_COLUMNS.index(column)] for row in rows]
        return None if None in values else sum(value for value in values if isinstance(value, int | float))

    sums = [total(name) if name in ("flops_per_token", "of_linears", "bytes") else None for name in _COLUMNS[1:]]
    whole = [*rows, ("total", *sums, None)]
    if any(row[-1] for row in rows):
        return Table((*_COLUMNS, _SEGMENTS), whole)
    return Table(_COLUMNS, [row[:-1] for row in whole])


def _layer(site_id: str) -> str:
    """Return a site's block; empty for the whole model's."""
    return site_id.split(".")[1] if site_id.startswith("layers.") else ""


def _name(site_id: str) -> str:
    """Return the name that sites share over layers and experts."""
    return alike(site_id.split(".", 2)[2] if site_id.startswith("layers.") else site_id)


def _operators(site: SitePlan) -> str:
    """Return the operators of a site with their sizes: ``block[36x16]`` is of 36 blocks of 16 channels."""
    return " ".join(f"{operator.kind}[{_size(operator)}]" for operator in site.operators)


def _size(operator: Operator) -> str:
    if isinstance(operator, Kron):
        return f"{operator.left.shape[0]}*{operator.right.shape[0]}"
    block = operator.dim
    if isinstance(operator, Block):
        block = operator.matrices.shape[-1]
    elif isinstance(operator, Hadamard) and operator.block_size is not None:
        block = operator.block_size
    count = operator.heads * operator.dim // block
    return f"{count}x{block}" if count > 1 else f"{block}"


def _segments(site: SitePlan) -> str | None:
    return ", ".join(f"{one.channels} {one.format}" for one in site.segments) or None


def _stored_bytes(artifact: Artifact) -> Counter[str]:
    """Return what a plan stores of each site."""
    stored: Counter[str] = Counter()
    for name, slot in artifact.header.slots.items():
        stored[name.split("/")[1]] += slot.nbytes
    return stored


def _condition(site: SitePlan) -> float:
    """Return the product of the condition numbers of a site's operators."""
    return math.exp(sum(operator.log_condition() for operator in site.operators))


def _is_output(site_id: str) -> bool:
    return site_id.partition(".")[2].partition(".")[2].startswith(f"{OUTPUT}.")


def _online_count(site_id: str, site: SitePlan) -> int:
    """Return how many operators run in the forward pass; what a linear's rows absorb is undone behind it."""
    return len(site.operators if _is_output(site_id) else site.online)


def _online_flops(site_id: str, site: SitePlan, model: Model) -> float:
    """Return what a site's online operators cost for one token: each acts on every vector of its size there.

    What is of one expert counts by the part of the tokens that is routed to it on average.
    """
    if not _online_count(site_id, site):
        return 0.0
    graph, name = model.graph, site_id.split(".", 2)[2]
    dims, operators, visited = graph.dims, site.online, 1.0
    if _is_output(site_id):
        linear = _linear_of(site_id, model)
        width, visited = model.places[f"{linear.name}.weight"].shape[0], _visited(linear, model)
        operators = tuple(operator.inverse() for operator in site.operators)
    elif name == QK_POST:
        width = (dims.num_heads + dims.num_kv_heads) * dims.head_dim
    else:
        width = graph.width(name)
        visited = dims.chosen / dims.experts if name.startswith(EXPERTS) else 1.0
    return visited * sum(one.flops() * (width // (one.dim * one.heads)) for one in operators)


def _linear_of(site_id: str, model: Model) -> LinearSite:
    """Return the linear whose output a site is."""
    _, layer, name = site_id.split(".", 2)
    module = name.removeprefix(f"{OUTPUT}.")
    return next(one for one in model.graph.linears_of(int(layer)) if one.spec.module == module)


def _linear_flops(model: Model) -> float:
    """Return what the quantized linears take for one token: two operations a weight, of experts for those chosen."""
    sizes = {name: math.prod(place.shape) for name, place in model.places.items()}
    return float(sum(2 * sizes[f"{linear.name}.weight"] * _visited(linear, model) for linear in model.graph.linears))


def _visited(linear: LinearSite, model: Model) -> float:
    """Return the part of the tokens that a linear sees."""
    dims = model.graph.dims
    return 1.0 if linear.expert is None else dims.chosen / dims.experts


def _whole(flops: float | None) -> int | None:
    return None if flops is None else round(flops)
