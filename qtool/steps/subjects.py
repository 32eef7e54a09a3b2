"""From what a user names to what is executed: a model, statistics, a plan or a quantized artifact as a ``Subject``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qtool.artifacts.manifest import Input
from qtool.artifacts.store import CHECKPOINT_MANIFEST, Artifact, open_artifact
from qtool.engine.subject import Subject
from qtool.errors import UsageError
from qtool.model.completeness import require_complete
from qtool.model.plan import Plan
from qtool.model.source import Model
from qtool.scheme import ModelScheme
from qtool.steps.workspace import Workspace

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Opened:
    """What a reference turned out to be.

    Attributes:
        subject: What is executed.
        inputs: The artifacts and the model that a step made from it must name, by role.
        artifact: The artifact itself, or None for a model.
    """

    subject: Subject
    inputs: dict[str, Input]
    artifact: Artifact | None = None

    @property
    def model(self) -> Model:
        """The original model."""
        return self.subject.model


def is_artifact(reference: str) -> bool:
    """Say whether a reference names what a qtool step writes (even if it is not there), rather than a model."""
    path = Path(reference)
    return path.suffix == ".safetensors" or (path / CHECKPOINT_MANIFEST).is_file()


def open_subject(reference: str, workspace: Workspace) -> Opened:
    """Open whatever a user may name as something to execute.

    Args:
        reference: A model (folder, GGUF, name, hub id), or the path of statistics (their model is meant), of a plan
            or of a quantized artifact.
        workspace: Where things are found.

    Raises:
        ArtifactError: The artifact is damaged, or what it was made from cannot be found.
        ModelError: There is no such model, or its files are not what its config promises.
    """
    if not reference:
        raise UsageError("an empty path was given", hint="the command before this one failed; look at its message")
    if not is_artifact(reference):
        model = workspace.model(reference)
        require_complete(model)
        if model.float8 is not None:
            rows, columns = model.float8
            workspace.warn(
                f"float8 weights with a scale for each {rows} by {columns} are decoded: no step keeps their codes"
            )
        return Opened(Subject(model, workspace.plugins), {"model": Input(model.id, str(model.path))})
    artifact = open_artifact(Path(reference))
    model = workspace.model_of(artifact)
    kind = artifact.manifest.kind
    inputs = {"model": Input(model.id, str(model.path)), kind: workspace.named(artifact)}
    if kind == "quantized":
        plan_role = "plan" in artifact.manifest.inputs
        plan = read_plan(workspace.input_of(artifact, "plan")) if plan_role else Plan()
        scheme = ModelScheme.from_json(artifact.manifest.schemes)
        return Opened(Subject(model, workspace.plugins, plan, scheme, artifact), inputs, artifact)
    if kind == "plan":
        return Opened(Subject(model, workspace.plugins, read_plan(artifact)), inputs, artifact)
    return Opened(Subject(model, workspace.plugins), inputs, artifact)


def read_plan(artifact: Artifact) -> Plan:
    """Read the operators of a plan artifact."""
    tensors = {name: artifact.tensor(name) for name in artifact.names("sites/")}
    return Plan.from_state(tensors, artifact.manifest.details)


def compute_dtype(name: str, model: Model) -> torch.dtype:
    """Return the dtype to compute in: the one named, or with ``auto`` the one that the weights are stored in.

    Raises:
        UsageError: No such dtype.
    """
    if name == "auto":
        return model.dtype
    if name not in DTYPES:
        raise UsageError(
            f"unknown dtype `{name}`", facts=(("known", f"auto, {', '.join(DTYPES)}"),), hint="--dtype auto"
        )
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that ``compute_dtype`` reads."""
    return str(dtype).removeprefix("torch.")
