"""Bits of a token in a quantized cache, by hand; told by inspect and kept with measurements."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.inspect import inspect
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.storage import cache_bits
from qtool.testing import TinyModel, tiny_model

LAYERS, HEADS, DIM = 2, 2, 8


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model() as model:
        yield model


@pytest.mark.parametrize(
    ("kv", "keys", "values"),
    [
        ("int4-sym-token-head-sfp16", 8 * 4 + 16, 8 * 4 + 16),
        ("int4-asym-token-head-sfp16", 8 * 4 + 16 + 4, 8 * 4 + 16 + 4),
        ("int3-asym-g4-sbf16", 8 * 3 + 2 * (16 + 3), 8 * 3 + 2 * (16 + 3)),
        (
            *("keys=int2-asym-channel-g32-real-sfp16,values=int2-asym-g4-real-sfp16",),
            *(8 * (2 + (16 + 16) / 32), 8 * 2 + 2 * 32),
        ),
        ("int4-asym-g8-offset-sfp16", 8 * 4 + 16 + 16, 8 * 4 + 16 + 16),
        ("keys=fp8-channel-g16,values=none", 8 * (8 + 32 / 16), 8 * 16),
        ("keys=none,values=fp8-tensor", 8 * 16, 8 * 8),
        ("fp4-g8-se8m0", 8 * 4 + 8, 8 * 4 + 8),
        ("fp4-g4-se4m3", 8 * 4 + 2 * 8, 8 * 4 + 2 * 8),
    ],
)
def test_bits_of_a_token(tiny: TinyModel, kv: str, keys: float, values: float) -> None:
    plugins = tiny.workspace.plugins
    scheme = read_scheme("", {"kv": kv}, plugins)
    found = cache_bits(scheme, tiny.subject.model, plugins)
    assert found == {"keys": LAYERS * HEADS * keys, "values": LAYERS * HEADS * values}


def test_inspect_and_measurements_tell_them(tiny: TinyModel, tmp_path: Path) -> None:
    kv = "keys=int2-asym-channel-g4-real-sfp16,values=int2-asym-g4-sfp16"
    scheme = read_scheme("", {"weights": "int8", "kv": kv}, tiny.workspace.plugins)
    made, _ = mitigate(MitigateRequest(str(tiny.path), "rtn", scheme), tiny.workspace)
    rows = inspect(str(made.path), tiny.workspace).tables["cache"].to_json()
    keys, values = 8 * (2 + 32 / 4), 8 * 2 + 2 * (16 + 2)
    per_token = [LAYERS * HEADS * bits for bits in (keys, values, keys + values)]
    assert [row["bits_per_token"] for row in rows] == per_token
    assert [row["bits_per_value"] for row in rows] == [keys / 8, values / 8, (keys + values) / 16]
    text = tmp_path / "own.txt"
    text.write_bytes(bytes(range(97, 123)) * 20)
    request = EvalRequest(str(made.path), perplexity=(str(text),), seq_len=16, max_windows=1)
    metrics = evaluate(request, tiny.workspace)[0].manifest
    assert metrics.details["cache_bits"] == dict(zip(("keys", "values"), per_token, strict=False))
    assert metrics.details["labels"]["kv"] == kv
    weights = read_scheme("W8A16", {}, tiny.workspace.plugins)
    plain, _ = mitigate(MitigateRequest(str(tiny.path), "rtn", weights), tiny.workspace)
    assert "cache" not in inspect(str(plain.path), tiny.workspace).tables
