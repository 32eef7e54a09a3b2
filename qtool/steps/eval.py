"""eval: measure a model, a plan, a quantized artifact or a checkpoint, and keep every window's and item's value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from qtool.artifacts.identity import digest_file, digest_json
from qtool.artifacts.manifest import Manifest, Step, require_kind
from qtool.artifacts.store import Artifact, ArtifactWriter
from qtool.engine.execute import BlockExecutable, LoadedExecutable
from qtool.engine.exporter import UNREADABLE
from qtool.engine.metric import Evaluation, Executable
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, GateError, NumericalError, QtoolError, UsageError
from qtool.model.text import token_digest
from qtool.scheme import ModelScheme
from qtool.steps.gates import Gate, read_gate
from qtool.steps.labels import labels_of
from qtool.steps.measurement import EMULATED
from qtool.steps.packed import open_alone, open_checkpoint, packed_reader
from qtool.steps.storage import STORAGE, cache_bits, storage_of, stored_bits
from qtool.steps.subjects import Opened, compute_dtype, dtype_name, open_subject
from qtool.steps.text import evaluation_text, text_name
from qtool.steps.workspace import Workspace, measured


@dataclass(frozen=True)
class EvalRequest:
    """What to measure, on what.

    Attributes:
        source: A model, a plan, a quantized artifact or a checkpoint directory.
        perplexity: Texts: dataset names or files.
        seq_len: Tokens to a window.
        max_windows: Only the first windows of each text; None for all.
        kl: Also measure the divergence from the full-precision model.
        tasks: lm-eval tasks.
        limit: Only the first items of each task; recorded.
        task_data: Folder with the tasks' data, where no hub can be reached.
        require: Bounds such as ``perplexity/wikitext2<=22``.
        dtype: What to compute in, ``auto`` for the model's own.
        batch: Windows that run at once; 0 for a default.
        output: Where the artifact goes; None for a name that follows from the key.
    """

    source: str
    perplexity: tuple[str, ...] = ()
    seq_len: int = 2048
    max_windows: int | None = None
    kl: bool = False
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    task_data: Path | None = None
    require: tuple[str, ...] = ()
    dtype: str = "auto"
    batch: int = 0
    output: Path | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


def evaluate(request: EvalRequest, workspace: Workspace) -> tuple[Artifact, bool]:
    """Measure.

    Returns:
        The metrics artifact, and whether it was there already.

    Raises:
        UsageError: Nothing was asked for, or an unknown text, task or gate.
        NumericalError: A measured value is not finite.
        GateError: A gate is not met; the artifact is written all the same.
    """
    if not request.perplexity and not request.tasks:
        raise UsageError("there is nothing to measure", hint="--perplexity wikitext2, or --tasks arc_easy,piqa")
    gates = _gates(request)
    opened = _open(request, workspace)
    turned = None if opened.artifact is None else _with_rotations(opened.artifact, workspace)
    if opened.artifact is not None:
        if turned is None:
            _refuse_unreadable(opened.artifact)
        require_kind(opened.artifact.manifest, "quantized", "plan", "checkpoint", "statistics", path=request.source)
    seq_len, most = request.seq_len, request.max_windows
    windows = {
        name: evaluation_text(data, opened.model, workspace, seq_len=seq_len, max_windows=most)
        for name, data in _texts(request).items()
    }
    dtype = compute_dtype(request.dtype, opened.model)
    manifest = _manifest(request, opened, windows, dtype, workspace, turned)
    path = workspace.output(manifest, request.output)
    done = ArtifactWriter.finished(path, manifest.key)
    if done is None:
        of_texts = {data: rows for data, (rows, _) in windows.items()}
        artifact = _measure(request, opened, of_texts, dtype, manifest, path, workspace, turned)
    else:
        artifact = done
    _check(gates, artifact)
    return artifact, done is not None


def _measure(
    request: EvalRequest,
    opened: Opened,
    windows: Mapping[str, Int64[Tensor, "windows tokens"]],
    dtype: torch.dtype,
    manifest: Manifest,
    path: Path,
    workspace: Workspace,
    turned: Subject | None,
) -> Artifact:
    """Run the metrics and write the artifact."""

    def shown(layers: Iterable[int], total: int) -> Iterable[int]:
        return workspace.progress(layers, total=total, label="eval")

    loaded = opened.artifact is not None and opened.artifact.manifest.kind == "checkpoint" and turned is None
    checkpoint = opened.artifact if loaded else None
    batch = request.batch if checkpoint is None else _batch_of(checkpoint, request.batch)

    def blocks(subject: Subject) -> BlockExecutable:
        return BlockExecutable(subject, device=workspace.device, dtype=dtype, batch=batch, shown=shown)

    subject: Executable = blocks(opened.subject if turned is None else turned)
    if checkpoint is not None:
        subject = LoadedExecutable(checkpoint.path, device=workspace.device, batch=batch)
    about: dict[str, object] = {}
    values: dict[str, float] = {}
    tensors: dict[str, Tensor] = {}
    details: dict[str, Any] = {}
    with measured(about, workspace.device):
        for name, options in _wanted(request).items():
            evaluation = Evaluation(
                subject,
                lambda: blocks(Subject(opened.model, workspace.plugins)),
                windows.__getitem__,
                opened.model.tokenizer(),
                options,
            )
            found = workspace.plugins.load("metrics", name).measure(evaluation)
            values |= found.values
            tensors |= found.tensors
            details |= {name: found.details} if found.details else {}
    for name, value in values.items():
        if value != value or abs(value) == float("inf"):
            raise NumericalError(f"`{name}` is not finite", hint="--dtype float32")
    final = replace(manifest, details={**manifest.details, "values": values, "metrics": details}, about=about)
    writer = ArtifactWriter(path, manifest)
    with writer.working():
        writer.add("metrics", tensors)
        return writer.finish(final)


def _open(request: EvalRequest, workspace: Workspace) -> Opened:
    """Open what is measured; a checkpoint whose model is not at hand by itself, where nothing is compared with that."""
    try:
        return open_subject(request.source, workspace)
    except ArtifactError as error:
        try:
            alone = None if request.kl else open_alone(request.source, workspace)
        except QtoolError:  # nor is it read by itself: what is missing tells more
            raise error from None
        if alone is None:
            raise
        workspace.warn(f"the model behind `{Path(request.source).name}` is not at hand: its own tokenizer is taken")
        return alone


def _with_rotations(artifact: Artifact, workspace: Workspace) -> Subject | None:
    """Open a checkpoint whose online rotations transformers leaves out, to be run from its codes; or return None."""
    manifest = artifact.manifest
    if manifest.kind != "checkpoint" or not _loaded(artifact).startswith(UNREADABLE):
        return None
    if "transformers" not in manifest.details["consumers"]:  # which is not meant to load a GGUF file's folder
        return None
    method, reader = packed_reader(str(artifact.path), workspace) or ("", None)
    if reader is None or method != manifest.step.method:
        return None
    subject = open_checkpoint(str(artifact.path), reader, workspace).subject
    return None if subject.plan.empty else subject


def _loaded(checkpoint: Artifact) -> str:
    """Return what transformers makes of a checkpoint, in words."""
    return str(checkpoint.manifest.details["consumers"].get("transformers", UNREADABLE))


def _refuse_unreadable(artifact: Artifact) -> None:
    """Refuse a checkpoint that transformers, which is what it would be measured with, does not load as it is."""
    if artifact.manifest.kind != "checkpoint":
        return
    text = _loaded(artifact)
    if text.startswith(UNREADABLE):
        whole = next(artifact.path.glob("*.gguf"), None)
        raise UsageError(
            "this checkpoint cannot be measured, since transformers does not read it",
            facts=(("transformers", text),),
            hint="measure the quantized artifact that it was packed from" + (f", or {whole}" if whole else ""),
        )


def _batch_of(checkpoint: Artifact, asked: int) -> int:
    """Return how many windows a consumer may run at once: one where it takes a scale over all that it is given."""
    scheme = ModelScheme.from_json(checkpoint.manifest.schemes)
    parts = (one for name in ("activations", "outputs", "kv") for one in scheme.every(name))
    shared = any(part.strategy == "tensor" for part in parts)
    return 1 if shared else asked


def _texts(request: EvalRequest) -> dict[str, str]:
    """Return the texts by the names under which they are measured, so that no folder is part of an identity.

    Raises:
        UsageError: Two files have one name.
    """
    texts: dict[str, str] = {}
    for data in request.perplexity:
        if texts.setdefault(text_name(data), data) != data:
            raise UsageError(
                f"two texts are called `{text_name(data)}`",
                facts=(("one", texts[text_name(data)]), ("two", data)),
                hint="measure them one after the other, or rename a file",
            )
    return texts


def _gates(request: EvalRequest) -> list[Gate]:
    """Read the gates, and refuse one on a text that is not measured before any work.

    Raises:
        UsageError: One cannot be read, or can never be met.
    """
    gates, texts = [read_gate(text) for text in request.require], _texts(request)
    for gate in gates:
        if not request.tasks and gate.metric.partition("/")[2] not in texts:
            raise UsageError(
                f"`--require {gate}` names a metric that is not measured", facts=(("texts", ", ".join(texts)),)
            )
    return gates


def _wanted(request: EvalRequest) -> dict[str, dict[str, Any]]:
    """Return the metrics that are asked for with their options."""
    wanted: dict[str, dict[str, Any]] = {}
    if request.perplexity:
        wanted["perplexity"] = {"data": tuple(_texts(request)), "kl": request.kl}
    if request.tasks:
        wanted["tasks"] = {"tasks": request.tasks, "limit": request.limit, "task_data": request.task_data}
    return wanted


def _manifest(
    request: EvalRequest,
    opened: Opened,
    windows: Mapping[str, tuple[Tensor, str]],
    dtype: torch.dtype,
    workspace: Workspace,
    turned: Subject | None,
) -> Manifest:
    texts = {data: {"tokens_digest": token_digest(rows), "windows": len(rows)} for data, (rows, _) in windows.items()}
    config = {
        "texts": texts,
        "seq_len": request.seq_len,
        "kl": request.kl,
        "tasks": list(request.tasks),
        "limit": request.limit,
        "task_data": _task_data_digest(request),
        "dtype": dtype_name(dtype),
        "metrics": {name: workspace.plugins.load("metrics", name).version for name in _wanted(request)},
    }
    storage, scheme = storage_of(opened), opened.subject.scheme
    labels = labels_of(opened, workspace)
    if turned is not None:
        labels["executed"] = f"{EMULATED[0]}: {turned.scheme}, from the codes of the checkpoint"
    details = {
        "labels": {**labels, **request.labels},
        "bits": stored_bits(opened),
        **({} if storage is None else {STORAGE: storage.to_json()}),
        **({} if scheme.kv is None else {"cache_bits": cache_bits(scheme, opened.model, workspace.plugins)}),
        "sources": {data: source for data, (_, source) in windows.items()},
    }
    kind = opened.artifact.manifest.kind if opened.artifact is not None else "model"
    return Manifest(
        kind="metrics",
        step=Step("eval", kind, 1, "qtool", config),
        inputs=opened.inputs,
        subject=opened.model.id,
        family=opened.model.family.name,
        schemes=opened.artifact.manifest.schemes if opened.artifact is not None else {},
        details=details,
    )


def _task_data_digest(request: EvalRequest) -> str:
    """Return a digest of what tasks are read from and by, so that other data or another harness is another key."""
    if not request.tasks:
        return ""
    from importlib.metadata import PackageNotFoundError, version

    try:
        harness = version("lm_eval")
    except PackageNotFoundError:
        harness = ""
    folder = request.task_data
    files = sorted(folder.rglob("*.jsonl*")) if folder is not None else []
    listed = {str(file.relative_to(folder)): digest_file(file) for file in files if folder is not None}
    return digest_json({"harness": harness, "files": listed})


def _check(gates: list[Gate], artifact: Artifact) -> None:
    """Compare the measured values with the gates."""
    values = artifact.manifest.details["values"]
    missed = [gate for gate in gates if not gate.met(values)]
    if missed:
        raise GateError(
            f"{len(missed)} of {len(gates)} gates are not met",
            facts=(
                *((f"required {gate}", f"measured {values[gate.metric]:.6g}") for gate in missed),
                ("metrics", artifact.path),
            ),
        )
