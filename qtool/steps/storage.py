"""What is stored of a model, by part: bytes as they are in files, and bits a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch

from qtool.engine.storage import HALF, PARTS, foreseen_bytes, in_order, operator_bytes, stored_bytes
from qtool.model.source import Model
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.description import Cell, Table
from qtool.steps.subjects import Opened

STORAGE = "storage"

_MULTIPLIER = 4
"""Bytes of what multiplies all scales of a tensor."""


@dataclass(frozen=True)
class Storage:
    """Bytes by part.

    Attributes:
        linears: Of the linears of blocks, without biases and scales of activations.
        model: Of everything.
        weights: How many weights the linears have.
        values: How many values the model has.
    """

    linears: Mapping[str, int]
    model: Mapping[str, int]
    weights: int
    values: int

    @property
    def bits(self) -> dict[str, float]:
        """Bits per weight of the linears, and of the whole model."""
        linears, model = sum(self.linears.values()), sum(self.model.values())
        return {"linears": linears * 8 / self.weights, "model": model * 8 / self.values}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def table(self) -> Table:
        """Return a row for each part, and one for all."""
        columns = ("part", "linears_bytes", "linears_bits", "model_bytes", "model_bits", "meaning")
        rows = [
            self._row(part, self.linears.get(part, 0), self.model.get(part, 0))
            for part in PARTS
            if self.linears.get(part) or self.model.get(part)
        ]
        return Table(columns, [*rows, self._row("total", sum(self.linears.values()), sum(self.model.values()))])

    def _row(self, part: str, linears: int, model: int) -> tuple[Cell, ...]:
        return (part, linears, linears * 8 / self.weights, model, model * 8 / self.values, PARTS.get(part))


def storage_of(opened: Opened) -> Storage | None:
    """Return what is stored of a subject, exact to the byte; None of a checkpoint that does not tell the parts apart.

    Embeddings, norms and head, and all weights of what is not quantized, count as 16 bits, whatever the model's files
    have. Operators that run in the forward pass count as 16 bits a value likewise.
    """
    artifact, model = opened.artifact, opened.model
    if artifact is not None and artifact.manifest.kind == "checkpoint":
        return told_storage(artifact.manifest.details)
    linears: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    counts = parameter_counts(model)
    names = {f"{linear.name}.weight" for linear in model.graph.linears}
    weights = sum(counts[name] for name in names)
    others = sum(count for name, count in counts.items() if name not in names)
    graph, plan, ends = model.graph, opened.subject.plan, tuple(f"{end.name}." for end in model.graph.ends)
    if f"{graph.family.head}.weight" not in counts and opened.subject.unties_head:
        others += counts[f"{graph.family.embedding}.weight"]
    if artifact is not None and artifact.manifest.kind == "quantized":
        of_ends = {name: slot for name, slot in artifact.header.slots.items() if name.startswith(ends)}
        linears.update(stored_bytes({k: slot for k, slot in artifact.header.slots.items() if k not in of_ends}))
        whole.update(stored_bytes(of_ends))
        others -= sum(prod(opened.subject.shape(end)) for end in opened.subject.coded_ends)
        linears["unquantized"] = HALF * sum(counts[f"{name}.weight"] for name in opened.subject.kept)
        whole["inputs"] += linears.pop("inputs", 0)
    else:
        linears["unquantized"] = HALF * weights
    at_linears, operators = operator_bytes(plan, graph)
    whole.update(linears)
    whole["unquantized"] += HALF * others
    linears["operators"] += at_linears
    whole["operators"] += operators
    return Storage(in_order(linears), in_order(whole), weights, sum(counts.values()))


def told_storage(details: Mapping[str, Any]) -> Storage | None:
    """Read what the manifest of a checkpoint or of measurements says of storage; None in those from before it did."""
    return Storage(**details[STORAGE]) if STORAGE in details else None


def written_storage(model: Model, written: Mapping[str, Any]) -> Storage:
    """Return what an exporter wrote.

    Args:
        model: The original model.
        written: Bytes of ``linears`` and ``model``; of the linears' ``parts`` too, if the exporter tells them apart,
            and of those of what is quantized of its ``ends``.
    """
    counts = parameter_counts(model)
    weights = sum(counts[f"{linear.name}.weight"] for linear in model.graph.linears)
    parts = dict(written.get("parts") or {"codes": written["linears"]})
    whole = Counter(parts) + Counter(written.get("ends", {}))
    rest = written["model"] - sum(whole.values())
    whole["unquantized"] += rest
    linears = {part: size for part, size in parts.items() if part != "inputs"}
    return Storage(in_order(linears), in_order(whole), weights, sum(counts.values()))


def cache_bits(scheme: ModelScheme, model: Model, plugins: Plugins) -> dict[str, float]:
    """Return the bits that a token takes in a quantized cache, over all blocks: of ``keys`` and of ``values``.

    Scales and zero points count, without the last bits of a byte; what all tokens share, and the tokens of a group
    that is not full, do not.
    """
    dims = model.graph.dims
    heads, eight = dims.num_kv_heads * dims.num_layers, 8
    found: dict[str, float] = {}
    for name, part, width in (("keys", scheme.keys, dims.head_dim), ("values", scheme.values, dims.value_dim)):
        if part is None:
            found[name] = float(heads * width * 8 * HALF)
            continue
        fmt = plugins.format(part.format)
        if part.strategy in ("tensor", "head"):
            found[name] = float(heads * width * fmt.bits)
            continue
        size = part.group_size or width
        rows, length = (width, size) if part.strategy == "channel" else (1, width)
        sizes = foreseen_bytes(replace(part, strategy="group", group_size=size), fmt, rows, eight * length)
        tokens = size if part.strategy == "channel" else 1
        shared = 0 if fmt.global_scale(torch.ones(()), part) is None else _MULTIPLIER
        found[name] = heads * (sum(sizes.values()) - shared) / tokens
    return found


def cache_table(scheme: ModelScheme, model: Model, plugins: Plugins) -> Table:
    """Return the bits of a quantized cache, a value and a token."""
    dims = model.graph.dims
    heads = dims.num_kv_heads * dims.num_layers
    values = {"keys": heads * dims.head_dim, "values": heads * dims.value_dim}
    bits = cache_bits(scheme, model, plugins)
    rows = [(name, bits[name] / values[name], bits[name]) for name in bits]
    rows.append(("both", sum(bits.values()) / sum(values.values()), sum(bits.values())))
    return Table(("cache", "bits_per_value", "bits_per_token"), rows)


def scheme_table(model: Model, schemes: Iterable[str], plugins: Plugins) -> Table:
    """Return what the linears of a model take in each of some schemes, before any work, in bits per weight.

    Raises:
        SchemeError: A scheme cannot be read, or a group does not divide the input of a linear; names it.
    """
    places = [(linear, model.places[f"{linear.name}.weight"].shape) for linear in model.graph.linears]
    weights = sum(prod(shape) for _, shape in places)
    rows: list[tuple[Cell, ...]] = []
    shown = ("codes", "scales", "zeros")
    for text in schemes:
        scheme = parse_tensor_scheme(text, plugins.format)
        fmt = plugins.format(scheme.format)
        found: Counter[str] = Counter()
        for linear, (n_out, n_in) in places:
            scheme.groups_of(n_in, layer=linear.name)
            found.update(foreseen_bytes(scheme, fmt, n_out, n_in))
        bits = {part: size * 8 / weights for part, size in found.items()}
        total = sum(bits.values())
        rows.append((str(scheme), *(bits.get(part, 0.0) for part in shown), total - bits["codes"], total))
    return Table(("weights", *shown, "extra_bits", "bits_per_weight"), rows)


def stored_bits(opened: Opened) -> dict[str, float]:
    """Return bits per weight of the linears and of the whole model: those of a checkpoint as they were written."""
    artifact, storage = opened.artifact, storage_of(opened)
    if artifact is not None and artifact.manifest.kind == "checkpoint":
        return {name: float(bits) for name, bits in artifact.manifest.details["bits"].items()}
    return {} if storage is None else storage.bits


def parameter_counts(model: Model) -> dict[str, int]:
    """Return the number of values of every tensor of the original model, those of each expert apart."""
    return {name: prod(place.shape) for name, place in model.places.items()}
