"""calibrate: one pass over text, block by block, gathering statistics of every site's input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from qtool.artifacts.manifest import Manifest, Step, require_kind
from qtool.artifacts.store import Artifact, ArtifactWriter
from qtool.engine.gather import Gathering, Statistic, observing
from qtool.engine.network import Network
from qtool.engine.stream import Stream, default_batch
from qtool.model.text import token_digest
from qtool.numerics.token_weights import parse_token_weight
from qtool.steps.subjects import Opened, compute_dtype, dtype_name, open_subject
from qtool.steps.text import calibration_text, text_name
from qtool.steps.workspace import Workspace, measured

WINDOWS = "windows"
EVERYTHING = ("hessian", "absmax", "min", "max", "mean", "mean_abs", "sample")


@dataclass(frozen=True)
class CalibrateRequest:
    """What to gather, and on which text.

    Attributes:
        source: A model, or a plan (statistics of the transformed model).
        data: Name of a dataset, or a text file.
        num_samples: Windows.
        seq_len: Tokens to a window.
        seed: Seeds the windows and the sample.
        gather: Names of statistics; empty gathers none and only fixes the text.
        token_weight: Rule for the weight of a token in the Hessian.
        sample_size: Token rows that a sample keeps.
        dtype: What to compute in, ``auto`` for the model's own.
        batch: Windows that run at once; 0 for a default.
        output: Where the artifact goes; None for a name that follows from the key.
    """

    source: str
    data: str = "wikitext2"
    num_samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    gather: tuple[str, ...] = EVERYTHING
    token_weight: str = "inverse-norm"
    sample_size: int = 2048
    dtype: str = "auto"
    batch: int = 0
    output: Path | None = None


def calibrate(request: CalibrateRequest, workspace: Workspace) -> tuple[Artifact, bool]:
    """Gather statistics.

    Returns:
        The statistics artifact, and whether it was there already.

    Raises:
        UsageError: An option does not fit.
        DataError: The text cannot be read or is too short.
        NumericalError: Weights or activations are not finite.
    """
    statistics: dict[str, Statistic] = {name: workspace.plugins.load("statistics", name) for name in request.gather}
    weight = parse_token_weight(request.token_weight)
    opened = open_subject(request.source, workspace)
    if opened.artifact is not None:
        require_kind(opened.artifact.manifest, "plan", "quantized", "statistics", path=request.source)
    windows, source = calibration_text(
        request.data,
        opened.model,
        workspace,
        num_samples=request.num_samples,
        seq_len=request.seq_len,
        seed=request.seed,
    )
    dtype = compute_dtype(request.dtype, opened.model)
    gathering = Gathering(windows.numel(), weight, request.seed, request.sample_size, windows.shape[1])
    manifest = _manifest(request, opened, statistics, _text_details(request, windows, source), dtype)
    path = workspace.output(manifest, request.output)
    if (done := ArtifactWriter.finished(path, manifest.key)) is not None:
        return done, True
    about: dict[str, object] = {}
    with measured(about, workspace.device):
        writer = ArtifactWriter(path, manifest)
        writer.begin()
        network = Network(opened.subject, device=workspace.device, dtype=dtype)
        batch = request.batch or default_batch(workspace.device, request.seq_len)
        _gather(network, windows, statistics, gathering, writer, workspace, batch)
        writer.add(WINDOWS, {WINDOWS: windows.to(torch.int32)})
    return writer.finish(replace(manifest, about=about)), False


def _gather(
    network: Network,
    windows: Int64[Tensor, "samples seq"],
    statistics: dict[str, Statistic],
    gathering: Gathering,
    writer: ArtifactWriter,
    workspace: Workspace,
    batch: int,
) -> None:
    """Run the blocks one after the other and keep what the observers saw as parts."""
    layers = range(network.subject.model.graph.dims.num_layers) if statistics else range(0)
    missing = [layer for layer in layers if not writer.has(f"layer-{layer}")]
    if not missing:
        return
    stream = Stream(network, windows, batch=batch, spill=writer.parts)
    for layer in workspace.progress(range(missing[-1] + 1), total=missing[-1] + 1, label="calibrate"):
        network.load(layer)
        wanted = dict.fromkeys(network.sites[layer], statistics) if layer in missing else {}
        with observing(network.sites[layer], layer, wanted, gathering) as observers:
            stream.run(layer, keep=True)
        if layer in missing:
            found = {site: observer.result() for site, observer in observers.items()}
            tensors = {f"layers.{layer}.{s}.{e}": t for s, stats in found.items() for e, t in stats.entries.items()}
            writer.add(f"layer-{layer}", tensors)
        network.drop(layer)


def _text_details(request: CalibrateRequest, windows: Tensor, source: str) -> dict[str, Any]:
    return {
        "data": text_name(request.data),
        "source": source,
        "tokens_digest": token_digest(windows),
        "num_samples": request.num_samples,
        "seq_len": request.seq_len,
        "seed": request.seed,
        "tokens": windows.numel(),
    }


def _manifest(
    request: CalibrateRequest,
    opened: Opened,
    statistics: dict[str, Statistic],
    text: dict[str, Any],
    dtype: torch.dtype,
) -> Manifest:
    config = {
        "gather": {name: statistic.version for name, statistic in sorted(statistics.items())},
        "token_weight": str(parse_token_weight(request.token_weight)),
        "sample_size": request.sample_size,
        "dtype": dtype_name(dtype),
        "tokens_digest": text["tokens_digest"],
        "shape": [request.num_samples, request.seq_len],
        "seed": request.seed,
    }
    return Manifest(
        kind="statistics",
        step=Step("calibrate", text["data"].split(".")[0], 1, "qtool", config),
        inputs=opened.inputs,
        subject=opened.model.id,
        family=opened.model.family.name,
        details=text,
    )
