"""Text that models are calibrated and measured on: documents, their tokens, and windows of tokens.

A dataset gives `Documents`; ``joined`` ones are a single long text that is tokenized once and cut into windows
(the protocol of WikiText-2 in GPTQ and QuaRot), others are separate texts, from each of which at most one window at a
time is drawn (their protocol of C4). No chat template and no special token is added beyond the tokenizer's own.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from qtool.errors import DataError, UsageError

FIELDS = ("text", "page", "content")
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
JSON_LINES = 'every line is an object such as {"text": "…"}'


@dataclass(frozen=True)
class Documents:
    """Text, and where it came from.

    Attributes:
        texts: The documents; exactly one if ``joined``.
        joined: One long text to be tokenized once, rather than separate documents.
        source: How the text was obtained, for the manifest: names, versions and digests, never a folder.
    """

    texts: tuple[str, ...]
    joined: bool
    source: str

    def __post_init__(self) -> None:
        if self.joined and len(self.texts) != 1:
            raise DataError(
                f"`{self.source}` claims to be one joined text",
                facts=(("texts expected", 1), ("texts received", len(self.texts))),
            )
        if not any(text.strip() for text in self.texts):
            raise DataError(f"`{self.source}` has no text", hint="choose another split or file")


@runtime_checkable
class Dataset(Protocol):
    """A named source of text. Every dataset has a split ``train`` to calibrate on and a split ``test``."""

    summary: str

    def documents(self, split: str, directory: Path | None) -> Documents:
        """Return the text of a split.

        Args:
            split: ``train``, ``test``, or another that this dataset has.
            directory: Local folder that may hold a copy of the data; None to do without.

        Raises:
            UsageError: There is no such split.
            DataError: The text cannot be obtained.
        """
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """What this module asks of a transformers tokenizer."""

    def __call__(self, text: str, *, verbose: bool) -> Mapping[str, Any]:
        """Return at least ``input_ids``, a list of integers."""
        ...


def require_split(split: str, splits: Sequence[str], dataset: str) -> None:
    """Refuse a split that a dataset does not have.

    Raises:
        UsageError: ``split`` is none of ``splits``.
    """
    if split not in splits:
        raise UsageError(
            f"`{dataset}` has no split `{split}`", facts=(("splits", ", ".join(splits)), ("received", split))
        )


def text_digest(texts: Sequence[str]) -> str:
    """Return the first 16 hex digits of the SHA-256 of texts with a zero byte between them."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def read_text_file(path: Path) -> Documents:
    """Read a user's own text.

    ``.txt`` is one joined text; each row of ``.jsonl``, ``.jsonl.gz`` (field ``text``, ``page`` or ``content``) and
    ``.parquet`` (column of one of these names) is a document.

    Raises:
        DataError: Missing, of another suffix, not UTF-8, damaged, empty, or without a known field.
    """
    suffix = next((s for s in reversed(SUFFIXES) if path.name.lower().endswith(s)), "")
    if not suffix:
        raise DataError(
            f"cannot tell what kind of text `{path}` is",
            facts=(("suffixes", ", ".join(SUFFIXES)), ("received", path.suffix or "none")),
            hint="rename the file; .txt is one long text",
        )
    try:
        content = path.read_bytes()
        if suffix == ".jsonl.gz":
            content = gzip.decompress(content)
        if suffix == ".parquet":
            texts = _parquet_texts(content, path)
        elif suffix == ".txt":
            texts = (content.decode("utf-8"),)
        else:
            texts = tuple(_json_texts(content.decode("utf-8"), path))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(
            f"cannot read text from `{path}`", facts=(("reason", reason),), hint="give a file in UTF-8"
        ) from error
    return Documents(texts, joined=suffix == ".txt", source=f"{path.name} sha256:{text_digest(texts)}")


def tokenize(tokenizer: Tokenizer, documents: Documents) -> Int64[Tensor, " tokens"]:
    """Turn documents into one stream of token ids.

    Joined text is tokenized in one call, separate documents each by itself and then put one after the other. Special
    tokens are those that the tokenizer adds of its own accord, once a call.

    Raises:
        DataError: Not a single token comes out.
    """
    ids = [token for text in documents.texts for token in _token_ids(tokenizer, text)]
    if not ids:
        raise DataError(f"`{documents.source}` gives no tokens", hint="give another text")
    return torch.tensor(ids, dtype=torch.int64)


def draw_windows(
    tokens: Int64[Tensor, " tokens"], num_samples: int, seq_len: int, seed: int
) -> Int64[Tensor, "samples seq"]:
    """Draw windows at random places of a token stream; they may overlap.

    Starts come from ``random.Random(seed).randint(0, tokens - seq_len - 1)``, as in the code of GPTQ and its
    successors, so that the same seed gives the same windows there.

    Raises:
        UsageError: A count or length is not positive.
        DataError: The stream is too short.

    References:
        Frantar et al. 2023, GPTQ, arXiv:2210.17323, section 4 (128 random segments of 2048 tokens).
    """
    _require_positive(num_samples=num_samples, seq_len=seq_len)
    _require_tokens(needed=seq_len + 1, available=len(tokens))
    rng = random.Random(seed)
    starts = [rng.randint(0, len(tokens) - seq_len - 1) for _ in range(num_samples)]
    return torch.stack([tokens[start : start + seq_len] for start in starts])


