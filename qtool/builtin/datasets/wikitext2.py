"""WikiText-2, raw: Merity et al. 2016, Pointer Sentinel Mixture Models, arXiv:1609.07843.

The text is the rows of ``wikitext-2-raw-v1`` joined by two newlines, blank rows included, as GPTQ, QuaRot and nearly
every table since measure perplexity on it.
"""

from __future__ import annotations

from pathlib import Path

from qtool.builtin.datasets.hub import hub_texts
from qtool.model.text import Documents, require_split, text_digest

FILES = {
    "train": ("train.txt", "train_part.txt"),
    "validation": ("valid.txt",),
    "test": ("test.txt",),
}


class WikiText2:
    """WikiText-2 from ``wikitext2/*.txt`` of the data folder, else from the hub."""

    summary = "WikiText-2 raw, rows joined by blank lines (train, validation, test)"

    def documents(self, split: str, directory: Path | None) -> Documents:
        """Return a split as one joined text.

        Args:
            split: ``train``, ``validation`` or ``test``.
            directory: Folder with ``wikitext2/train.txt`` (or a part of it, ``train_part.txt``), ``valid.txt`` and
                ``test.txt`` in the original bytes; None, or a folder without them, goes to the hub.

        Raises:
            UsageError: There is no such split.
            DataError: The text is neither in the folder nor to be had from the hub.
        """
        require_split(split, tuple(FILES), "wikitext2")
        for name in FILES[split] if directory else ():
            if directory and (path := directory / "wikitext2" / name).is_file():
                return _joined(read_rows(path), f"wikitext2/{name}")
        rows = hub_texts(
            "Salesforce/wikitext",
            name="wikitext-2-raw-v1",
            split=split,
            hint=f"export QTOOL_DATA=/path/to/data  # a folder that holds wikitext2/{FILES[split][0]}",
        )
        return _joined(rows, f"hub:Salesforce/wikitext wikitext-2-raw-v1 {split}")


def read_rows(path: Path) -> list[str]:
    """Read the rows of an original file; a blank one is a space and a line feed there and stands for the empty row."""
    with path.open(encoding="utf-8", newline="\n") as lines:
        return [line if line.strip() else "" for line in lines]


def _joined(rows: list[str], source: str) -> Documents:
    text = "\n\n".join(rows)
    return Documents((text,), joined=True, source=f"{source} sha256:{text_digest((text,))}")
