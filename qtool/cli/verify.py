"""``qtool verify``: whether an artifact is what its manifest says, and a plan exact."""

from __future__ import annotations

from typing import Annotated

import typer

from qtool.cli.session import Session, Source, command
from qtool.cli.stdin import read_source


@command
def verify(
    session: Session,
    source: Source = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of random tokens that a plan is tried on.")] = 4,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens to a window.")] = 128,
    seed: Annotated[int, typer.Option(help="Seeds the tokens.")] = 0,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest difference of a logit that a plan may make.")
    ] = 1e-3,
) -> None:
    """Check an artifact.

    Compares its tensors with its manifest, and a plan's model with the original one.
    """
    from qtool.steps.verify import VerifyRequest
    from qtool.steps.verify import verify as step

    request = VerifyRequest(read_source(source), windows=windows, seq_len=seq_len, seed=seed, tolerance=tolerance)
    with session.workspace() as workspace:
        artifact, metrics = step(request, workspace)
    session.show(artifact, reused=False, metrics=metrics)
