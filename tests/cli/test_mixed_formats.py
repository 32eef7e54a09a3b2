"""Channels in a format of their own, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run


@pytest.mark.parametrize("method", ["atom", "resq"])
def test_a_plan_with_segments_is_quantized_and_evaluated(
    qtool: Run, made: dict[str, Path], tmp_path: Path, method: str
) -> None:
    scheme, short = ("--scheme", "W4A4-g16"), ("--max-windows", 1, "--seq-len", 32)
    lines = {
        "plan": ("transform", made["statistics"], "--method", method, *scheme),
        "quantized": ("mitigate", tmp_path / "plan.safetensors", "--method", "rtn", *scheme),
        "metrics": ("eval", tmp_path / "quantized.safetensors", "--perplexity", "speeches", *short),
    }
    for kind, words in lines.items():
        ended = qtool(
            *(f"{word}.safetensors" if isinstance(word, Path) and not word.suffix else word for word in words),
            "-o",
            tmp_path / f"{kind}.safetensors",
        )
        assert ended.code == 0, ended.err
    shown = qtool("inspect", tmp_path / "quantized.safetensors")
    assert shown.code == 0, shown.err
    assert "bits per weight linears" in shown.out
