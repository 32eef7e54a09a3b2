"""The scheme of a whole model as users write it: a preset's name, parts, or a preset with some parts of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qtool.plugins import Plugins
from qtool.scheme import VECTORS, ModelScheme, TensorScheme, parse_model_scheme, parse_tensor_scheme

NONE = "none"


def read_scheme(preset: str, parts: Mapping[str, str | None], plugins: Plugins) -> ModelScheme:
    """Read a model scheme.

    Args:
        preset: Name such as ``W4A4-g128``; empty for none.
        parts: ``weights``, ``activations`` and ``kv`` as written tensor schemes. One that is given takes the place
            of the preset's; ``none`` means 16 bits, and None or empty that it is not given.
        plugins: Where formats and presets are found.

    Raises:
        SchemeError: A part or the preset's name cannot be read, or a part's strategy means nothing there.
    """
    scheme = parse_model_scheme(preset, plugins.format, plugins.presets) if preset else ModelScheme()
    given: dict[str, Any] = {name: _read_part(name, text, plugins) for name, text in parts.items() if text}
    if given:
        scheme = replace(scheme, **given, name="")
        scheme.check()
    return scheme


def _read_part(name: str, text: str, plugins: Plugins) -> TensorScheme | None:
    return None if text == NONE else parse_tensor_scheme(text, plugins.format, vector=VECTORS[name])
