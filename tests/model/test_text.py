"""Windows follow the field's protocols token by token; files that cannot be read are refused in one sentence."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import DataError, UsageError
from qtool.model.text import (
    Documents,
    calibration_windows,
    disjoint_windows,
    draw_document_windows,
    draw_windows,
    read_text_file,
    require_split,
    token_digest,
    tokenize,
)


class Letters:
    """Tokenizes to code points after one token of its own, 7, and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, text: str, *, verbose: bool) -> dict[str, Any]:
        assert not verbose
        self.calls.append(text)
        return {"input_ids": [7, *map(ord, text)]}


def joined(text: str) -> Documents:
    return Documents((text,), joined=True, source="test")


def separate(*texts: str) -> Documents:
    return Documents(texts, joined=False, source="test")


def test_joined_text_is_tokenized_in_one_call() -> None:
    tokenizer = Letters()
    assert tokenize(tokenizer, joined("ab\n\ncd")).tolist() == [7, 97, 98, 10, 10, 99, 100]
    assert tokenizer.calls == ["ab\n\ncd"]


def test_separate_documents_are_tokenized_one_by_one() -> None:
    assert tokenize(Letters(), separate("ab", "", "c")).tolist() == [7, 97, 98, 7, 7, 99]


def test_text_without_tokens() -> None:
    with pytest.raises(DataError, match="gives no tokens"):
        tokenize(lambda text, *, verbose: {"input_ids": []}, joined("ab"))


@given(st.integers(2, 200), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_drawn_windows_are_those_of_the_protocol(n_tokens: int, num_samples: int, seed: int) -> None:
    tokens = torch.arange(n_tokens) * 3
    seq_len = max(1, n_tokens // 3)
    windows = draw_windows(tokens, num_samples, seq_len, seed)
    state = random.getstate()
    random.seed(seed)  # the global generator, as the published code uses it
    for window in windows:
        start = random.randint(0, n_tokens - seq_len - 1)
        assert window.tolist() == [3 * (start + i) for i in range(seq_len)]
    random.setstate(state)


def test_drawn_windows_of_one_seed_for_good() -> None:
    windows = draw_windows(torch.arange(1000), 4, 3, seed=0)
    assert windows[:, 0].tolist() == [864, 394, 776, 911]
    assert (windows - windows[:, :1]).tolist() == [[0, 1, 2]] * 4


def test_drawing_needs_one_token_more_than_a_window() -> None:
    assert draw_windows(torch.arange(5), 3, 4, seed=1).tolist() == [[0, 1, 2, 3]] * 3
    with pytest.raises(DataError) as caught:
        draw_windows(torch.arange(4), 3, 4, seed=1)
    assert caught.value.facts == (("tokens needed", 5), ("tokens available", 4))
    assert caught.value.hint == "--seq-len 2"
    assert draw_windows(torch.arange(4), 1, 2, seed=1).shape == (1, 2)  # the hint holds


def test_document_windows_come_from_documents_that_are_long_enough() -> None:
    texts = ("short", "abcdefghijklmnopqrstuvwxyz", "tiny", "ABCDEFGHIJKLMNOP")
    tokenizer = Letters()
    windows = draw_document_windows(tokenizer, separate(*texts), 20, 10, seed=3)
    rng = random.Random(3)
    expected = []
    while len(expected) < 20:
        tokens = [7, *map(ord, texts[rng.randint(0, 3)])]
        if len(tokens) > 10:
            start = rng.randint(0, len(tokens) - 11)
            expected.append(tokens[start : start + 10])
    assert windows.tolist() == expected
    assert {window[-1] > 90 for window in windows.tolist()} == {True, False}  # both long documents were drawn
    assert sorted(tokenizer.calls) == sorted(texts)  # each once


def test_document_windows_when_no_document_is_long_enough() -> None:
    with pytest.raises(DataError) as caught:
        draw_document_windows(Letters(), separate("abc", "abcde"), 1, 6, seed=0)
    assert caught.value.facts == (("tokens needed", 7), ("tokens available", 6))


def test_calibration_windows_choose_the_protocol() -> None:
    text = "the quick brown fox jumps over the lazy dog"
    tokens = tokenize(Letters(), joined(text))
    assert torch.equal(calibration_windows(Letters(), joined(text), 5, 8, 2), draw_windows(tokens, 5, 8, 2))
    documents = separate("no", text)
    expected = draw_document_windows(Letters(), documents, 5, 8, 2)
    assert torch.equal(calibration_windows(Letters(), documents, 5, 8, 2), expected)


def test_disjoint_windows_drop_the_tail() -> None:
    tokens = torch.arange(11)
    assert disjoint_windows(tokens, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert disjoint_windows(tokens, 4, max_windows=1).tolist() == [[0, 1, 2, 3]]
    assert disjoint_windows(tokens, 4, max_windows=9).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert disjoint_windows(tokens, 11).tolist() == [list(range(11))]
    with pytest.raises(DataError, match=r"too short for one window\n  tokens needed     12\n  tokens available  11"):
        disjoint_windows(tokens, 12)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"num_samples": 0, "seq_len": 4}, "num-samples"), ({"num_samples": 1, "seq_len": -2}, "seq-len")],
)
def test_counts_must_be_positive(arguments: dict[str, int], name: str) -> None:
    with pytest.raises(UsageError, match=f"`{name}` must be positive"):
        draw_windows(torch.arange(9), **arguments, seed=0)
    with pytest.raises(UsageError, match="`max-windows` must be positive"):
        disjoint_windows(torch.arange(9), 3, max_windows=0)


