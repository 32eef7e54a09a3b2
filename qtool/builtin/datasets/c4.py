"""C4, English: Raffel et al. 2020, Exploring the Limits of Transfer Learning, arXiv:1910.10683.

Calibration draws each window from one random document; measurement joins documents by single spaces into one text, as
GPTQ does. The field calibrates on a shard of the training split; to need one download instead of two, both parts come
from the first validation shard here, and never share a document.
"""

from __future__ import annotations

from pathlib import Path

from qtool.builtin.datasets.hub import hub_texts
from qtool.model.text import Documents, read_text_file, require_split, text_digest

SHARD = "en/c4-validation.00000-of-00008.json.gz"
NUM_TEST = 1100  # documents of the shard that GPTQ measures on


class C4:
    """C4 from ``c4/sample.jsonl`` of the data folder, else the first validation shard from the hub."""

    summary = "C4 English, separate documents to calibrate on, joined by spaces to measure (train, test)"

    def documents(self, split: str, directory: Path | None) -> Documents:
        """Return a split: separate documents for ``train``, one joined text for ``test``.

        Args:
            split: ``train`` or ``test``.
            directory: Folder with ``c4/sample.jsonl``, whose last third is the test split; None, or a folder without
                it, goes to the hub, where the first 1,100 documents of the shard are the test split.

        Raises:
            UsageError: There is no such split.
            DataError: The text is neither in the folder nor to be had from the hub.
        """
        require_split(split, ("train", "test"), "c4")
        if directory and (path := directory / "c4" / "sample.jsonl").is_file():
            texts = read_text_file(path).texts
            bound = len(texts) - len(texts) // 3
            return _split(split, texts[:bound], texts[bound:], "c4/sample.jsonl")
        texts = tuple(
            hub_texts(
                "allenai/c4",
                data_files={"validation": SHARD},
                split="validation",
                hint="export QTOOL_DATA=/path/to/data  # a folder that holds c4/sample.jsonl",
            )
        )
        return _split(split, texts[NUM_TEST:], texts[:NUM_TEST], f"hub:allenai/c4 {SHARD}")


def _split(split: str, train: tuple[str, ...], test: tuple[str, ...], source: str) -> Documents:
    texts = train if split == "train" else (" ".join(test),)
    return Documents(texts, joined=split == "test", source=f"{source} {split} sha256:{text_digest(texts)}")
