"""inspect --plot: a picture of how large activations are, before a plan and behind it, or of what a method lost."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qtool.artifacts.manifest import require_kind
from qtool.artifacts.store import Artifact, open_artifact
from qtool.engine.carry import CarriedStatistics
from qtool.errors import ArtifactError, UsageError
from qtool.model.card import read_card
from qtool.model.plan import Plan
from qtool.model.source import Model
from qtool.model.statistics import SAMPLE
from qtool.steps.description import Cell, Description, Table
from qtool.steps.magnitudes import GRID, SiteMagnitudes, magnitudes
from qtool.steps.picture_file import needs_matplotlib, picture_suffix, write_picture
from qtool.steps.plot_losses import plot_losses
from qtool.steps.subjects import is_artifact, open_subject, read_plan
from qtool.steps.transform import gathered_behind
from qtool.steps.workspace import Workspace


@dataclass(frozen=True)
class PlotRequest:
    """What to draw.

    Attributes:
        source: Statistics with samples, or a quantized artifact, of which nothing more is to be said.
        output: The picture; its suffix says which kind.
        plan: A plan of the same model; empty for a picture of what was gathered.
        sites: Input sites such as ``layers.3.mlp_in``, a row each; empty for the one with the largest magnitude.
    """

    source: str
    output: Path
    plan: str = ""
    sites: tuple[str, ...] = ()


def plot(request: PlotRequest, workspace: Workspace) -> Description:
    """Draw activations by token and channel, and kurtosis and largest magnitude over layers; or losses over layers.

    What lies behind the plan is carried there, without a forward pass.

    Returns:
        The picture's path, and the numbers of its bars or lines.

    Raises:
        UsageError: Another kind of picture, no such site, or a plan in place of statistics.
        ArtifactError: The statistics have no sample, or the plan is of another model.
        PluginError: matplotlib is not installed.
        ResourceError: The folder of the picture is missing, or the disk is full.
    """
    suffix = picture_suffix(request.output)
    if (quantized := _quantized(request)) is not None:
        return plot_losses(quantized, request.output, suffix)
    try:
        from qtool.steps.picture import render
    except ImportError as error:
        raise needs_matplotlib(error) from error
    statistics = _statistics(request)
    opened = open_subject(request.source, workspace)
    plans = {"before": Plan()} | _after(request, statistics)
    sites = _sites(request.sites, statistics, opened.model)
    found = [magnitudes(statistics, opened.model, plans, site_id) for site_id in sites]
    named = ", ".join(sites) if len(sites) < 3 else f"{len(sites)} sites"
    title = f"{read_card(opened.model.path).name}: inputs of {named}"
    write_picture(request.output, render(found, title, _note(found, statistics), suffix=suffix))
    facts: dict[str, Cell] = {
        "path": str(request.output.resolve()),
        "kind": suffix,
        "statistics": statistics.manifest.id,
        "plan": open_artifact(Path(request.plan)).manifest.id if request.plan else None,
    }
    return Description(facts, {"sites": _table(found)})


def _quantized(request: PlotRequest) -> Artifact | None:
    """Open the source if it is quantized.

    Raises:
        UsageError: It is, and a plan or sites were given as well.
    """
    artifact = open_artifact(Path(request.source)) if is_artifact(request.source) else None
    if artifact is None or artifact.manifest.kind != "quantized":
        return None
    if request.plan or request.sites:
        given = "--plan" if request.plan else "--site"
        raise UsageError(
            f"`{given}` belongs to pictures of statistics, and `{artifact.path.name}` is quantized",
            hint=f"qtool inspect {request.source} --plot {request.output}",
        )
    return artifact


def _statistics(request: PlotRequest) -> Artifact:
    """Open the statistics.

    Raises:
        UsageError: It is something else.
    """
    if not is_artifact(request.source):
        raise UsageError(
            f"a picture is drawn from statistics or a quantized artifact, and `{request.source}` is a model",
            hint=f"stats=$(qtool calibrate {request.source}); qtool inspect $stats --plot {request.output}",
        )
    artifact = open_artifact(Path(request.source))
    kind, inputs = artifact.manifest.kind, artifact.manifest.inputs
    if kind != "statistics":
        gathered = inputs["statistics"].path if "statistics" in inputs else "STATISTICS"
        plan = f" --plan {request.source}" if kind == "plan" else ""
        raise UsageError(
            f"a picture is drawn from statistics or a quantized artifact, and `{artifact.path.name}` is of the kind "
            f"`{kind}`",
            hint=f"qtool inspect {gathered} --plot {request.output}{plan}",
        )
    return artifact


def _after(request: PlotRequest, statistics: Artifact) -> dict[str, Plan]:
    """Return the stage behind the plan that was asked for.

    Raises:
        ArtifactError: It is no plan, or speaks of another model than the statistics.
        UsageError: The statistics were themselves gathered behind a plan.
    """
    if not request.plan:
        return {}
    artifact = open_artifact(Path(request.plan))
    require_kind(artifact.manifest, "plan", path=request.plan)
    if artifact.manifest.subject != statistics.manifest.subject:
        raise ArtifactError(
            "the plan and the statistics are of different models",
            facts=(
                ("statistics", f"{statistics.path}  subject {statistics.manifest.subject[:12]}"),
                ("plan", f"{artifact.path}  subject {artifact.manifest.subject[:12]}"),
            ),
        )
    if gathered_behind(statistics.manifest) is not None:
        raise UsageError(
            "statistics of a transformed model cannot be carried through a plan",
            facts=(("statistics", statistics.path),),
            hint="calibrate the original model, and give those statistics",
        )
    return {f"after {artifact.manifest.step.method}": read_plan(artifact)}


def _sites(asked: Sequence[str], statistics: Artifact, model: Model) -> tuple[str, ...]:
    """Return the sites to draw, by default the one whose input has the largest magnitude.

    Raises:
        UsageError: There is no such site.
        ArtifactError: There is no sample of any.
    """
    known = tuple(CarriedStatistics(statistics, model, Plan()))
    gathered = [name.removesuffix(f".{SAMPLE}") for name in statistics.names("layers.") if name.endswith(f".{SAMPLE}")]
    for site_id in asked:
        if site_id not in (*known, *gathered):
            near = difflib.get_close_matches(site_id, known, n=1)
            kinds = dict.fromkeys(name.split(".", 2)[2] for name in known)
            raise UsageError(
                f"the statistics know no site `{site_id}`",
                facts=(("sites of a block", ", ".join(kinds)), ("blocks", f"0 to {model.graph.dims.num_layers - 1}")),
                hint=f"did you mean `{near[0]}`?" if near else f"--site {known[0]}",
            )
    if asked:
        return tuple(dict.fromkeys(asked))
    drawable = [site_id for site_id in gathered if site_id in known] or [known[0]]
    return (max(drawable, key=lambda site_id: _largest(site_id, statistics)),)


def _largest(site_id: str, statistics: Artifact) -> float:
    """Return the largest magnitude at a site: of all tokens where it was gathered, otherwise of the sample."""
    names = [f"{site_id}.{entry}" for entry in ("absmax", SAMPLE)]
    found = next((name for name in names if name in statistics.header.slots), None)
    tensor = None if found is None else statistics.tensor(found)
    return 0.0 if tensor is None or not tensor.numel() else float(tensor.abs().max())


def _note(found: Sequence[SiteMagnitudes], statistics: Artifact) -> str:
    """Return what must be said of how the picture was made."""
    tokens = max(one.tokens for one in found)
    note = f"sample of {tokens} tokens of {statistics.manifest.details['data']}"
    if any(one.tokens > GRID[0] or one.channels > GRID[1] for one in found):
        note += "; surfaces show the largest magnitude around each of their points"
    return f"{note}; kurtosis over the channels of a token, mean over tokens"


def _table(found: Sequence[SiteMagnitudes]) -> Table:
    """Return the numbers of the bars."""
    rows: list[tuple[Cell, ...]] = [
        (f"layers.{layer}.{one.name}", stage.name, absmax, kurtosis)
        for one in {one.name: one for one in found}.values()
        for stage in one.stages
        for layer, absmax, kurtosis in zip(one.layers, stage.absmax, stage.kurtosis, strict=True)
    ]
    return Table(("site", "stage", "absmax", "kurtosis"), rows)
