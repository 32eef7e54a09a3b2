"""The registry of everything that plugins offer: found once, imported on use, collisions refused."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from qtool import hookspecs
from qtool.errors import PluginError, QtoolError, UsageError
from qtool.hookspecs import GROUP, Entry
from qtool.scheme import Format, Preset

KINDS = (
    "transforms",
    "mitigators",
    "formats",
    "exporters",
    "metrics",
    "statistics",
    "families",
    "models",
    "datasets",
    "kernels",
)

_VERBS = {"transforms": "qtool transform --method", "mitigators": "qtool mitigate --method"}


@dataclass(frozen=True)
class Provider:
    """The distribution that a plugin came from."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Offer:
    """One entry together with who offers it."""

    entry: Entry
    provider: Provider


@dataclass(frozen=True)
class Plugins:
    """Everything on offer, by kind and name.

    Attributes:
        offers: Kind (``transforms``, ``formats``, …) to name to offer.
        presets: Named model schemes by upper-case name.
        broken: Entry points that could not be loaded, with the reason; the rest of qtool works without them.
        manager: The pluggy manager, for hooks that take arguments.
    """

    offers: Mapping[str, Mapping[str, Offer]]
    presets: Mapping[str, Preset]
    broken: Mapping[str, str]
    manager: pluggy.PluginManager
    _instances: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)

    @classmethod
    def discover(cls) -> Plugins:
        """Load every entry point of the group ``qtool`` and ask its hooks.

        Raises:
            PluginError: Two providers offer one name.
        """
        manager = pluggy.PluginManager(GROUP)
        manager.add_hookspecs(hookspecs)
        providers: dict[str, Provider] = {}
        broken: dict[str, str] = {}
        for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
            _load(manager, point, providers, broken)
        found = {kind: _collect(manager, kind, providers, broken) for kind in (*KINDS, "presets")}
        presets = {name: preset for name, (preset, _) in found.pop("presets").items()}
        offers = {kind: {name: Offer(*offered) for name, offered in names.items()} for kind, names in found.items()}
        return cls(offers, presets, broken, manager)

    def __reduce__(self) -> tuple[Callable[[], Plugins], tuple[()]]:
        """Be found anew in another process: loaded plugins do not travel."""
        return Plugins.discover, ()

    def offer(self, kind: str, name: str) -> Offer:
        """Find an offer by name.

        Raises:
            UsageError: Nobody offers it; the hint holds the nearest name.
        """
        found = self.offers[kind].get(name)
        if found is None:
            near = difflib.get_close_matches(name, self.offers[kind], n=1)
            known = {other: hint for one in self.offers[kind].values() for other, hint in one.entry.others.items()}
            nearest = f"did you mean `{near[0]}`?" if near else f"qtool plugins {kind}"
            elsewhere = [f"{verb} {name}" for other, verb in _VERBS.items() if name in self.offers[other]]
            raise UsageError(
                f"no {_singular(kind)} is called `{name}`",
                facts=(
                    ("known", ", ".join(sorted(self.offers[kind]))),
                    *((f"broken plugin {plugin}", reason) for plugin, reason in self.broken.items()),
                ),
                hint=known.get(name, (*elsewhere, nearest)[0]),
            )
        return found

    def load(self, kind: str, name: str) -> Any:  # noqa: ANN401 - each kind has its own protocol
        """Import an offer's target and return the object, one for each name.

        Raises:
            UsageError: Nobody offers it.
            PluginError: Its module fails to import, lacks the object, or the class cannot be instantiated.
        """
        if (kind, name) not in self._instances:
            offer = self.offer(kind, name)
            module, _, attribute = offer.entry.target.partition(":")
            try:
                target = getattr(importlib.import_module(module), attribute)
                self._instances[kind, name] = target() if isinstance(target, type) else target
            except QtoolError:
                raise
            except Exception as error:  # a stranger's module may raise anything
                raise PluginError(
                    f"`{name}` of {offer.provider} cannot be imported",
                    facts=(("target", offer.entry.target), ("reason", _reason(error))),
                    hint=f"pip install --upgrade {offer.provider.name}",
                ) from error
        return self._instances[kind, name]

    def every(self, kind: str) -> dict[str, Any]:
        """Return all that is offered of a kind, by name; raises as ``load`` does."""
        return {name: self.load(kind, name) for name in self.offers[kind]}

    def format(self, name: str) -> Format:
        """Return the format of this name."""
        found: Format = self.load("formats", name)
        return found


def _load(
    manager: pluggy.PluginManager, point: EntryPoint, providers: dict[str, Provider], broken: dict[str, str]
) -> None:
    """Register one entry point, or note why it cannot be loaded."""
    name = f"{point.dist.name if point.dist else '?'}:{point.name}"
    if name in providers or name in broken:
        return
    try:
        manager.register(point.load(), name)
        manager.check_pending()
    except Exception as error:  # a stranger's module may raise anything, and the others must go on
        broken[name] = _reason(error)
        if manager.has_plugin(name):
            manager.unregister(name=name)
        return
    providers[name] = Provider(point.dist.name, point.dist.version) if point.dist else Provider("?", "?")


def _collect(
    manager: pluggy.PluginManager, kind: str, providers: Mapping[str, Provider], broken: dict[str, str]
) -> dict[str, tuple[Any, Provider]]:
    """Ask one hook of every plugin; note those that fail as broken, and refuse a name offered twice."""
    found: dict[str, tuple[Any, Provider]] = {}
    for implementation in getattr(manager.hook, f"register_{kind}").get_hookimpls():
        provider = providers[implementation.plugin_name]
        try:
            offered = [(_name(kind, item), item) for item in implementation.function()]
        except Exception as error:  # as in `_load`
            broken[implementation.plugin_name] = _reason(error)
            continue
        for name, item in offered:
            if name in found:
                raise _collision(kind, name, found[name], (item, provider))
            found[name] = (item, provider)
    return found


def _name(kind: str, item: object) -> str:
    """Return the name under which a hook's item is found: presets regardless of case."""
    if isinstance(item, Preset) and kind == "presets":
        return item.name.upper()
    if isinstance(item, Entry) and kind != "presets":
        return item.name
    raise PluginError(f"`register_{kind}` returned a {type(item).__name__}, which its hook does not ask for")


def _collision(kind: str, name: str, one: tuple[Any, Provider], two: tuple[Any, Provider]) -> PluginError:
    """Return the refusal of a name offered twice; the hint never removes qtool itself."""
    stranger = one[1] if two[1].name == GROUP else two[1]
    return PluginError(
        f"two plugins offer the {_singular(kind)} `{name}`",
        facts=tuple(
            (label, f"{provider} ({getattr(item, 'target', name)})")
            for label, (item, provider) in (("one", one), ("two", two))
        ),
        hint=f"pip uninstall {stranger.name}",
    )


def _singular(kind: str) -> str:
    return "family" if kind == "families" else kind.removesuffix("s")


def _reason(error: Exception) -> str:
    """Return an error as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
