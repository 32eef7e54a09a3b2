"""verify: an artifact against the digests in its manifest, and a plan's model against the original one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qtool.artifacts.identity import digest_file
from qtool.artifacts.store import Artifact, open_artifact
from qtool.engine.execute import BlockExecutable
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, NumericalError, UsageError
from qtool.steps.subjects import Opened, is_artifact, open_subject
from qtool.steps.text import check_seq_len
from qtool.steps.workspace import Workspace


@dataclass(frozen=True)
class VerifyRequest:
    """What to verify, and on how much a plan is tried.

    Attributes:
        source: An artifact.
        windows: Windows of random tokens.
        seq_len: Tokens to a window.
        seed: Seeds the tokens.
        tolerance: Largest difference that a plan may make to a logit, computed in float32.
    """

    source: str
    windows: int = 4
    seq_len: int = 128
    seed: int = 0
    tolerance: float = 1e-3


def verify(request: VerifyRequest, workspace: Workspace) -> tuple[Artifact, dict[str, float]]:
    """Verify an artifact.

    Returns:
        The artifact, and what was measured: for a plan the differences of logits, otherwise nothing.

    Raises:
        UsageError: The source is a model.
        ArtifactError: A tensor, or a file of a checkpoint, differs from its digest.
        NumericalError: The plan changes what the model computes by more than the tolerance.
    """
    if not is_artifact(request.source):
        raise UsageError(
            f"`{request.source}` is no artifact, so it has no digests", hint=f"qtool inspect --strict {request.source}"
        )
    artifact = open_artifact(Path(request.source))
    if artifact.manifest.kind == "checkpoint":
        verify_files(artifact)
    else:
        artifact.verify()
    if artifact.manifest.kind != "plan":
        return artifact, {}
    measured = logit_differences(open_subject(request.source, workspace), request, workspace)
    largest = measured["max_logit_difference"]
    if not largest <= request.tolerance:
        raise NumericalError(
            "the plan changes what the model computes",
            facts=(("largest difference allowed", request.tolerance), *measured.items()),
            hint=f"qtool inspect {request.source}",
        )
    return artifact, measured


def verify_files(checkpoint: Artifact) -> None:
    """Compare every file of a checkpoint with the digest in its manifest; files that were added do not matter.

    Raises:
        ArtifactError: A file is missing or differs; names it.
    """
    for name, digest in checkpoint.manifest.tensors.items():
        file = checkpoint.path / name
        if not file.is_file() or digest_file(file) != digest:
            raise ArtifactError(
                f"`{name}` of `{checkpoint.path}` {'was changed' if file.is_file() else 'is missing'}",
                hint="make the checkpoint again with qtool pack --force",
            )


def logit_differences(opened: Opened, request: VerifyRequest, workspace: Workspace) -> dict[str, float]:
    """Run the original and the transformed model in float32 on random tokens.

    Returns:
        ``max_logit_difference`` and ``mean_logit_difference`` over all positions and tokens of the vocabulary, and
        ``max_logit``, the largest magnitude of an original logit.
    """
    model = opened.model
    check_seq_len(request.seq_len, model)
    generator = torch.Generator().manual_seed(request.seed)
    windows = torch.randint(model.graph.dims.vocab, (request.windows, request.seq_len), generator=generator)

    def executable(subject: Subject) -> BlockExecutable:
        return BlockExecutable(
            subject,
            device=workspace.device,
            dtype=torch.float32,
            batch=1,
            shown=lambda layers, total: workspace.progress(layers, total=total, label="verify"),
        )

    runs = [executable(one).forward_windows(windows) for one in (Subject(model, workspace.plugins), opened.subject)]
    largest, total, count, scale = 0.0, 0.0, 0, 0.0
    for (_, original), (_, transformed) in zip(*runs, strict=True):
        difference = (transformed.double() - original.double()).abs()
        # A NaN must not vanish in a maximum.
        largest = max(largest, float(difference.amax())) if difference.isfinite().all() else float("nan")
        total, count = total + float(difference.sum()), count + difference.numel()
        scale = max(scale, float(original.abs().amax()))
    return {"max_logit_difference": largest, "mean_logit_difference": total / count, "max_logit": scale}
