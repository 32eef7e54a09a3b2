"""``qtool mitigate``: weights become codes while the error is compensated."""

from __future__ import annotations

from typing import Annotated

import typer

from qtool.cli.completion import complete_composition, complete_preset
from qtool.cli.session import Batch, DryRun, Dtype, Output, Session, Settings, Source, command
from qtool.cli.stdin import read_source


@command
def mitigate(
    session: Session,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME[+NAME]...",
            help="Mitigators, left to right.",
            autocompletion=complete_composition("mitigators"),
        ),
    ],
    source: Source = None,
    settings: Settings = None,
    scheme: Annotated[
        str,
        typer.Option(metavar="PRESET", help="Such as W4A16, NVFP4.", autocompletion=complete_preset),
    ] = "",
    weights: Annotated[
        str,
        typer.Option(
            metavar="SCHEME[,LINEARS=SCHEME]",
            help="Such as int4-sym-g128; over the preset's. Behind it exceptions, the last of which holds: "
            "down_proj=int8,layers.0-1=none; alone they leave what the preset says of others.",
        ),
    ] = "",
    activations: Annotated[
        str,
        typer.Option(metavar="SCHEME[,LINEARS=SCHEME]", help="Such as int4-asym-token, or none; likewise."),
    ] = "",
    kv: Annotated[
        str,
        typer.Option(
            metavar="SCHEME", help="Of the KV cache, or none; or keys=SCHEME,values=SCHEME, and queries=SCHEME."
        ),
    ] = "",
    outputs: Annotated[
        str,
        typer.Option(metavar="SCHEME[,LINEARS=SCHEME]", help="Of what linears put out, such as fp8-token, or none."),
    ] = "",
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="Protocol of a paper (survey) for whatever is not given here.")
    ] = "",
    propagate: Annotated[
        str | None,
        typer.Option(
            metavar="quantized|none",
            help="Activations from passes over what is quantized, or carried statistics. [default: quantized]",
        ),
    ] = None,
    true_sequential: Annotated[
        bool | None,
        typer.Option(
            "--true-sequential/--no-true-sequential",
            help="Each linear sees the quantized ones before it in its block. "
            "[default: where a method compares the inputs of linears with full precision]",
        ),
    ] = None,
    round_activations: Annotated[
        bool | None,
        typer.Option(
            "--round-activations/--no-round-activations",
            help="Propagate activations as the scheme quantizes them. "
            "[default: where a method sees whole blocks, and for gptaq and lrc]",
        ),
    ] = None,
    token_weight: Annotated[
        str | None,
        typer.Option(
            metavar="RULE[,SITE=RULE]",
            help="uniform, inverse-norm[:P], clip[:K], gradient. "
            "[default: uniform,attn_in=gradient where statistics hold saliency, else inverse-norm:0.5; "
            "as gathered where carried]",
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="all|routed",
            help="Tokens that experts' statistics are of. [default: that of the statistics]",
        ),
    ] = None,
    expert_share: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="With routed: part of even routing below which an expert's statistics are shrunk toward shared ones. "
            "[default: 0.25]",
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Whatever a counter counts is an error.")] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seeds what is random. [default: 0]",
        ),
    ] = None,
    dtype: Dtype = "auto",
    batch: Batch = 0,
    output: Output = None,
    dry_run: DryRun = False,
) -> None:
    """Quantize the weights.

    Takes a plan, or statistics (no transform), or a model where no method needs statistics. With --dry-run: what would
    be done to which linears, the bytes of the result, and an estimate of memory and time from short measurements.
    """
    from qtool.steps.mitigate import MitigateRequest
    from qtool.steps.mitigate import mitigate as step
    from qtool.steps.options import read_settings
    from qtool.steps.presets import mitigate_settings

    defaults = mitigate_settings(preset).overridden(
        propagate=propagate,
        true_sequential=true_sequential,
        round_activations=round_activations,
        token_weight=token_weight,
        experts=experts,
        expert_share=expert_share,
        seed=seed,
    )
    parts = {"weights": weights, "activations": activations, "kv": kv, "outputs": outputs}
    request = MitigateRequest(
        source=read_source(source),
        method=method,
        scheme=defaults.scheme(scheme, parts, session.plugins),
        settings=defaults.options(method, read_settings(settings or ())),
        propagate=defaults.propagate,  # type: ignore[arg-type] # checked by the step
        true_sequential=defaults.true_sequential,
        round_activations=defaults.round_activations,
        token_weight=defaults.token_weight,
        experts=defaults.experts,
        expert_share=defaults.expert_share,
        strict=strict,
        seed=defaults.seed,
        dtype=dtype,
        batch=batch,
        output=output,
    )
    if dry_run:
        session.foresee(step, request)
    else:
        session.run(step, request)
