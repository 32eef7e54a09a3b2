"""How evenly tokens were routed to experts, as tables for people."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from qtool.artifacts.store import Artifact
from qtool.engine.starved import Routing
from qtool.model.graph import EXPERTS
from qtool.steps.calibrate import EXPERT_TOKENS
from qtool.steps.description import Cell, Table

_COUNTS = ("layer", "experts", "tokens_if_even", "least", "median", "most")
_EXPERT = re.compile(rf"(?<=\b{re.escape(EXPERTS)})\d+(?=\.)")


def alike(name: str) -> str:
    """Return the name that stands for all experts: ``experts.*.up_down`` for ``experts.3.up_down``."""
    return _EXPERT.sub("*", name)


def gathered_routing(artifact: Artifact) -> dict[str, Table]:
    """Return how many tokens calibrate saw routed to the experts of each layer; nothing without experts."""
    names = [name for name in artifact.names("layers.") if name.endswith(f".{EXPERT_TOKENS}")]
    counts = {int(name.split(".")[1]): artifact.tensor(name).tolist() for name in names}
    rows = [(*_counted(layer, tokens), _listed(_starved(tokens))) for layer, tokens in sorted(counts.items())]
    return {"experts": Table((*_COUNTS, "starved"), rows)} if rows else {}


def solved_routing(notes: Mapping[str, Mapping[str, Any]]) -> dict[str, Table]:
    """Return how many tokens the experts of each layer were solved from, and which were starved.

    Args:
        notes: What the manifest says of experts, by layer.
    """
    rows = [
        (*_counted(int(layer), one["tokens"]), _listed(one["shrunk_experts"]), _listed(one["experts_rtn"]))
        for layer, one in sorted(notes.items(), key=lambda item: int(item[0]))
    ]
    return {"experts": Table((*_COUNTS, "shrunk", "rounded_to_nearest"), rows)} if rows else {}


def _counted(layer: int, tokens: Sequence[int]) -> tuple[Cell, ...]:
    even = sum(tokens) / len(tokens)
    return layer, len(tokens), even, min(tokens), median(tokens), max(tokens)


def _starved(tokens: Sequence[int]) -> list[int]:
    routing = Routing(torch.tensor(tokens))
    return [expert for expert in range(len(tokens)) if routing.starved(expert)]


def _listed(experts: Iterable[int]) -> str | None:
    return ", ".join(str(expert) for expert in experts) or None
