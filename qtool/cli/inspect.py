"""``qtool inspect``: what a model or an artifact is, for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.output import write_json, write_line
from qtool.cli.session import Session, Sources, command
from qtool.cli.stdin import read_sources
from qtool.cli.tables import draw
from qtool.errors import UsageError


@command
def inspect(
    session: Session,
    sources: Sources = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A parameter that the model's family does not describe is an error.")
    ] = False,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCHEME",
            help="What a model's linears take in this scheme; of statistics or a plan, their errors (repeatable).",
        ),
    ] = None,
    activations: Annotated[
        list[str] | None,
        typer.Option(metavar="SCHEME", help="Of statistics or a plan, the errors of inputs in it (repeatable)."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw activations of statistics, or losses of a quantized artifact, as .png or .svg (extra `plot`).",
        ),
    ] = None,
    plan: Annotated[str, typer.Option(metavar="PLAN", help="Draw them after this plan as well.")] = "",
    site: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SITE",
            help="Such as layers.3.mlp_in (repeatable). [default: where the largest activation is]",
        ),
    ] = None,
) -> None:
    """Show what models and artifacts are.

    A model's parameters, a plan's operators and what they cost, what is stored by part, the losses of each linear and
    what `mitigate --strict` would refuse, measured values and their protocol. With --plot, a picture: of statistics,
    before a plan and after it; or of losses over layers, beside those of rounding to nearest.

    With --weights or --activations given several times for statistics, the error of each linear in each scheme, and the
    schemes with the least error, `least_weights` and `least_activations`, as `mitigate` takes them.
    """
    if plot is not None and (strict or weights or activations):
        given = "--strict" if strict else "--weights" if weights else "--activations"
        raise UsageError(f"`{given}` belongs to tables, and `--plot` to a picture", hint="leave one of them out")
    if plot is not None:
        _plot(session, read_sources(sources), plot, plan, site or ())
        return
    if plan or site:
        given = "--plan" if plan else "--site"
        raise UsageError(f"`{given}` belongs to `--plot`", hint="qtool inspect STATISTICS --plot picture.png")
    from qtool.steps.inspect import inspect as step

    with session.workspace() as workspace:
        schemes = {"weights": weights or (), "activations": activations or ()}
        found = [step(source, workspace, strict=strict, **schemes) for source in read_sources(sources)]
    for description in found:
        if session.common.json:
            write_json(description.to_json())
        else:
            draw(description)


def _plot(session: Session, sources: Sequence[str], output: Path, plan: str, sites: Sequence[str]) -> None:
    """Draw one picture and print its path."""
    if len(sources) != 1:
        raise UsageError(
            "a picture is of one artifact",
            facts=(("expected", 1), ("received", len(sources))),
            hint=f"qtool inspect {sources[0]} --plot {output}",
        )
    from qtool.steps.plot import PlotRequest
    from qtool.steps.plot import plot as step

    with session.workspace() as workspace:
        description = step(PlotRequest(sources[0], output, plan, tuple(sites)), workspace)
    if session.common.json:
        write_json(description.to_json())
    else:
        write_line(str(description.facts["path"]))
