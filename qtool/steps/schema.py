"""Plain values from a file into frozen dataclasses: unknown keys, missing ones and wrong types are refused by name."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from qtool.errors import UsageError

T = TypeVar("T")
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Place:
    """Where a value stands: a file, and keys from its top down."""

    file: str
    keys: tuple[str, ...] = ()

    def below(self, key: str | int) -> Place:
        """Return the place of a key, or of an item of a list."""
        return Place(self.file, (*self.keys, str(key)))

    def refusal(self, problem: str, received: object, *, expected: str = "", hint: str = "") -> UsageError:
        """Return the error that a value does not fit here."""
        facts = (*((("expected", expected),) if expected else ()), ("received", received))
        return UsageError(f"`{'.'.join(self.keys) or 'recipe'}` in `{self.file}` {problem}", facts=facts, hint=hint)


def read_fields(wanted: type[T], content: object, place: Place) -> T:
    """Read a mapping as a dataclass; text alone is read by its ``of_text`` where it has one.

    Raises:
        UsageError: A key is unknown, missing, or has a value of another type.
    """
    of_text: Callable[[str], T] | None = getattr(wanted, "of_text", None)
    if isinstance(content, str) and of_text is not None:
        return of_text(content)
    if not isinstance(content, Mapping):
        raise place.refusal("does not fit", _shown(content), expected="a mapping")
    options = {one.name: one for one in fields(wanted)}  # type: ignore[arg-type]
    for key in content:
        if key not in options:
            raise _unknown(str(key), options, place)
    for name, option in options.items():
        if name not in content and option.default is MISSING and option.default_factory is MISSING:
            raise place.below(name).refusal("is missing", "nothing", hint=f"{name}: …")
    hints = get_type_hints(wanted)
    return wanted(**{str(key): _read(hints[str(key)], value, place.below(str(key))) for key, value in content.items()})


def _read(hint: Any, value: object, place: Place) -> Any:  # noqa: ANN401 - the type is what is asked for
    """Read one value as a type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        inner = [one for one in arguments if one is not type(None)]
        return None if value is None else _read(inner[0], value, place)
    if is_dataclass(hint) and isinstance(hint, type):
        return read_fields(hint, value, place)
    if origin is tuple:
        if not isinstance(value, list):
            raise place.refusal("does not fit", _shown(value), expected="a list")
        return tuple(_read(arguments[0], item, place.below(index)) for index, item in enumerate(value))
    if origin is not None:
        return _read_texts(value, place)
    wanted = (int, float) if hint is float else hint
    if not isinstance(value, wanted) or (isinstance(value, bool) and hint is not bool):
        raise place.refusal("does not fit", _shown(value), expected=_NAMES[hint])
    return float(value) if hint is float else value


def _read_texts(value: object, place: Place) -> dict[str, str]:
    """Read a mapping of options to plain values, as the command line would write them."""
    if not isinstance(value, Mapping):
        raise place.refusal("does not fit", _shown(value), expected="a mapping")
    texts = {}
    for key, one in value.items():
        if one is not None and not isinstance(one, str | int | float | bool):
            raise place.below(str(key)).refusal("does not fit", _shown(one), expected="text, a number, true or false")
        texts[str(key)] = "none" if one is None else str(one).lower() if isinstance(one, bool) else str(one)
    return texts


def _unknown(key: str, known: Iterable[str], place: Place) -> UsageError:
    known = list(known)
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    return UsageError(
        f"unknown key `{'.'.join((*place.keys, key))}` in `{place.file}`",
        facts=(("known", ", ".join(known)),),
        hint=f"did you mean `{near[0]}`?" if near else "",
    )


def _shown(value: object) -> str:
    return f"{value!r}" if isinstance(value, str) else "nothing" if value is None else f"{value}"
