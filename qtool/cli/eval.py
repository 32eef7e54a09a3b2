"""``qtool eval``: perplexity, divergence and tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.completion import complete_offers
from qtool.cli.session import Batch, Dtype, Output, Session, Source, command, read_list
from qtool.cli.stdin import read_source


@command
def evaluate(
    session: Session,
    source: Source = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA", help="Dataset or text file (repeatable).", autocompletion=complete_offers("datasets")
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens to a window.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Only the first windows of each text.")] = None,
    kl: Annotated[bool, typer.Option("--kl", help="Also the divergence from full precision.")] = False,
    tasks: Annotated[str, typer.Option(metavar="NAMES", help="lm-eval tasks, joined by commas.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first items of each task.")] = None,
    task_data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The tasks' data, where no hub can be reached.")
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(metavar="GATE", help="Exit with 7 unless it holds: 'perplexity/wikitext2<=22' (repeatable)."),
    ] = None,
    dtype: Dtype = "auto",
    batch: Batch = 0,
    output: Output = None,
) -> None:
    """Measure perplexity and tasks.

    Takes a model, a plan, a quantized artifact or a checkpoint.
    """
    from qtool.steps.eval import EvalRequest
    from qtool.steps.eval import evaluate as step

    request = EvalRequest(
        source=read_source(source),
        perplexity=tuple(perplexity or ()),
        seq_len=seq_len,
        max_windows=max_windows,
        kl=kl,
        tasks=read_list(tasks),
        limit=limit,
        task_data=task_data,
        require=tuple(require or ()),
        dtype=dtype,
        batch=batch,
        output=output,
    )
    session.run(step, request)
