"""inspect: what a model or an artifact is, from its manifest and headers; of tensors, only small ones are read."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qtool.artifacts.store import Artifact, open_artifact
from qtool.errors import ArtifactError, ResourceError, UsageError
from qtool.model.source import Model
from qtool.steps.calibrate import EXPERT_TOKENS, WINDOWS
from qtool.steps.choice import describe_choice
from qtool.steps.description import Cell, Description, Facts, Table, Tables
from qtool.steps.inspect_plan import describe_plan
from qtool.steps.inspect_quantized import describe_quantized
from qtool.steps.parameters import parameter_table, parameters_of, require_known
from qtool.steps.routing import alike, gathered_routing
from qtool.steps.storage import STORAGE, scheme_table, told_storage
from qtool.steps.subjects import Opened, is_artifact, open_subject
from qtool.steps.workspace import Workspace


def inspect(
    source: str,
    workspace: Workspace,
    *,
    strict: bool = False,
    weights: Sequence[str] = (),
    activations: Sequence[str] = (),
) -> Description:
    """Describe a model or an artifact.

    Args:
        source: A model, or the path of an artifact.
        workspace: Where things are found.
        strict: Whether parameters that the model's family does not describe, or that are missing, are an error.
        weights: Schemes of weights: of a model, what its linears would take in them; of statistics or of a plan, the
            error of each linear in each.
        activations: Schemes of activations, of which to say that of statistics or of a plan.

    Raises:
        ArtifactError: The artifact is damaged.
        ModelError: There is no such model; or, with ``strict``, parameters are unknown or missing.
        SchemeError: One of ``weights`` cannot be read, or does not fit the model.
        UsageError: Schemes of something else.
    """
    if not is_artifact(source):
        if activations:
            raise UsageError(
                "errors of activations are measured on statistics",
                hint=f"qtool inspect STATISTICS --activations {activations[0]}, of qtool calibrate {source}",
            )
        described = _describe_model(model := workspace.model(source), strict=strict)
        table = {"storage_by_scheme": scheme_table(model, weights, workspace.plugins)} if weights else {}
        return replace(described, tables={**table, **described.tables})
    artifact = open_artifact(Path(source))
    if weights or activations:
        if artifact.manifest.kind not in ("statistics", "plan"):
            raise UsageError(
                "schemes of weights are shown for models, and errors in schemes for statistics and plans",
                facts=(("received", artifact.manifest.kind),),
                hint="qtool inspect MODEL --weights int4-sym-g32, or qtool inspect STATISTICS --activations fp4-token",
            )
        return Description(*describe_choice(open_subject(source, workspace), workspace, weights, activations))
    opened = _opened(source, workspace)
    facts, tables = _DESCRIBED_BY[artifact.manifest.kind](artifact, opened)
    return Description({**_manifest_facts(artifact), **facts}, tables)


def _describe_model(model: Model, *, strict: bool) -> Description:
    parameters = parameters_of(model)
    if strict:
        require_known(parameters, model)
    dims = model.graph.dims
    count = sum(_size(place.shape) for place in model.places.values())
    facts: Facts = {
        "path": str(model.path),
        "kind": "model",
        "id": model.id,
        "family": model.family.name,
        "model_type": model.config.model_type,
        "parameters": count,
        "layers": dims.num_layers,
        "hidden": dims.hidden,
        "intermediate": dims.intermediate,
        "heads": dims.num_heads,
        "kv_heads": dims.num_kv_heads,
        "head_dim": dims.head_dim,
        "vocab": dims.vocab,
        "context": dims.max_positions,
        "tied_head": dims.tied,
    }
    if dims.experts:
        facts |= {"experts": dims.experts, "experts_chosen": dims.chosen, "sparse_layers": sum(dims.sparse)}
    if model.family.note:
        facts["note"] = model.family.note
    return Description(facts, {"parameters_by_fate": parameter_table(parameters)})


def _opened(source: str, workspace: Workspace) -> Opened | None:
    """Open what an artifact speaks of; None where its model or inputs are gone, since the rest can still be shown."""
    try:
        return open_subject(source, workspace)
    except (ArtifactError, ResourceError) as error:
        workspace.warn(f"{error.message}; what needs it is left out")
        return None


def _manifest_facts(artifact: Artifact) -> Facts:
    manifest, about = artifact.manifest, artifact.manifest.about
    return {
        "path": str(artifact.path.resolve()),
        "kind": manifest.kind,
        "key": manifest.key,
        "id": manifest.id,
        "family": manifest.family,
        "subject": manifest.subject,
        **{f"input_{role}": one.path for role, one in manifest.inputs.items()},
        "step": manifest.step.name,
        "method": manifest.step.method,
        "version": manifest.step.version,
        "provider": manifest.step.provider,
        "created": about.get("created"),
        "seconds": about.get("seconds"),
        "process_peak_memory_bytes": about.get("process_peak_memory_bytes"),
        "command": " ".join(about.get("argv", ())),
    }


def _describe_statistics(artifact: Artifact, opened: Opened | None) -> tuple[Facts, Tables]:
    del opened
    details, config = artifact.manifest.details, artifact.manifest.step.config
    names = ("data", "source", "num_samples", "seq_len", "tokens", "seed")
    facts: Facts = {name: details.get(name) for name in names}
    facts |= {"token_weight": config["token_weight"], "dtype": config["dtype"]}
    facts |= {name: config[name] for name in ("experts",) if name in config}
    sites: defaultdict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for name in artifact.names("layers."):
        place, _, entry = name.rpartition(".")
        _, layer, site = place.split(".", 2)
        if name != f"layers.{layer}.{EXPERT_TOKENS}":
            sites[alike(site)].append((int(layer), entry, name))
    rows = [_site_row(artifact, site, found) for site, found in sites.items()]
    columns = ("site", "layers", "channels", "entries", "bytes", "absmax", "absmax_layer")
    windows = artifact.header.slots.get(WINDOWS)
    facts["stored_windows"] = windows.shape[0] if windows else 0
    return facts, {"sites": Table(columns, rows), **gathered_routing(artifact)}


def _site_row(artifact: Artifact, site: str, found: list[tuple[int, str, str]]) -> tuple[Cell, ...]:
    """Return one row of statistics: what was gathered at a site, and where its largest magnitude lies."""
    slots = artifact.header.slots
    largest: defaultdict[int, float] = defaultdict(float)
    for layer, entry, name in found:
        if entry == "absmax":
            largest[layer] = max(largest[layer], float(artifact.tensor(name).max()))
    peak = max(largest, key=largest.__getitem__, default=None)
    return (
        site,
        len({layer for layer, _, _ in found}),
        slots[found[0][2]].shape[-1],
        ", ".join(dict.fromkeys(entry for _, entry, _ in found)),
        sum(slots[name].nbytes for _, _, name in found),
        None if peak is None else largest[peak],
        peak,
    )


def _describe_checkpoint(artifact: Artifact, opened: Opened | None) -> tuple[Facts, Tables]:
    del opened
    details = artifact.manifest.details
    facts: Facts = {f"bits_per_weight_{name}": bits for name, bits in details["bits"].items()}
    facts["read_back_with"] = details["read_back_with"]
    consumers = _pairs(details["consumers"], "consumer", "executes")
    return facts, {**_storage(artifact), "consumers": consumers, "labels": _pairs(details["labels"], "label")}


def _describe_metrics(artifact: Artifact, opened: Opened | None) -> tuple[Facts, Tables]:
    del opened
    details, config = artifact.manifest.details, artifact.manifest.step.config
    protocol = {name: json.dumps(value) if isinstance(value, dict | list) else value for name, value in config.items()}
    sources = {f"source_{data}": source for data, source in details["sources"].items()}
    facts: Facts = {f"bits_per_weight_{name}": bits for name, bits in details["bits"].items()}
    return facts, {
        "metrics": _pairs(details["values"], "metric"),
        "protocol": _pairs({**protocol, **sources}, "setting"),
        "labels": _pairs(details["labels"], "label"),
        **_storage(artifact),
    }


def _storage(artifact: Artifact) -> Tables:
    storage = told_storage(artifact.manifest.details)
    return {} if storage is None else {STORAGE: storage.table()}


def _pairs(values: Mapping[str, Cell], name: str, value: str = "value") -> Table:
    return Table((name, value), list(values.items()))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


_DESCRIBED_BY: Mapping[str, Callable[[Artifact, Opened | None], tuple[Facts, Tables]]] = {
    "statistics": _describe_statistics,
    "plan": describe_plan,
    "quantized": describe_quantized,
    "checkpoint": _describe_checkpoint,
    "metrics": _describe_metrics,
}