def test_token_digest_is_of_little_endian_int32() -> None:
    expected = hashlib.sha256(struct.pack("<4i", 1, 256, 49151, 2**31 - 1)).hexdigest()
    assert token_digest(torch.tensor([1, 256, 49151, 2**31 - 1])) == expected
    assert token_digest(torch.tensor([[1, 256], [49151, 2**31 - 1]])) == expected
    assert token_digest(torch.tensor([[1, 49151], [256, 2**31 - 1]]).T) == expected


def test_txt_is_one_text_to_the_byte(tmp_path: Path) -> None:
    content = " \r\n = Title = \n\u2028 é\n"
    (tmp_path / "notes.txt").write_bytes(content.encode())
    documents = read_text_file(tmp_path / "notes.txt")
    assert documents.texts == (content,)
    assert documents.joined
    assert documents.source == f"notes.txt sha256:{hashlib.sha256(content.encode()).hexdigest()[:16]}"


@pytest.mark.parametrize("field", ["text", "page", "content"])
@pytest.mark.parametrize("compressed", [False, True])
def test_jsonl_rows_are_documents(tmp_path: Path, field: str, compressed: bool) -> None:
    rows = "\n".join(json.dumps({"id": i, field: t}) for i, t in enumerate(["one\u2028more", "", "three"])) + "\n\n"
    path = tmp_path / ("rows.jsonl.gz" if compressed else "rows.jsonl")
    path.write_bytes(gzip.compress(rows.encode(), mtime=0) if compressed else rows.encode())
    documents = read_text_file(path)
    assert documents.texts == ("one\u2028more", "", "three")
    assert not documents.joined


def test_parquet_column_is_documents(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"id": [1, 2, 3], "content": ["one", None, "two"]}), tmp_path / "rows.parquet")
    assert read_text_file(tmp_path / "rows.parquet").texts == ("one", "two")
    parquet.write_table(arrow.table({"id": [1], "body": ["one"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="fields expected  text or page or content\n  fields found     id, body"):
        read_text_file(tmp_path / "other.parquet")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="not a Parquet file, or is damaged"):
        read_text_file(tmp_path / "rows.parquet")


def test_only_a_line_feed_ends_a_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text":\r"one"}\r\n{"text": "two"}')
    assert read_text_file(tmp_path / "rows.jsonl").texts == ("one", "two")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"text\nabc\n", "cannot tell what kind of text"),
        ("empty.txt", b" \n\n", "has no text"),
        ("empty.jsonl", b"\n", "has no text"),
        ("latin.txt", "é".encode("latin-1"), "cannot read text"),
        ("rows.jsonl", b'{"text": "one"}\n{"text": \n', "line 2 of .* is not JSON"),
        ("rows.jsonl", b'{"body": "one", "id": 3}\n', "(?s)line 1 .* no field that holds.*body, id"),
        ("rows.jsonl", b'{"text": "one"}\n{"page": "two"}\n', "line 2 .* has no text in `text`"),
        ("rows.jsonl", b'["one"]\n', "no field that holds text"),
        ("rows.jsonl.gz", b"not compressed", "cannot read text"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 99, mtime=0)[:-20], "cannot read text"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_text_file(tmp_path / name)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)cannot read text.*No such file"):
        read_text_file(tmp_path / "nowhere.txt")


def test_joined_means_one_text() -> None:
    with pytest.raises(DataError, match="claims to be one joined text"):
        Documents(("one", "two"), joined=True, source="test")


def test_unknown_split() -> None:
    require_split("test", ("train", "test"), "c4")
    with pytest.raises(UsageError, match="`c4` has no split `dev`\n  splits    train, test"):
        require_split("dev", ("train", "test"), "c4")
