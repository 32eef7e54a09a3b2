"""The text that a step asks for, as windows of token ids."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from qtool.errors import DataError, UsageError
from qtool.model.source import Model
from qtool.model.text import SUFFIXES, Documents, calibration_windows, disjoint_windows, read_text_file, tokenize
from qtool.steps.workspace import Workspace


def text_name(data: str) -> str:
    """Return the name under which a text is known: a dataset's own, or a file's without its folder."""
    return Path(data).name if Path(data).is_file() else data


def read_documents(data: str, split: str, workspace: Workspace) -> Documents:
    """Read a dataset by name, or a file by path.

    Raises:
        DataError: The text cannot be read.
        UsageError: Neither a file nor a known name.
    """
    if Path(data).is_file():
        return read_text_file(Path(data))
    if data not in workspace.plugins.offers["datasets"] and (Path(data).name != data or data.endswith(SUFFIXES)):
        raise DataError(f"no such file `{data}`", hint="check the path, or name a dataset: qtool plugins datasets")
    documents: Documents = workspace.plugins.load("datasets", data).documents(split, workspace.data)
    return documents


def check_seq_len(seq_len: int, model: Model) -> None:
    """Refuse windows that are longer than the model's context.

    Raises:
        UsageError: ``seq_len`` exceeds the positions that the model knows.
    """
    limit = model.graph.dims.max_positions
    if seq_len > limit:
        raise UsageError(
            "the windows are longer than the model's context",
            facts=(("context", limit), ("seq-len", seq_len)),
            hint=f"--seq-len {limit}",
        )


def calibration_text(
    data: str, model: Model, workspace: Workspace, *, num_samples: int, seq_len: int, seed: int
) -> tuple[Int64[Tensor, "samples seq"], str]:
    """Return random windows of the training split, and where the text came from."""
    check_seq_len(seq_len, model)
    documents = read_documents(data, "train", workspace)
    return calibration_windows(model.tokenizer(), documents, num_samples, seq_len, seed), documents.source


def evaluation_text(
    data: str, model: Model, workspace: Workspace, *, seq_len: int, max_windows: int | None
) -> tuple[Int64[Tensor, "windows seq"], str]:
    """Return disjoint windows of the test split, and where the text came from."""
    check_seq_len(seq_len, model)
    documents = read_documents(data, "test", workspace)
    return disjoint_windows(tokenize(model.tokenizer(), documents), seq_len, max_windows), documents.source
