"""What each layout stores, by part: together the tensors' bytes of its files, and each as counted by hand."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from qtool.builtin.exporters.gguf_blocks import bytes_by_part
from qtool.engine.subject import Subject
from qtool.plugins import Plugins
from qtool.steps.storage import written_storage
from tests.builtin.layouts.conftest import calibrated
from tests.builtin.packed import written

Make = Callable[..., Subject]
LINEARS = 2 * (64 * (128 + 2 * 64) + 128 * 64 + 3 * 64 * 96)  # weights of the linears of two blocks
ROWS = 2 * (128 + 2 * 64 + 64 + 2 * 96 + 64)
COUNT = 14
CASES: list[tuple[str, str, str, dict[str, int]]] = [
    (
        *("compressed-tensors", "int4-asym-g32", ""),
        {"codes": LINEARS // 2, "scales": LINEARS // 32 * 2, "zeros": LINEARS // 64, "layout": 16 * COUNT},
    ),
    (
        *("compressed-tensors", "int3-sym-channel", ""),
        {"codes": LINEARS * 3 // 8, "scales": ROWS * 2, "layout": 16 * COUNT},
    ),
    ("compressed-tensors", "int8-sym-channel", "int8-token", {"codes": LINEARS, "scales": ROWS * 2}),
    ("compressed-tensors", "fp8-channel", "", {"codes": LINEARS, "scales": ROWS * 4}),
    ("compressed-tensors", "mxfp4", "", {"codes": LINEARS // 2, "scales": LINEARS // 32}),
    (
        *("compressed-tensors", "nvfp4", "calibrated"),
        {"codes": LINEARS // 2, "scales": LINEARS // 16 + 4 * COUNT, "inputs": 4 * COUNT},
    ),
    (
        *("gptq", "int4-sym-g32", ""),
        {
            **{"codes": LINEARS // 2, "scales": LINEARS // 32 * 2, "zeros": LINEARS // 64},
            "layout": 2 * 4 * (6 * 64 - 64 + 128 + 96),
        },
    ),
    ("awq", "int4-asym-g32", "", {"codes": LINEARS // 2, "scales": LINEARS // 32 * 2, "zeros": LINEARS // 64}),
    (
        *("modelopt", "nvfp4", "calibrated"),
        {"codes": LINEARS // 2, "scales": LINEARS // 16 + 4 * COUNT, "inputs": 4 * COUNT},
    ),
    ("modelopt", "fp8-channel", "fp8-token", {"codes": LINEARS, "scales": ROWS * 4}),
    ("hf", "int4-asym-g32", "", {"unquantized": LINEARS * 2}),
]


@pytest.mark.parametrize(("to", "weights", "activations", "expected"), CASES)
def test_the_parts_of_a_layout_are_its_files_without_their_headers(
    make: Make, plugins: Plugins, tmp_path: Path, to: str, weights: str, activations: str, expected: dict[str, int]
) -> None:
    subject = make(weights, activations if activations != "calibrated" else "")
    if activations == "calibrated":
        subject = calibrated(subject, plugins, tmp_path / "changed")
    exported = written(plugins.load("exporters", to), subject, tmp_path / "out")
    sizes = cast("dict[str, Any]", exported.details["bytes"])
    assert sizes["parts"] == expected
    assert sizes["linears"] == sum(size for part, size in expected.items() if part != "inputs")
    whole = written_storage(subject.model, sizes)
    assert sum(whole.model.values()) == sum(map(data_bytes, (tmp_path / "out").glob("*.safetensors")))
    assert whole.linears == {part: size for part, size in expected.items() if part != "inputs"}
    assert whole.weights == LINEARS
    rest = 48 * 64 + 5 * 64  # a tied embedding, and norms
    dense = expected.get("unquantized", 0)
    assert whole.model["unquantized"] == dense + 2 * rest
    assert whole.bits["linears"] == sizes["linears"] * 8 / LINEARS


@pytest.mark.parametrize(
    ("kind", "block", "parts"),
    [
        ("Q4_0", 18, (16, 2, 0)),
        ("Q4_1", 20, (16, 2, 2)),
        ("Q8_0", 34, (32, 2, 0)),
        ("MXFP4", 17, (16, 1, 0)),
        ("NVFP4", 36, (32, 4, 0)),
    ],
)
def test_blocks_of_gguf_are_codes_scales_and_offsets(kind: Any, block: int, parts: tuple[int, int, int]) -> None:  # noqa: ANN401 - one of the types
    assert tuple(bytes_by_part(kind, 7 * block).values()) == tuple(7 * size for size in parts)


def data_bytes(file: Path) -> int:
    """Return the size of a safetensors file without its header."""
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    return file.stat().st_size - 8 - int(length)
