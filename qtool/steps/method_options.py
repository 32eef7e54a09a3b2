"""What can be set of methods: each option with its default, its values, and what its docstring says of it."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qtool.errors import UsageError
from qtool.plugins import Plugins
from qtool.steps.description import Description, Table
from qtool.steps.options import configure, option_word

METHODS = ("transforms", "mitigators")


def describe_options(plugins: Plugins, kind: str, name: str) -> Description:
    """Describe the options of a method, or of a composition as users write it.

    Args:
        plugins: Where methods are found.
        kind: ``transforms`` or ``mitigators``.
        name: ``gptq``, ``gptq+lorc``.

    Raises:
        UsageError: A kind without options, or no such method.
    """
    if kind not in METHODS:
        raise UsageError(f"{kind} have no options that `--set` knows", hint=f"qtool plugins {kind}")
    methods = configure(kind, name, {}, plugins)
    several = len(methods) > 1
    rows = [
        (
            f"{one.name}.{option_word(option.name)}" if several else option_word(option.name),
            _written(getattr(one.config, option.name)),
            _values(get_type_hints(type(one.config))[option.name]),
            _meanings(type(one.config)).get(option.name),
        )
        for one in methods
        for option in fields(one.config)
    ]
    providers = dict.fromkeys(one.provider for one in methods)
    facts = {"method": "+".join(one.name for one in methods), "provider": ", ".join(providers)}
    return Description(facts, {"options": Table(("option", "default", "values", "meaning"), rows)})


def _written(value: object) -> str:
    """Return a value as users type it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _values(hint: Any) -> str:  # noqa: ANN401 - the type is what is asked for
    """Return what an option may be."""
    origin = get_origin(hint)
    if origin is Literal:
        return ", ".join(map(str, get_args(hint)))
    if origin in (Union, types.UnionType):
        return ", ".join("none" if one is type(None) else _values(one) for one in get_args(hint))
    return {bool: "true, false", int: "a whole number", float: "a number", str: "text"}.get(hint, str(hint))


def _meanings(config: type) -> Mapping[str, str]:
    """Return what docstrings say of options under ``Attributes:``, those of a class over those of what it extends."""
    found: dict[str, str] = {}
    for one in reversed(config.__mro__):
        _, _, attributes = inspect.cleandoc(one.__doc__ or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?= {4}\w+: )", f"\n{attributes}"):
            label, colon, text = entry.strip().partition(": ")
            if colon and label.isidentifier():
                found[label] = " ".join(text.split()).replace("``", "`")
    return found
