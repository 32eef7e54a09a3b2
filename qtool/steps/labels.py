"""What a row of a table says of itself: model, transform, mitigator, scheme, bits, and what was really executed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields
from typing import Any

from qtool.artifacts.manifest import Manifest
from qtool.artifacts.store import Artifact
from qtool.errors import QtoolError
from qtool.model.card import read_card
from qtool.model.plan import Plan
from qtool.scheme import ModelScheme
from qtool.steps.subjects import Opened, dtype_name
from qtool.steps.workspace import Workspace

FULL = "full precision"


def labels_of(opened: Opened, workspace: Workspace) -> dict[str, str]:
    """Return the labels of what is measured, all of them text.

    ``transform``, ``mitigator``, ``scheme``, ``weights``, ``activations``, ``kv``, ``outputs`` say what was asked for,
    and ``settings`` every option that is not at its default; ``executed`` what the measurement ran; ``model``,
    ``calibration``, ``propagate``, ``token_weight`` and ``seed`` from what it was made; ``segments`` what channels are
    in a format of their own; ``footnote`` what must stand below a table with this model.
    """
    card = read_card(opened.model.path)
    labels = {
        "model": card.name,
        "transform": "identity",
        "mitigator": FULL,
        "scheme": "16 bits",
        "executed": "16 bits",
        **({"footnote": card.footnote} if card.footnote else {}),
    }
    artifact = opened.artifact
    if artifact is None or artifact.manifest.kind == "statistics":
        return labels
    if artifact.manifest.kind == "checkpoint":
        return labels | _checkpoint_labels(artifact.manifest)
    made_by = list(makers_of(artifact, workspace))
    manifests = {one.step.name: one for one in made_by}
    if "transform" in manifests:
        labels["transform"] = manifests["transform"].step.method
    if "mitigate" in manifests:
        labels |= _quantized_labels(manifests["mitigate"])
    if apart := _segments(opened.subject.plan):
        labels["segments"] = apart
    settings = [text for one in reversed(made_by) for text in _settings(one, opened, workspace)]
    return labels | _seed_labels(manifests) | {"settings": ", ".join(settings)}


def _segments(plan: Plan) -> str:
    """Return what a plan sets apart and where, such as ``128 int8 at attn_in, mlp_in``; nothing where it does not."""
    places: dict[str, list[str]] = {}
    for site_id, site in plan.sites.items():
        for segment in site.segments:
            places.setdefault(f"{segment.channels} {segment.format}", []).append(site_id.rpartition(".")[2])
    return "; ".join(f"{what} at {', '.join(dict.fromkeys(sites))}" for what, sites in places.items())


def makers_of(artifact: Artifact, workspace: Workspace) -> Iterator[Manifest]:
    """Yield the manifests of an artifact and of what it was made from; statistics may be gone by now."""
    yield artifact.manifest
    inputs = artifact.manifest.inputs
    if "plan" in inputs:
        yield workspace.input_of(artifact, "plan").manifest
    if "statistics" in inputs:
        with suppress(QtoolError):
            yield workspace.input_of(artifact, "statistics").manifest


def _settings(manifest: Manifest, opened: Opened, workspace: Workspace) -> Iterator[str]:
    """Yield the options of a step that are not at their defaults, as users write them."""
    config, kind = manifest.step.config, {"transform": "transforms", "mitigate": "mitigators"}.get(manifest.step.name)
    for method in config["methods"] if kind else ():
        defaults = _defaults(str(kind), method["name"], workspace)
        for option, value in method["config"].items():
            if option not in defaults or defaults[option] != value:
                yield f"{method['name']}.{option}={value}"
    yield from (name for name in ("true_sequential", "round_activations") if config.get(name))
    if manifest.step.name == "mitigate" and config["dtype"] != dtype_name(opened.model.dtype):
        yield f"dtype={config['dtype']}"


def _defaults(kind: str, name: str, workspace: Workspace) -> dict[str, Any]:
    """Return a method's defaults; none if the plugin that an artifact was made with is gone."""
    with suppress(QtoolError):
        options = fields(workspace.plugins.load(kind, name).Config)
        return {one.name: one.default for one in options if one.default is not MISSING}
    return {}


def _seed_labels(manifests: dict[str, Manifest]) -> dict[str, str]:
    """Return the text that was calibrated on, and the seed: of each step where they are not all the same."""
    seeds = {name: str(one.step.config["seed"]) for name, one in manifests.items()}
    several = ", ".join(f"{name} {seed}" for name, seed in sorted(seeds.items()))
    labels = {"seed": next(iter(seeds.values())) if len(set(seeds.values())) == 1 else several}
    if "calibrate" in manifests:
        text = manifests["calibrate"].details
        labels["calibration"] = f"{text['data']}, {text['num_samples']} x {text['seq_len']} tokens"
    return labels


def _quantized_labels(manifest: Manifest) -> dict[str, str]:
    scheme = ModelScheme.from_json(manifest.schemes)
    config = manifest.step.config
    return {
        "mitigator": manifest.step.method,
        "scheme": scheme.name or str(scheme),
        **scheme.parts(),
        "executed": f"fake-quantized: {scheme}",
        "propagate": str(config["propagate"]),
        "token_weight": str(config["token_weight"]),
    }


def _checkpoint_labels(manifest: Manifest) -> dict[str, str]:
    """A checkpoint carries the labels of what it was packed from, and what its loader executes."""
    labels = dict(manifest.details["labels"])
    consumers = manifest.details["consumers"]
    labels["executed"] = str(consumers.get("transformers") or next(iter(consumers.values())))
    return labels
