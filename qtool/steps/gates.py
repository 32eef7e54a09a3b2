"""Gates: bounds on measured values that decide a command's exit code, such as ``perplexity/wikitext2<=22``."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass

from qtool.errors import UsageError

_RELATIONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_GATE = re.compile(r"\s*([^<>=\s]+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*")


@dataclass(frozen=True)
class Gate:
    """A bound on one metric."""

    metric: str
    relation: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{self.relation}{self.bound:g}"

    def met(self, values: Mapping[str, float]) -> bool:
        """Say whether measured values are within the bound.

        Raises:
            UsageError: The metric was not measured.
        """
        if self.metric not in values:
            raise UsageError(
                f"`--require {self}` names a metric that was not measured", facts=(("measured", ", ".join(values)),)
            )
        return bool(_RELATIONS[self.relation](values[self.metric], self.bound))


def read_gate(text: str) -> Gate:
    """Read a written gate.

    Raises:
        UsageError: It cannot be read.
    """
    match = _GATE.fullmatch(text)
    try:
        if match is not None:
            return Gate(match[1], match[2], float(match[3]))
    except ValueError:
        pass
    raise UsageError(f"cannot read the gate `{text}`", hint="--require 'perplexity/wikitext2<=22'")
