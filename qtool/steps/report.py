"""report: metrics artifacts become a table in which only what is alike is compared."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qtool.artifacts.store import write_atomically
from qtool.errors import UsageError
from qtool.steps.fairness import distinct
from qtool.steps.measurement import Measurement, measurements_of, rank
from qtool.steps.notes import notes_of
from qtool.steps.rendering import RENDERERS
from qtool.steps.table import SPREADS, Layout, arrange
from qtool.steps.workspace import Workspace

BITS = ("linears", "model")
ARTIFACT = ".safetensors"
_REFERENCE = "reference_"


@dataclass(frozen=True)
class ReportRequest:
    """Which metrics, as what table.

    Attributes:
        sources: Metrics artifacts.
        to: ``markdown``, ``latex``, ``csv`` or ``json``.
        rows: Labels that name a row; empty for transform and mitigator, and whatever else tells rows apart.
        columns: Labels that name a group of columns.
        values: Metrics that the cells show; empty for all that every quantized source has.
        error: What follows a value; see ``Layout.spread``.
        bits: Which stored bits per weight to show: ``linears``, ``model``.
        footnotes: Notes to print below the table after its own.
        output: File to write as well; None for none.
    """

    sources: tuple[str, ...]
    to: str = "markdown"
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("scheme",)
    values: tuple[str, ...] = ()
    error: str = "auto"
    bits: tuple[str, ...] = ("linears",)
    footnotes: tuple[str, ...] = ()
    output: Path | None = None


def report(request: ReportRequest, workspace: Workspace) -> str:
    """Make a table.

    Returns:
        Its text, which ends with a newline.

    Raises:
        UsageError: An unknown format, label or metric, a table that would mix what is not alike, or an output that
            would be taken for an artifact.
        ArtifactError: A source is no metrics artifact.
    """
    check(request)
    if request.output is not None and request.output.suffix == ARTIFACT:
        raise UsageError(
            f"`{request.output}` would be an artifact's name, and a report is text",
            hint=f"-o {request.output.with_suffix('.md')}",
        )
    if not request.sources:
        raise UsageError("there is nothing to report", hint="give the paths that qtool eval printed")
    artifacts = [workspace.artifact(source, "metrics") for source in request.sources]
    found = distinct(one for artifact in artifacts for one in measurements_of(artifact))
    metrics = request.values or _shared(found)
    _require(metrics, dict.fromkeys(one.metric for one in found), "metric")
    labels = dict.fromkeys(name for one in found for name in (*one.labels, *one.protocol))
    _require((*request.rows, *request.columns), labels, "label")
    spread = next(one for one in SPREADS if one == request.error)
    table = arrange(found, Layout(request.rows, request.columns, metrics, spread, request.bits))
    text = RENDERERS[request.to](table, (*notes_of(table), *request.footnotes))
    if request.output is not None:
        write_atomically(request.output, text)
    return text


def check(request: ReportRequest) -> None:
    """Refuse, before anything is read, a format, an error or bits that are not known.

    Raises:
        UsageError: One is not.
    """
    _require((request.to,), RENDERERS, "format")
    _require((request.error,), SPREADS, "error")
    _require(request.bits, BITS, "bits")


def _shared(measurements: Sequence[Measurement]) -> tuple[str, ...]:
    """Return the metrics that every quantized source has; those of the full-precision model stand in its own row.

    Raises:
        UsageError: There is none.
    """
    sources: dict[str, dict[str, None]] = {}
    for one in measurements:
        if not one.metric.startswith(_REFERENCE):
            sources.setdefault(one.id, {})[one.metric] = None
    quantized = {one.id for one in measurements if not one.reference}
    measured = [metrics for id_, metrics in sources.items() if id_ in quantized or not quantized]
    shared = tuple(name for name in measured[0] if all(name in metrics for metrics in measured)) if measured else ()
    if not shared:
        known = dict.fromkeys(name for metrics in measured for name in metrics)
        raise UsageError(
            "the sources have no metric in common",
            facts=(("metrics", ", ".join(known) or "none"),),
            hint=f"--values {next(iter(known), 'METRIC')}",
        )
    return tuple(sorted(shared, key=rank))


def _require(names: Iterable[str], known: Iterable[str], kind: str) -> None:
    """Refuse names that are not known.

    Raises:
        UsageError: One is not; the hint holds the nearest.
    """
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"there is no {kind} `{name}` here",
                facts=(("known", ", ".join(known)),),
                hint=f"did you mean `{near[0]}`?" if near else f"give one of the known, such as `{known[0]}`",
            )
