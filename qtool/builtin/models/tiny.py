"""The model that ships inside the package, for examples and tests that need no download."""

from __future__ import annotations

from pathlib import Path

from qtool.errors import ModelError

FOLDER = Path(__file__).parent / "tiny"


class Tiny:
    """A Llama of about a million parameters, trained on the State of the Union speeches; see its ``README.md``."""

    summary = "a 1M-parameter Llama trained on State of the Union speeches (ships with qtool)"
    version = 1

    def fetch(self, cache: Path) -> Path:
        """Return the folder of the model inside the installed package.

        Args:
            cache: Not used: there is nothing to keep.

        Raises:
            ModelError: The package was installed without its data.
        """
        if not (FOLDER / "config.json").is_file():
            raise ModelError(
                "the model `tiny` is missing from this installation", hint="pip install --force-reinstall qtool"
            )
        return FOLDER
