"""Names that follow from content: digests of JSON values, tensors and files, and the keys and ids made of them.

A *key* says what was asked (known before the work starts), an *id* says what came out. Paths, times and machines are
never part of either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 20


def canonical_json(value: object) -> str:
    """Return JSON in ASCII with sorted keys, no spaces and no NaN: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_json(value: object) -> str:
    """Return the SHA-256 of a JSON value's canonical form, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_bytes(chunks: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of bytes that come in pieces, as 64 hex digits."""
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()


def digest_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in row-major order, as 64 hex digits."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_key(step: Mapping[str, Any], inputs: Mapping[str, str], subject: str) -> str:
    """Return what names a step's result before the step runs.

    Args:
        step: Name, method, version and config of the step.
        inputs: Id of each input artifact, by role.
        subject: Id of the model that the result speaks of.

    Returns:
        64 hex digits.
    """
    return digest_json({"step": dict(step), "inputs": dict(inputs), "subject": subject})


def artifact_id(key: str, tensors: Mapping[str, str]) -> str:
    """Return the identity of a result: its key together with the digest of every tensor."""
    return digest_json({"key": key, "tensors": dict(tensors)})
