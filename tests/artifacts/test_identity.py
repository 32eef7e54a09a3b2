"""Digests follow from content and from nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.artifacts import identity
from qtool.artifacts.identity import (
    artifact_id,
    canonical_json,
    digest_bytes,
    digest_file,
    digest_json,
    digest_tensor,
    step_key,
)

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=40)
@given(JSON)
def test_canonical_json_says_the_value_and_says_it_in_one_way(value: object) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text
    assert text.isascii()


def test_the_order_of_keys_does_not_matter_and_of_items_does() -> None:
    assert digest_json({"a": 1, "b": [1, 2]}) == digest_json({"b": [1, 2], "a": 1})
    assert digest_json([1, 2]) != digest_json([2, 1])


def test_a_path_that_is_not_utf8_can_be_written_down() -> None:
    surrogate = b"models/\xff".decode("utf-8", "surrogateescape")
    assert json.loads(canonical_json([surrogate])) == [surrogate]
    assert len(digest_json([surrogate])) == 64


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"x": -float("inf")}])
def test_values_that_are_not_finite_have_no_canonical_form(value: object) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(value)


def test_digests_are_plain_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 3
    expected = hashlib.sha256(content).hexdigest()
    (tmp_path / "file").write_bytes(content)
    assert digest_json({"b": None, "a": 0.5}) == hashlib.sha256(b'{"a":0.5,"b":null}').hexdigest()
    assert digest_bytes([content[:100], memoryview(content)[100:]]) == expected
    assert digest_file(tmp_path / "file") == expected
    monkeypatch.setattr(identity, "CHUNK", 7)
    assert digest_file(tmp_path / "file") == expected


def test_a_tensors_digest_is_that_of_its_values_however_they_lie_in_memory() -> None:
    matrix = torch.arange(12, dtype=torch.int16).reshape(3, 4)
    assert digest_tensor(matrix) == hashlib.sha256(matrix.numpy().tobytes()).hexdigest()
    assert digest_tensor(matrix.T.contiguous().T) == digest_tensor(matrix)
    assert digest_tensor(matrix.T) != digest_tensor(matrix)
    assert digest_tensor(torch.tensor(1.0, dtype=torch.bfloat16)) == hashlib.sha256(b"\x80\x3f").hexdigest()
    assert digest_tensor(torch.empty(0)) == hashlib.sha256(b"").hexdigest()
    assert digest_tensor(torch.ones(2, requires_grad=True)) == digest_tensor(torch.ones(2))


def test_a_key_follows_from_every_part_of_what_is_asked() -> None:
    asked: dict[str, Any] = {"step": {"name": "mitigate", "version": 1}, "inputs": {"plan": "p"}, "subject": "m"}
    key = step_key(**asked)
    assert key == step_key(**asked)
    others = [
        step_key(**asked | {"step": {"name": "mitigate", "version": 2}}),
        step_key(**asked | {"inputs": {"plan": "q"}}),
        step_key(**asked | {"inputs": {"statistics": "p"}}),
        step_key(**asked | {"subject": "n"}),
    ]
    assert len({key, *others}) == 5


def test_an_id_follows_from_key_and_tensors() -> None:
    ids = {
        artifact_id("k", {"a": "1", "b": "2"}),
        artifact_id("k", {"b": "2", "a": "1"}),
        artifact_id("l", {"a": "1", "b": "2"}),
        artifact_id("k", {"a": "2", "b": "1"}),
        artifact_id("k", {"a": "1"}),
    }
    assert len(ids) == 4
