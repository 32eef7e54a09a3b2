"""What a row of a table says of itself: model, transform, mitigator, scheme, bits, and what was really executed."""

from __future__ import annotations

from math import prod

from qtool.artifacts.layout import read_header
from qtool.artifacts.manifest import Manifest
from qtool.scheme import ModelScheme
from qtool.steps.subjects import Opened
from qtool.steps.workspace import Workspace

FULL = "full precision"


def labels_of(opened: Opened, workspace: Workspace) -> dict[str, str]:
    """Return the labels of what is measured, all of them text.

    ``transform``, ``mitigator``, ``scheme``, ``weights``, ``activations``, ``kv`` say what was asked for;
    ``executed`` what the measurement ran; ``model``, ``calibration``, ``propagate``, ``token_weight`` and ``seed``
    say from what it was made.
    """
    labels = {
        "model": opened.model.path.name,
        "transform": "none",
        "mitigator": FULL,
        "scheme": "16 bits",
        "executed": "16 bits",
    }
    artifact = opened.artifact
    if artifact is None:
        return labels
    if artifact.manifest.kind == "checkpoint":
        return labels | _checkpoint_labels(artifact.manifest)
    if artifact.manifest.kind == "quantized":
        labels |= _quantized_labels(artifact.manifest)
        if "plan" in artifact.manifest.inputs:
            labels["transform"] = workspace.input_of(artifact, "plan").manifest.step.method
    if artifact.manifest.kind == "plan":
        labels["transform"] = artifact.manifest.step.method
    return labels


def _quantized_labels(manifest: Manifest) -> dict[str, str]:
    scheme = ModelScheme.from_json(manifest.schemes)
    config = manifest.step.config
    parts = {"weights": scheme.weights, "activations": scheme.activations, "kv": scheme.kv}
    return {
        "mitigator": manifest.step.method,
        "scheme": scheme.name or str(scheme),
        **{name: str(part) if part else "16 bits" for name, part in parts.items()},
        "executed": f"fake-quantized: {scheme}",
        "propagate": str(config["propagate"]),
        "token_weight": str(config["token_weight"]),
        "seed": str(config["seed"]),
    }


def _checkpoint_labels(manifest: Manifest) -> dict[str, str]:
    """A checkpoint carries the labels of what it was packed from, and what its loader executes."""
    labels = dict(manifest.details["labels"])
    labels["executed"] = str(manifest.details["consumers"]["transformers"])
    return labels


def stored_bits(opened: Opened) -> dict[str, float]:
    """Return bits per weight from stored bytes: of the quantized linears, and of the whole model.

    Scales, zero points and adapters count; embeddings, norms and head count in the whole model at their stored
    size (16 bits at most, since that is what a checkpoint holds).
    """
    artifact, model = opened.artifact, opened.model
    graph = model.graph
    linear_names = {f"{linear.name}.weight" for linear in graph.linears}
    sizes = parameter_counts(opened)
    linear_count = sum(sizes[name] for name in linear_names)
    other_bits = sum(16 * count for name, count in sizes.items() if name not in linear_names)
    total = sum(sizes.values())
    if artifact is not None and artifact.manifest.kind == "checkpoint":
        return {k: float(v) for k, v in artifact.manifest.details["bits"].items()}
    if artifact is None or artifact.manifest.kind != "quantized":
        return {"linears": 16.0, "model": 16.0}
    stored = sum(
        slot.nbytes * 8 for name, slot in artifact.header.slots.items() if not name.endswith(".input_global_scale")
    )
    return {"linears": stored / linear_count, "model": (stored + other_bits) / total}


def parameter_counts(opened: Opened) -> dict[str, int]:
    """Return the number of values of every stored tensor of the original model."""
    counts: dict[str, int] = {}
    for file in sorted(set(opened.model.files.values())):
        counts |= {name: prod(slot.shape) for name, slot in read_header(file).slots.items()}
    return counts
