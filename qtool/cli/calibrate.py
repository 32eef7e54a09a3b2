"""``qtool calibrate``: statistics of a model's activations."""

from __future__ import annotations

from typing import Annotated

import typer

from qtool.cli.completion import complete_offers
from qtool.cli.session import Batch, DryRun, Dtype, Output, Session, Source, command, read_list
from qtool.cli.stdin import read_source

NONE = "none"


@command
def calibrate(
    session: Session,
    source: Source = None,
    data: Annotated[
        str, typer.Option(help="Dataset, or a text file.", autocompletion=complete_offers("datasets"))
    ] = "wikitext2",
    num_samples: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 128,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens to a window.")] = 2048,
    seed: Annotated[int, typer.Option(help="Seeds the windows and the sample.")] = 0,
    gather: Annotated[
        str, typer.Option(metavar="NAMES", help="Statistics, joined by commas; `none` only fixes the text.")
    ] = "hessian,absmax,min,max,mean,mean_abs,sample",
    token_weight: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            help="Weight of a token in Hessians: uniform, inverse-norm[:P], clip[:K], gradient; RULE,SITE=RULE.",
        ),
    ] = "uniform",
    sample_size: Annotated[int, typer.Option(min=1, help="Token rows that a sample keeps.")] = 2048,
    experts: Annotated[
        str,
        typer.Option(
            metavar="all|routed",
            help="Tokens that experts' statistics are of: all, or those routed to each. [default: all]",
        ),
    ] = "",
    dtype: Dtype = "auto",
    batch: Batch = 0,
    output: Output = None,
    dry_run: DryRun = False,
) -> None:
    """Gather statistics over text.

    One pass over a model, or over a plan for statistics of the transformed model.
    """
    from qtool.steps.calibrate import CalibrateRequest
    from qtool.steps.calibrate import calibrate as step

    request = CalibrateRequest(
        source=read_source(source),
        data=data,
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
        gather=() if gather == NONE else read_list(gather),
        token_weight=token_weight,
        sample_size=sample_size,
        experts=experts,
        dtype=dtype,
        batch=batch,
        output=output,
    )
    if dry_run:
        session.foresee(step, request)
    else:
        session.run(step, request)
