"""Shell completion of what plugins offer."""

from __future__ import annotations

from collections.abc import Callable

from qtool.plugins import Plugins

Completer = Callable[[str], list[tuple[str, str]]]


def complete_offers(kind: str) -> Completer:
    """Return a completion of the names of one kind of plugin with their summaries."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        offers = Plugins.discover().offers[kind]
        return [(name, offer.entry.summary) for name, offer in offers.items() if name.startswith(incomplete)]

    return complete


def complete_composition(kind: str) -> Completer:
    """Return a completion of method names joined by ``+``: the last of them is completed."""
    complete_name = complete_offers(kind)

    def complete(incomplete: str) -> list[tuple[str, str]]:
        before, plus, last = incomplete.rpartition("+")
        return [(f"{before}{plus}{name}", summary) for name, summary in complete_name(last)]

    return complete


def complete_preset(incomplete: str) -> list[tuple[str, str]]:
    """Complete the name of a scheme."""
    presets = Plugins.discover().presets.values()
    return [(one.name, one.summary) for one in presets if one.name.startswith(incomplete)]
