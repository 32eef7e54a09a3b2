"""``qtool plugins``: everything on offer, without importing any of it; and the options of a method, which is."""

from __future__ import annotations

from typing import Annotated

import typer

from qtool.cli.output import write_json
from qtool.cli.session import Debug, Json
from qtool.cli.tables import draw
from qtool.plugins import KINDS, Plugins
from qtool.steps.description import describe_plugins


def plugins(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"{', '.join(KINDS)} or presets.")] = "",
    name: Annotated[
        str, typer.Argument(metavar="METHOD", help="Its options instead: mitigators gptq, or gptq+lorc.")
    ] = "",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List what plugins offer.

    Names, providers and summaries, and which plugins are broken; of a method,
    what `--set` knows.
    """
    del debug  # read by `main`, before options are
    found = Plugins.discover()
    description = describe_plugins(found, kind)
    if name:
        from qtool.steps.method_options import describe_options

        description = describe_options(found, kind, name)
    if json:
        write_json(description.to_json())
    else:
        draw(description)
