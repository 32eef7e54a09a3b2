from __future__ import annotations

from pathlib import Path

import pytest

from qtool.errors import ModelError
from qtool.model.card import ModelCard, read_card, write_card


def test_a_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    card = ModelCard("a model", "its weights were found, not trained")
    write_card(tmp_path, card)
    assert read_card(tmp_path) == card
    assert [file.name for file in tmp_path.iterdir()] == ["qtool-model.json"]


def test_the_same_card_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "qtool-model.json"
    path.write_text('{"footnote": "by hand"}')
    write_card(tmp_path, ModelCard(tmp_path.name, "by hand"))
    assert path.read_text() == '{"footnote": "by hand"}'
    write_card(tmp_path, ModelCard("other"))
    assert read_card(tmp_path) == ModelCard("other")


def test_without_a_card_a_model_is_called_as_its_folder(tmp_path: Path) -> None:
    assert read_card(tmp_path) == ModelCard(tmp_path.name)


@pytest.mark.parametrize("text", ["{", "[1]", '{"name": 3}', '{"title": "x"}'])
def test_a_card_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "qtool-model.json").write_text(text)
    with pytest.raises(ModelError, match=r"cannot read .*qtool-model[.]json"):
        read_card(tmp_path)
