"""A composition of methods under a name of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Composition:
    """Methods that a plugin offers together, with the options that they work best with together.

    It is written out when it is used: a manifest has the methods and their options, so an artifact tells what was done
    also where a later version offers something else under the name.

    Attributes:
        methods: As users write it: ``gptq+autoround``.
        settings: Options as text, ``name.option`` or ``option``; what users set comes before them.
    """

    methods: str
    settings: Mapping[str, str] = field(default_factory=dict)
