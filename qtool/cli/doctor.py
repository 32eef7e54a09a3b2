"""``qtool doctor``: what this installation can do on this machine, and what loads a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli.output import kept_clean, write_json
from qtool.cli.session import Debug, Json
from qtool.cli.tables import draw
from qtool.errors import UsageError
from qtool.plugins import Plugins

if TYPE_CHECKING:
    from qtool.steps.description import Cell, Description


def doctor(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CHECKPOINT", help="A folder with config.json and weights, or a GGUF file."),
    ] = None,
    consumer: Annotated[
        str,
        typer.Option(
            "--for", metavar="NAME", help="Such as vllm, transformers, llama.cpp, sglang. [default: all of them]"
        ),
    ] = "",
    device: Annotated[
        str,
        typer.Option("--on", metavar="DEVICE", help="cpu, or a compute capability as sm90. [default: this machine's]"),
    ] = "",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what this machine offers, or what loads a checkpoint.

    Alone: versions, devices, optional packages, folders and broken plugins. With a checkpoint, made by qtool or by
    others: what each consumer executes of it. With --for, exits with 8 unless that is what the config says.
    """
    from qtool.steps.consumers import examine_checkpoint, require_as_meant
    from qtool.steps.doctor import examine

    del debug  # read by `main`, before options are
    _check_options(checkpoint, consumer, device)
    found = None
    with kept_clean(quiet=False):
        if checkpoint is None:
            description = examine(Plugins.discover())
        else:
            description, found = examine_checkpoint(checkpoint, Plugins.discover(), consumer=consumer, device=device)
    if json:
        write_json(description.to_json())
    else:
        draw(description if checkpoint is None else _narrowed(description))
    if checkpoint is not None and found is not None:
        require_as_meant(checkpoint, found)


def _narrowed(description: Description) -> Description:
    """Return what consumers do in four columns; neighbouring devices alike are one row, and messages are left out."""
    from qtool.steps.description import Description, Table

    def told(row: Mapping[str, Cell]) -> tuple[Cell, Cell, str]:
        kernel = f"; kernel {row['kernel']}" if row["kernel"] else ""
        known = f" ({row['version']}, {row['known']})" if row["version"] else ""
        return row["consumer"], row["verdict"], f"{row['executes']}{kernel}{known}"

    rows = []
    for (consumer, verdict, executes), alike in groupby(description.tables["consumers"].to_json(), told):
        devices = [str(row["device"]) for row in alike]
        rows.append((consumer, " to ".join(dict.fromkeys((devices[0], devices[-1]))), verdict, executes))
    return Description(description.facts, {"consumers": Table(("consumer", "device", "verdict", "executes"), rows)})


def _check_options(checkpoint: Path | None, consumer: str, device: str) -> None:
    """Refuse options that nothing would come of."""
    if checkpoint is None and (consumer or device):
        given = "--for" if consumer else "--on"
        raise UsageError(f"`{given}` belongs to a checkpoint", hint=f"qtool doctor CHECKPOINT {given} …")
    if device and not consumer:
        raise UsageError("`--on` belongs to `--for`; without it all devices are shown", hint="--for vllm")