def draw_document_windows(
    tokenizer: Tokenizer, documents: Documents, num_samples: int, seq_len: int, seed: int
) -> Int64[Tensor, "samples seq"]:
    """Draw each window from one random document that is long enough, at a random place.

    Documents are drawn with replacement until one has more than ``seq_len`` tokens; each is tokenized at most once.

    Raises:
        UsageError: A count or length is not positive.
        DataError: No document is long enough.
    """
    _require_positive(num_samples=num_samples, seq_len=seq_len)
    rng = random.Random(seed)
    tokenized: dict[int, list[int]] = {}
    too_short: set[int] = set()
    windows: list[list[int]] = []
    while len(windows) < num_samples:
        index = rng.randint(0, len(documents.texts) - 1)
        if index not in tokenized:
            tokenized[index] = _token_ids(tokenizer, documents.texts[index])
        ids = tokenized[index]
        if len(ids) <= seq_len:
            too_short.add(index)
            if len(too_short) == len(documents.texts):
                _require_tokens(needed=seq_len + 1, available=max(map(len, tokenized.values())))
            continue
        start = rng.randint(0, len(ids) - seq_len - 1)
        windows.append(ids[start : start + seq_len])
    return torch.tensor(windows, dtype=torch.int64)


def calibration_windows(
    tokenizer: Tokenizer, documents: Documents, num_samples: int, seq_len: int, seed: int
) -> Int64[Tensor, "samples seq"]:
    """Draw random windows by the protocol that fits the documents: `draw_windows` or `draw_document_windows`."""
    if documents.joined:
        return draw_windows(tokenize(tokenizer, documents), num_samples, seq_len, seed)
    return draw_document_windows(tokenizer, documents, num_samples, seq_len, seed)


def disjoint_windows(
    tokens: Int64[Tensor, " tokens"], seq_len: int, max_windows: int | None = None
) -> Int64[Tensor, "windows seq"]:
    """Cut a token stream into consecutive windows; the tail that fills none is dropped.

    Args:
        tokens: The stream. Not modified.
        seq_len: Tokens per window.
        max_windows: Keep the first so many; None for all.

    Raises:
        UsageError: A count or length is not positive.
        DataError: The stream does not fill one window.
    """
    _require_positive(seq_len=seq_len, max_windows=1 if max_windows is None else max_windows)
    _require_tokens(needed=seq_len, available=len(tokens))
    n_windows = len(tokens) // seq_len
    if max_windows is not None:
        n_windows = min(n_windows, max_windows)
    return tokens[: n_windows * seq_len].reshape(n_windows, seq_len)


def token_digest(tokens: Int64[Tensor, "*shape"]) -> str:
    """Return the SHA-256 of token ids as little-endian 32-bit integers in row-major order, as 64 hex digits."""
    return hashlib.sha256(tokens.detach().cpu().numpy().astype("<i4").tobytes()).hexdigest()


def _token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenize one text; ``verbose=False`` because a text longer than the context is what is wanted here."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UsageError(f"`{name.replace('_', '-')}` must be positive", facts=(("received", number),))


def _require_tokens(*, needed: int, available: int) -> None:
    if available < needed:
        shorter = 2 ** ((available - 1).bit_length() - 1) if available > 1 else 0
        raise DataError(
            "the text is too short for one window",
            facts=(("tokens needed", needed), ("tokens available", available)),
            hint=f"--seq-len {shorter}" if shorter else "use more text",
        )


def _json_texts(content: str, path: Path) -> Iterator[str]:
    """Yield the text of each row; the first row decides which field holds it."""
    field: str | None = None
    for number, line in enumerate(io.StringIO(content, newline="\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"line {number} of `{path}` is not JSON", facts=(("reason", error),), hint=JSON_LINES
            ) from error
        names = tuple(row) if isinstance(row, dict) else ()
        field = field or _text_field(names, f"line {number} of `{path}`")
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise DataError(
                f"line {number} of `{path}` has no text in `{field}`",
                facts=(("fields found", ", ".join(names) or "none"),),
                hint=JSON_LINES,
            )
        yield row[field]


def _parquet_texts(content: bytes, path: Path) -> tuple[str, ...]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"reading `{path}` needs the package `pyarrow`", hint="pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(io.BytesIO(content))
        field = _text_field(tuple(file.schema_arrow.names), f"`{path}`")
        return tuple(str(text) for text in file.read(columns=[field]).column(field).to_pylist() if text is not None)
    except ValueError as error:  # pyarrow's errors about damaged files
        raise DataError(
            f"`{path}` is not a Parquet file, or is damaged", facts=(("reason", error),), hint="get the file again"
        ) from error


def _text_field(names: Sequence[str], where: str) -> str:
    """Return the first known field that is there."""
    for field in FIELDS:
        if field in names:
            return field
    raise DataError(
        f"{where} has no field that holds text",
        facts=(("fields expected", " or ".join(FIELDS)), ("fields found", ", ".join(names) or "none")),
        hint=f"rename the field that holds it to `{FIELDS[0]}`",
    )
