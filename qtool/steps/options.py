"""Options of methods: ``--set key=value`` checked against a method's frozen ``Config``."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qtool.engine.composition import Composition
from qtool.errors import PluginError, UsageError
from qtool.plugins import Plugins


@dataclass(frozen=True)
class Configured:
    """A method with its options: what one name of a composition stands for."""

    name: str
    method: Any
    config: Any
    provider: str

    def record(self) -> dict[str, Any]:
        """Return name, version and options, for the key."""
        return {"name": self.name, "version": self.method.version, "config": asdict(self.config)}


def configure(kind: str, composition: str, settings: Mapping[str, str], plugins: Plugins) -> tuple[Configured, ...]:
    """Load the methods of a composition (``gptq+lorc``, left to right) and give each its options.

    Args:
        kind: ``transforms`` or ``mitigators``.
        composition: Names joined by ``+``.
        settings: Option to value as text; ``name.option`` chooses among methods that share an option.
        plugins: Where methods are found.

    Returns:
        One configured method a name.

    Raises:
        UsageError: An unknown method or option, or a value of the wrong type.
        PluginError: A method has no ``Config``.
    """
    left = dict(settings)
    configured = []
    for name, own in _expanded(kind, composition, plugins):
        method, provider = plugins.load(kind, name), str(plugins.offer(kind, name).provider)
        config_type = getattr(method, "Config", None)
        if not isinstance(config_type, type) or not is_dataclass(config_type):
            raise PluginError(f"`{name}` of {provider} has no dataclass `Config`")
        hints = get_type_hints(config_type)
        values: dict[str, Any] = {}
        for option in fields(config_type):
            dashed = option_word(option.name)
            # The last that is given holds: an option of one method over one for all.
            for given in (own, settings):
                for label in (dashed, option.name, f"{name}.{dashed}", f"{name}.{option.name}"):
                    if label in given:
                        values[option.name] = _convert(given[label], hints[option.name], f"{name}.{option.name}")
                        left.pop(label, None)
        configured.append(Configured(name, method, config_type(**values), provider))
    if left:
        raise _unknown(next(iter(left)), kind, configured)
    return tuple(configured)


def _expanded(kind: str, composition: str, plugins: Plugins) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield the methods of a composition by name, each with the options that a composition it is part of gives it."""
    for name in (one.strip() for one in composition.split("+")):
        loaded = plugins.load(kind, name)
        if isinstance(loaded, Composition):
            yield from ((inner, {**own, **loaded.settings}) for inner, own in _expanded(kind, loaded.methods, plugins))
        else:
            yield name, {}


def read_settings(pairs: Sequence[str]) -> dict[str, str]:
    """Read ``key=value`` words.

    Raises:
        UsageError: A word has no ``=``.
    """
    settings = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise UsageError(f"cannot read the option `{pair}`", hint="--set key=value")
        settings[key] = value
    return settings


def option_word(name: str) -> str:
    """Return an option's name as users write it."""
    return name.replace("_", "-")


def _convert(text: str, hint: Any, label: str) -> Any:  # noqa: ANN401 - the type is what is asked for
    """Turn an option's text into its type."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [arg for arg in get_args(hint) if arg is not type(None)]
        return None if text == "none" and len(inner) < len(get_args(hint)) else _convert(text, inner[0], label)
    if origin is Literal:
        if text in get_args(hint):
            return text
        raise UsageError(f"`{text}` is no value of `{label}`", facts=(("values", ", ".join(map(str, get_args(hint)))),))
    try:
        if hint is bool:
            return {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[text.lower()]
        if hint in (int, float, str):
            return hint(text)
    except (ValueError, KeyError) as error:
        raise UsageError(f"`{text}` is no value of `{label}`", facts=(("expected", hint.__name__),)) from error
    raise PluginError(f"`{label}` has a type that cannot be set from the command line", facts=(("type", hint),))


def _unknown(key: str, kind: str, configured: Sequence[Configured]) -> UsageError:
    known = [option_word(option.name) for one in configured for option in fields(one.config)]
    near = difflib.get_close_matches(option_word(key.rpartition(".")[2]), known, n=1)
    methods = "+".join(one.name for one in configured)
    return UsageError(
        f"`{methods}` has no option `{key}`",
        facts=(("options", ", ".join(known) or "none"),),
        hint=f"--set {near[0]}=VALUE" if near else f"qtool plugins {kind} {methods}",
    )
