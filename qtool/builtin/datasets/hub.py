"""Rows of a dataset on the Hugging Face hub, through the optional package ``datasets``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping

from qtool.errors import DataError, ResourceError


def hub_texts(
    repository: str, *, name: str | None = None, data_files: Mapping[str, str] | None = None, split: str, hint: str
) -> list[str]:
    """Download a split, or find it in the cache of ``datasets``, and return its column ``text``.

    Args:
        repository: Owner and name.
        name: Configuration of the dataset, if it has several.
        data_files: Split to file inside the repository, to read no more than that file.
        split: Split to return.
        hint: What to do if there is no network.

    Raises:
        DataError: ``datasets`` is not installed, or the hub has another data set than expected.
        ResourceError: The hub cannot be reached.
    """
    try:
        datasets = importlib.import_module("datasets")
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        rows = datasets.load_dataset(
            repository, name=name, data_files=dict(data_files) if data_files else None, split=split
        )
        return [str(text) for text in rows["text"]]
    except (ImportError, OSError, ValueError, KeyError) as error:
        kind = ResourceError if isinstance(error, ConnectionError) else DataError
        raise kind(
            f"`{repository}` is neither in the data folder nor to be had from the hub",
            facts=(("reason", error),),
            hint=hint,
        ) from error
