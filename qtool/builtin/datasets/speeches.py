"""Two excerpts of State of the Union addresses that ship with the model ``tiny``: no download, no package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qtool.errors import DataError
from qtool.model.text import Documents, read_text_file, require_split

FOLDER = Path(__file__).parents[1] / "models" / "tiny"
FILES = {"train": "calibration.txt", "test": "evaluation.txt"}


class Speeches:
    """Excerpts that the model ``tiny`` was trained on (train), and others that it has never seen (test)."""

    summary = "excerpts of speeches for the model tiny (ship with qtool; train, test)"

    def documents(self, split: str, directory: Path | None) -> Documents:
        """Return a split as one joined text.

        Args:
            split: ``train`` or ``test``.
            directory: Not used: the text is inside the installed package.

        Raises:
            UsageError: There is no such split.
            DataError: The package was installed without its data.
        """
        require_split(split, tuple(FILES), "speeches")
        path = FOLDER / FILES[split]
        if not path.is_file():
            raise DataError(
                f"`{path.name}` is missing from this installation", hint="pip install --force-reinstall qtool"
            )
        documents = read_text_file(path)
        return replace(documents, source=f"speeches/{documents.source}")
