"""inspect of a quantized artifact: the loss of each linear and kind of linear, and what was not as usual."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean

from qtool.artifacts.store import Artifact
from qtool.scheme import ModelScheme
from qtool.steps.description import Cell, Facts, Table, Tables
from qtool.steps.inspect_plan import options_of
from qtool.steps.routing import alike, solved_routing
from qtool.steps.storage import STORAGE, cache_table, storage_of
from qtool.steps.subjects import Opened

Reports = Mapping[str, Mapping[str, float]]

COUNTERS: Mapping[str, str] = {
    "dead_columns": "inputs that were always 0, counted for each linear; their weights do not matter",
    "experts_rtn": "experts that saw no token and had nothing to borrow; rounded to nearest",
    "fallback_rtn": "linears that were rounded to nearest, since their Hessian could not be factorized",
    "float64_factors": "linears whose Hessian was factorized in float64, since float32 failed",
    "raised_dampening": "linears whose Hessian took more damping than was asked for",
    "subnormal_scales": "scales of this linear that are too small for their format; it holds them roughly",
    "saturated_scales": "scales of this linear that are the largest of their format; its weights may be cut off",
    "shrunk_experts": "experts with few tokens; their statistics were shrunk toward shared ones",
}
"""What the counters of qtool's own methods count."""

_PROTOCOL = (
    *("propagate", "true_sequential", "round_activations", "token_weight", "experts", "expert_share"),
    *("seed", "dtype"),
)
_LOSSES = ("loss", "weight_error")
_BEFORE = "what the last method that tells it started from: what the one to its left made, or rounding to nearest"


def describe_quantized(artifact: Artifact, opened: Opened | None) -> tuple[Facts, Tables]:
    """Describe a quantized artifact; what needs its model is left out where that is gone."""
    manifest = artifact.manifest
    scheme, config = ModelScheme.from_json(manifest.schemes), manifest.step.config
    reports: Reports = manifest.details["layers"]
    facts: Facts = {
        "scheme": scheme.name or None,
        **scheme.parts(),
        **options_of(config["methods"]),
        **{name: config[name] for name in _PROTOCOL if name in config},
    }
    storage = None if opened is None else storage_of(opened)
    if storage is not None:
        facts |= {f"bits_per_weight_{name}": bits for name, bits in storage.bits.items()}
    facts["strict"] = "refuses it, for its counters" if manifest.counters else "accepts it"
    names = {name for report in reports.values() for name in report}
    if "losses" in manifest.details:
        facts["losses_token_weight"] = manifest.details["losses"]["token_weight"]
    if f"{loss_name(reports)}_before" in names:
        facts[f"{loss_name(reports)}_before"] = _BEFORE
    columns = sorted(names, key=lambda name: (not name.startswith(_LOSSES), not name.endswith("_rtn"), name))
    means = _over_experts(reports)
    rows = [(linear, *(means[linear].get(c) for c in columns)) for linear in sorted(means, key=natural)]
    counters = [
        (name, count, COUNTERS.get(name.partition(" ")[0])) for name, count in sorted(manifest.counters.items())
    ]
    return facts, {
        **({} if storage is None else {STORAGE: storage.table()}),
        **_of_cache(scheme, opened),
        "losses": Table(("linear", *columns), rows),
        "losses_by_module": _by_module(reports),
        **_of_blocks(manifest.details.get("blocks", {})),
        **_of_model(manifest.details.get("model", {})),
        **solved_routing(manifest.details.get("experts", {})),
        "counters": Table(("counter", "value", "meaning"), counters),
    }


def loss_name(reports: Reports) -> str:
    """Return what reports call the loss: that of the outputs, or where no Hessian was known that of the weights."""
    return "loss" if any("loss" in report for report in reports.values()) else "weight_error"


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """Return the kind of each linear: its last name, or its whole name in the block where another kind ends alike."""
    inside = {name: _inside(name) for name in sorted(names, key=natural)}
    endings = Counter(kind.rpartition(".")[2] for kind in set(inside.values()))
    shortened = {kind: kind.rpartition(".")[2] for kind in inside.values()}
    return {name: shortened[kind] if endings[shortened[kind]] == 1 else kind for name, kind in inside.items()}


def layer_of(name: str) -> int | None:
    """Return the block that a linear is in: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def natural(name: str) -> tuple[str | int, ...]:
    """Return a key that sorts names by the numbers in them: layer 2 before layer 10."""
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def _inside(name: str) -> str:
    """Return the part of a name behind its block's number, with one name for all experts."""
    parts = alike(name).split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbered[0] + 1 :]) if numbered else name


def _over_experts(reports: Reports) -> dict[str, Mapping[str, float]]:
    """Return the reports, with one for all experts of a layer in place of each: the mean of every number."""
    groups: defaultdict[str, list[Mapping[str, float]]] = defaultdict(list)
    for name, report in reports.items():
        groups[alike(name)].append(report)
    means: dict[str, Mapping[str, float]] = {}
    for name, members in groups.items():
        numbers = dict.fromkeys(number for one in members for number in one)
        means[name] = {number: fmean(one[number] for one in members if number in one) for number in numbers}
    return means


def _of_cache(scheme: ModelScheme, opened: Opened | None) -> Tables:
    if scheme.kv is None or opened is None:
        return {}
    return {"cache": cache_table(scheme, opened.model, opened.subject.plugins)}


def _of_blocks(reports: Mapping[str, Mapping[str, float]]) -> Tables:
    """Return what methods that look at whole blocks have to say of each; nothing where there was none."""
    if not reports:
        return {}
    columns = sorted({name for report in reports.values() for name in report}, key=lambda n: (n != "block_loss", n))
    rows = [(int(layer), *(reports[layer].get(name) for name in columns)) for layer in sorted(reports, key=int)]
    return {"blocks": Table(("layer", *columns), rows)}


def _of_model(report: Mapping[str, float]) -> Tables:
    """Return what a method has to say that looks at the whole model; nothing where there was none."""
    return {"model": Table(tuple(report), [tuple(report.values())])} if report else {}


def _by_module(reports: Reports) -> Table:
    """Return the mean loss over layers of each kind of linear, beside rounding to nearest and what was there before."""
    key = loss_name(reports)
    shown = [key + suffix for suffix in ("_rtn", "_before", "")]
    if not any(f"{key}_before" in report for report in reports.values()):
        shown.remove(f"{key}_before")
    members: defaultdict[str, list[str]] = defaultdict(list)
    for name, kind in kinds_of(reports).items():
        members[kind].append(name)
    rows: list[tuple[Cell, ...]] = []
    for kind, names in members.items():
        found = {one: [reports[name][one] for name in names if one in reports[name]] for one in shown}
        means = {one: fmean(values) if values else None for one, values in found.items()}
        ours, nearest = means[key], means[f"{key}_rtn"]
        worst = max((name for name in names if key in reports[name]), key=lambda name: reports[name][key], default=None)
        rows.append(
            (
                *(kind, len(names), *means.values()),
                ours / nearest if ours is not None and nearest else None,
                None if worst is None else reports[worst][key],
                worst,
            )
        )
    return Table(("module", "linears", *(f"mean_{one}" for one in shown), "of_rtn", f"worst_{key}", "worst"), rows)
