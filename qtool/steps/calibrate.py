"""calibrate: one pass over text, block by block, gathering statistics of every site's input.

What is gathered of gradients comes from a pass of its own, forth and back, before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qtool.artifacts.manifest import Manifest, Step, require_kind
from qtool.artifacts.store import Artifact, ArtifactWriter
from qtool.engine.experts import Mode
from qtool.engine.gather import (
    AnyStatistic,
    Gathering,
    GradientStatistic,
    GuidedStatistic,
    PairedStatistic,
    Statistic,
)
from qtool.engine.gradients import BackwardPass
from qtool.engine.network import Network
from qtool.engine.saliency import Saliencies
from qtool.engine.stream import Gathered, Stream, default_batch
from qtool.errors import UsageError
from qtool.model.graph import ModelGraph
from qtool.model.text import token_digest
from qtool.numerics.token_weights import TokenWeight, parse_token_weight
from qtool.steps.subjects import Opened, compute_dtype, dtype_name, open_subject
from qtool.steps.text import calibration_text, text_name
from qtool.steps.token_weights import GRADIENT, check_gradients, token_weight_of
from qtool.steps.workspace import Workspace, measured

WINDOWS = "windows"
EXPERT_TOKENS = "experts.tokens"
"""Name, behind the layer, of how many tokens of the text each expert was sent."""
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
        token_weight: Rule for the weight of a token in the Hessian. Transforms want ``uniform``: tokens with massive
            activations are few, and what mixes channels must know of them.
        sample_size: Token rows that a sample keeps.
        experts: Which tokens an expert's statistics are of: ``all`` of them, or those ``routed`` to it; empty means
            ``all``, and is the only choice for a model without experts.
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
    token_weight: str = "uniform"
    sample_size: int = 2048
    experts: str = ""
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
    loaded: dict[str, Statistic | GradientStatistic] = {
        name: workspace.plugins.load("statistics", name) for name in request.gather
    }
    _refuse_later(loaded)
    parse_token_weight(request.token_weight)
    opened = open_subject(request.source, workspace)
    weight = token_weight_of(request.token_weight, opened.model.graph)
    if opened.artifact is not None:
        require_kind(opened.artifact.manifest, "plan", "quantized", "statistics", path=request.source)
    experts = experts_mode(request.experts, opened.model.graph, weight)
    windows, source = calibration_text(
        request.data,
        opened.model,
        workspace,
        num_samples=request.num_samples,
        seq_len=request.seq_len,
        seed=request.seed,
    )
    gradients = {name: one for name, one in loaded.items() if isinstance(one, GradientStatistic)}
    statistics: dict[str, Statistic] = {n: one for n, one in loaded.items() if not isinstance(one, GradientStatistic)}
    check_gradients(gradients, opened, weight, request.seq_len)
    dtype = compute_dtype(request.dtype, opened.model)
    gathering = Gathering(windows.numel(), weight, request.seed, request.sample_size, windows.shape[1])
    manifest = _manifest(request, opened, loaded, _text_details(request, windows, source), dtype, experts)
    path = workspace.output(manifest, request.output)
    if (done := ArtifactWriter.finished(path, manifest.key)) is not None:
        return done, True
    about: dict[str, object] = {}
    writer = ArtifactWriter(path, manifest)
    with writer.working():
        with measured(about, workspace.device):
            layers = range(opened.model.graph.dims.num_layers)
            back = [layer for layer in layers if gradients and not writer.has(f"gradients-{layer}")]
            missing = [layer for layer in layers if statistics and not writer.has(f"layer-{layer}")]
            if back or missing:
                network = Network(opened.subject, device=workspace.device, dtype=dtype, observed=experts or "all")
                batch = request.batch or default_batch(workspace.device, request.seq_len)
            if back:
                way = BackwardPass(network, windows, batch=batch, spill=writer.parts, first=back[0])
                _gather_gradients(way, back, gradients, gathering, writer, workspace)
                del way
            if missing:
                stream = Stream(network, windows, batch=batch, spill=writer.parts)
                _gather(stream, missing, statistics, _weighed(gathering, opened.model.graph, writer), writer, workspace)
            writer.add(WINDOWS, {WINDOWS: windows.to(torch.int32)})
        return writer.finish(replace(manifest, about=about)), False


def _refuse_later(statistics: Mapping[str, object]) -> None:
    """Refuse statistics of both streams, of which there is only one before anything is quantized, and guided ones."""
    for name, one in statistics.items():
        if not isinstance(one, PairedStatistic | GuidedStatistic):
            continue
        does = "compares with full precision" if isinstance(one, PairedStatistic) else "weighs inputs by saliency"
        raise UsageError(
            f"`{name}` {does}: mitigate gathers it for the methods that need it",
            hint=f"--gather {','.join(EVERYTHING)}",
        )


def experts_mode(given: str, graph: ModelGraph, weight: TokenWeight) -> Mode | Literal[""]:
    """Return which tokens observers inside experts see, empty for a model without experts.

    Args:
        given: The user's choice, empty for the default.
        graph: The model.
        weight: The weight of a token.

    Raises:
        UsageError: There is no such mode, the model has no experts, or the weights need whole windows.
    """
    if given not in ("", *get_args(Mode)):
        raise UsageError(
            f"no statistics of experts are `{given}`",
            facts=(("known", ", ".join(get_args(Mode))),),
            hint="--experts routed",
        )
    if not any(graph.dims.sparse):
        if given:
            raise UsageError(f"models of the family `{graph.family.name}` like this one have no experts to choose for")
        return ""
    if given == "routed" and "clip" in weight.rules:
        raise UsageError(
            "`clip` measures a token by its window, and a router sends no whole windows",
            hint="--token-weight inverse-norm, or --experts all",
        )
    return "routed" if given == "routed" else "all"


def _gather_gradients(
    way: BackwardPass,
    missing: list[int],
    statistics: Mapping[str, GradientStatistic],
    gathering: Gathering,
    writer: ArtifactWriter,
    workspace: Workspace,
) -> None:
    """Go forth through all blocks, and back as far as blocks are missing, and keep what was found there as parts."""
    layers = range(way.network.subject.model.graph.dims.num_layers)
    way.forward(workspace.progress(layers, total=len(layers), label="forward"))
    behind = range(len(layers) - 1, missing[0] - 1, -1)
    for layer in workspace.progress(behind, total=len(behind), label="backward"):
        found = way.gather(layer, statistics, gathering)
        if layer in missing:
            writer.add(f"gradients-{layer}", found)


def _weighed(gathering: Gathering, graph: ModelGraph, writer: ArtifactWriter) -> Gathering:
    """Return what accumulators are told, with the saliency of the parts where tokens are weighed by it."""
    if GRADIENT not in gathering.token_weight.rules:
        return gathering

    def read(name: str) -> Tensor:
        return writer.part(f"gradients-{name.split('.')[1]}")[0][name]

    return replace(gathering, saliencies=Saliencies(graph, read))


def _gather(
    stream: Stream,
    missing: list[int],
    statistics: dict[str, Statistic],
    gathering: Gathering,
    writer: ArtifactWriter,
    workspace: Workspace,
) -> None:
    """Run the blocks one after the other and keep what the observers saw in the missing ones as parts."""
    network, last = stream.network, missing[-1]
    graph = network.subject.model.graph
    for layer in workspace.progress(range(last + 1), total=last + 1, label="calibrate"):
        network.load(layer)
        if layer in missing:
            # No name is given to what was gathered: it must be gone before the next block is gathered.
            writer.add(
                f"layer-{layer}",
                _named(layer, stream.gather(layer, graph.readers_of(layer), statistics, gathering, keep=layer < last)),
            )
        else:
            stream.run(layer, keep=layer < last)
        network.drop(layer)


def _named(layer: int, found: Gathered) -> dict[str, Tensor]:
    """Return what was gathered in a block by the names in the artifact."""
    tensors = {f"layers.{layer}.{s}.{e}": t for s, stats in found.statistics.items() for e, t in stats.entries.items()}
    if found.tokens is not None:
        tensors[f"layers.{layer}.{EXPERT_TOKENS}"] = found.tokens
    return tensors


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
    statistics: Mapping[str, AnyStatistic],
    text: dict[str, Any],
    dtype: torch.dtype,
    experts: str,
) -> Manifest:
    config = {
        "gather": {name: statistic.version for name, statistic in sorted(statistics.items())},
        "token_weight": str(parse_token_weight(request.token_weight)),
        "sample_size": request.sample_size,
        "dtype": dtype_name(dtype),
        "tokens_digest": text["tokens_digest"],
        "shape": [request.num_samples, request.seq_len],
        "seed": request.seed,
        **({"experts": experts} if experts else {}),
    }
    return Manifest(
        kind="statistics",
        step=Step("calibrate", "", 1, "qtool", config),  # a text's name is no part of the key; `details` has it
        inputs=opened.inputs,
        subject=opened.model.id,
        family=opened.model.family.name,
        details=text,
    )
