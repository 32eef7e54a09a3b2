"""What a model folder says of itself to people: the name that tables print, and a footnote on its weights.

It lies beside the weights as ``qtool-model.json`` with the texts ``name`` and ``footnote``, both optional, and is no
part of the model's identity: a better name must not make artifacts stale.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from qtool.artifacts.store import write_atomically
from qtool.errors import ModelError

CARD = "qtool-model.json"


@dataclass(frozen=True)
class ModelCard:
    """A model's name, and one sentence that must stand below every table that shows it."""

    name: str
    footnote: str = ""


def read_card(folder: Path) -> ModelCard:
    """Read the card of a model folder; without one the model is called as its folder.

    Raises:
        ModelError: There is a card, and it cannot be read.
    """
    path = folder / CARD
    if not path.is_file():
        return ModelCard(folder.name)
    try:
        card = ModelCard(**{"name": folder.name, **json.loads(path.read_text(encoding="utf-8"))})
        if not (isinstance(card.name, str) and isinstance(card.footnote, str)):
            raise TypeError("a value is no text")
        return card
    except (OSError, ValueError, TypeError) as error:
        facts = (("expected", '{"name": "…", "footnote": "…"}'), ("reason", error))
        raise ModelError(f"cannot read `{path}`", facts=facts) from error


def write_card(folder: Path, card: ModelCard) -> None:
    """Put a card into a model folder, unless the same one is there already."""
    if not (folder / CARD).is_file() or read_card(folder) != card:
        write_atomically(folder / CARD, json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n")
