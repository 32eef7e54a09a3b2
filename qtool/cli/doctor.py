"""``qtool doctor``: what this installation can do on this machine."""

from __future__ import annotations

from qtool.cli.output import kept_clean, write_json
from qtool.cli.session import Debug, Json
from qtool.cli.tables import draw
from qtool.plugins import Plugins


def doctor(json: Json = False, debug: Debug = False) -> None:
    """Show what this machine offers.

    Versions, devices, optional packages, folders and broken plugins.
    """
    from qtool.steps.doctor import examine

    del debug  # read by `main`, before options are
    with kept_clean(quiet=False):
        description = examine(Plugins.discover())
    if json:
        write_json(description.to_json())
    else:
        draw(description)
