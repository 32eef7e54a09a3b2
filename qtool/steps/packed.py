"""Packed checkpoints, qtool's own or another tool's, opened as what is executed or packed again."""

from __future__ import annotations

from pathlib import Path

from qtool.artifacts.manifest import Input
from qtool.artifacts.store import CHECKPOINT_MANIFEST, open_artifact
from qtool.consumers.agreement import require_agreement
from qtool.consumers.checkpoint import quant_method
from qtool.engine.exporter import PackedReader
from qtool.engine.subject import Subject
from qtool.steps.subjects import Opened
from qtool.steps.workspace import Workspace


def packed_reader(source: str, workspace: Workspace) -> tuple[str, PackedReader] | None:
    """Return the exporter that reads a packed checkpoint, with its name; None for anything else.

    Args:
        source: What a user named.
        workspace: Where exporters are found.
    """
    method = quant_method(Path(source)) if source else ""
    offered = method in workspace.plugins.offers["exporters"]
    found = workspace.plugins.load("exporters", method) if offered else None
    return (method, found) if isinstance(found, PackedReader) else None


def open_checkpoint(source: str, reader: PackedReader, workspace: Workspace) -> Opened:
    """Open a packed checkpoint, whose files hold what its config says; what is known of its making goes with it."""
    path = Path(source)
    made = open_artifact(path) if (path / CHECKPOINT_MANIFEST).is_file() else None
    identity = "" if made is None else made.manifest.subject
    subject = reader.open(path.resolve(), workspace.plugins, cache=workspace.cache, identity=identity)
    require_agreement(path, workspace.plugins.every("families"))
    if made is None:
        here = Input(subject.model.id, str(path.resolve()))
        return Opened(subject, {"model": here, "checkpoint": here})
    return Opened(subject, {"model": made.manifest.inputs["model"], "checkpoint": workspace.named(made)}, made)


def open_alone(source: str, workspace: Workspace) -> Opened | None:
    """Open a checkpoint of qtool's whose model is not at hand, as that of what was another tool's never is.

    Returns:
        It, with a model that has its tokenizer and is not to be executed; None for anything else.
    """
    if not (Path(source) / CHECKPOINT_MANIFEST).is_file():
        return None
    artifact, found = open_artifact(Path(source)), packed_reader(source, workspace)
    model = workspace.model(source) if found is None else open_checkpoint(source, found[1], workspace).model
    inputs = {"model": artifact.manifest.inputs["model"], "checkpoint": workspace.named(artifact)}
    return Opened(Subject(model, workspace.plugins), inputs, artifact)
