"""``qtool transform``: a plan of operators that make a model easier to quantize."""

from __future__ import annotations

from typing import Annotated

import typer

from qtool.cli.completion import complete_composition, complete_preset
from qtool.cli.session import Output, Session, Settings, Source, command
from qtool.cli.stdin import read_source


@command
def transform(
    session: Session,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME[+NAME]...",
            help="Transforms, left to right.",
            autocompletion=complete_composition("transforms"),
        ),
    ],
    source: Source = None,
    settings: Settings = None,
    scheme: Annotated[
        str,
        typer.Option(metavar="PRESET", help="Such as W4A4.", autocompletion=complete_preset),
    ] = "",
    weights: Annotated[str, typer.Option(metavar="SCHEME[,LINEARS=SCHEME]", help="Such as int4-g128.")] = "",
    activations: Annotated[str, typer.Option(metavar="SCHEME[,LINEARS=SCHEME]", help="Such as int4-asym-token.")] = "",
    kv: Annotated[str, typer.Option(metavar="SCHEME", help="Of the KV cache; or keys=SCHEME,values=SCHEME.")] = "",
    outputs: Annotated[str, typer.Option(metavar="SCHEME[,LINEARS=SCHEME]", help="Of what linears put out.")] = "",
    seed: Annotated[int, typer.Option(help="Seeds random signs and the like.")] = 0,
    output: Output = None,
) -> None:
    """Plan a rewriting of the model.

    The operators of a plan leave what the model computes unchanged, but make it quantize better.
    """
    from qtool.steps.options import read_settings
    from qtool.steps.schemes import read_scheme
    from qtool.steps.transform import TransformRequest
    from qtool.steps.transform import transform as step

    parts = {"weights": weights, "activations": activations, "kv": kv, "outputs": outputs}
    request = TransformRequest(
        source=read_source(source),
        method=method,
        settings=read_settings(settings or ()),
        scheme=read_scheme(scheme, parts, session.plugins),
        seed=seed,
        output=output,
    )
    session.run(step, request)
