"""`qtool doctor CHECKPOINT` says of every checkpoint that qtool packs what `pack` said of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run

# Exporter and scheme: all exporters, and of compressed-tensors all layouts.
ASYMMETRIC = "int4-asym-g64"
APART = "int4-sym-g64,q_proj=int8-sym-channel"
TOGETHER = "int4-sym-g64,down_proj=int8-sym-channel"
PRESETS = ("W4A16", "W4A4", "W4A4_SYM", "W8A8", "FP8_DYNAMIC", "MXFP4", "NVFP4")
PACKED = (
    *(("compressed-tensors", scheme) for scheme in PRESETS),
    ("compressed-tensors", APART),
    ("compressed-tensors", TOGETHER),
    ("gptq", "W4A16"),
    ("gptq-v2", ASYMMETRIC),
    ("awq", ASYMMETRIC),
    ("modelopt", "NVFP4"),
    ("modelopt", "FP8_DYNAMIC"),
    ("modelopt", "FP8"),
    ("hf", "W4A4"),
    ("gguf", "MXFP4A16"),
    ("gguf-f16", "W4A16"),
)


@pytest.fixture(scope="module")
def packed(qtool: Run, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Mapping[str, Path]:
    """Checkpoints of `tiny` by exporter and scheme."""
    folder = tmp_path_factory.mktemp("packed")
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTOOL_CACHE", str(cache))
        patch.setenv("QTOOL_HOME", str(folder / "home"))
        text = ("--data", "speeches", "--num-samples", 4, "--seq-len", 64)
        ended = qtool("calibrate", "tiny", *text, "--gather", "absmax")
        assert ended.code == 0, ended.err
        statistics = ended.out.strip()
        for exporter, scheme in PACKED:
            option = "--weights" if scheme in (ASYMMETRIC, APART, TOGETHER) else "--scheme"
            ended = qtool("mitigate", statistics, "--method", "rtn", option, scheme)
            assert ended.code == 0, ended.err
            path = folder / f"{exporter}-{scheme}"
            ended = qtool("pack", ended.out.strip(), "--to", exporter, "-o", path)
            assert ended.code == 0, ended.err
            made[f"{exporter} {scheme}"] = path
    return made


def rows(qtool: Run, path: Path, *words: str) -> list[dict[str, Any]]:
    ended = qtool("doctor", path, *words, "--json")
    assert ended.code in (0, 8), ended.err
    found: list[dict[str, Any]] = json.loads(ended.out)["consumers"]
    return found


@pytest.mark.parametrize("name", [" ".join(one) for one in PACKED])
def test_doctor_says_what_pack_said(qtool: Run, packed: Mapping[str, Path], name: str) -> None:
    path = packed[name]
    told = json.loads((path / "qtool.json").read_text())["details"]["consumers"]
    found = {(row["consumer"], row["device"]): row for row in rows(qtool, path)}
    for consumer, text in told.items():
        plain = consumer.removesuffix(" on a CPU")
        devices = [device for of, device in found if of == plain and (device == "cpu") == (plain != consumer)]
        assert devices
        for device in devices:
            executes = found[plain, device]["executes"]
            head = executes.split(":")[0].split(",")[0]
            assert head in text, (device, executes, text)
            assert (found[plain, device]["verdict"] == "unknown") == text.startswith("unknown") or plain == "sglang"
            if len({found[plain, one]["executes"] for one in devices}) == 1 and "," not in name:
                assert text.startswith(executes)


@pytest.mark.parametrize(
    ("name", "consumer", "device", "code", "says"),
    [
        ("compressed-tensors W4A16", "vllm", "sm90", 0, ""),
        ("compressed-tensors W4A4", "vllm", "sm90", 8, "vllm on sm90: will not load"),
        ("compressed-tensors W4A4", "transformers", "", 0, ""),
        ("compressed-tensors W4A4_SYM", "vllm", "sm89", 8, "vllm on sm89: loads, but executes something else"),
        ("compressed-tensors W4A4_SYM", "transformers", "", 0, ""),
        ("compressed-tensors NVFP4", "vllm", "sm90", 8, "vllm on sm90: loads, but executes something else"),
        ("compressed-tensors NVFP4", "vllm", "sm100", 0, ""),
        ("gptq-v2 int4-asym-g64", "vllm", "cpu", 8, "vllm on cpu: will not load"),
        ("modelopt FP8_DYNAMIC", "transformers", "", 8, "transformers: will not load"),
        ("compressed-tensors MXFP4", "sglang", "cpu", 8, "sglang on cpu: will not load"),
        ("gguf MXFP4A16", "llama.cpp", "", 0, ""),
        (f"compressed-tensors {APART}", "vllm", "sm90", 8, "vllm on sm90: will not load"),
        (f"compressed-tensors {APART}", "transformers", "", 0, ""),
        (f"compressed-tensors {TOGETHER}", "vllm", "sm90", 0, ""),
        ("modelopt FP8", "vllm", "sm90", 8, "vllm on sm90: loads, but executes something else"),
        ("modelopt FP8", "tensorrt-llm", "", 0, ""),
    ],
)
def test_the_exit_code_says_whether_it_runs_as_meant(
    qtool: Run, packed: Mapping[str, Path], name: str, consumer: str, device: str, code: int, says: str
) -> None:
    words = ("--for", consumer, *(("--on", device) if device else ()))
    ended = qtool("doctor", packed[name], *words)
    assert ended.code == code, ended.err
    assert consumer in ended.out
    assert ended.err.startswith(f"error: {says}" if says else "")
    (row,) = rows(qtool, packed[name], *words)
    assert (row["verdict"] == "loads") == (code == 0)


def test_people_read_neighbouring_devices_alike_on_one_line(qtool: Run, packed: Mapping[str, Path]) -> None:
    ended = qtool("doctor", packed["compressed-tensors MXFP4"])
    lines = [re.split(r"\s\s+", line.strip()) for line in ended.out.splitlines() if " vllm " in line]
    assert [line[1] for line in lines] == ["sm75", "sm80 to sm89", "sm90", "sm100", "cpu"]
    assert lines[2][3].endswith("; kernel HummingMxFp4LinearKernel (0.33, code read)")
    assert "Failed to find a kernel" not in ended.out
    assert rows(qtool, packed["compressed-tensors MXFP4"], "--for", "vllm", "--on", "cpu")[0]["message"]


@pytest.mark.parametrize(
    ("words", "code", "says", "hint"),
    [
        (("/nowhere",), 3, "there is no checkpoint `/nowhere`", "give a folder that holds config.json, or a GGUF file"),
        ((".", "--for", "vlm"), 2, "there is no consumer called `vlm`", "--for vllm"),
        (("--for", "vllm"), 2, "`--for` belongs to a checkpoint", "qtool doctor CHECKPOINT --for …"),
        ((".", "--on", "sm90"), 2, "`--on` belongs to `--for`; without it all devices are shown", "--for vllm"),
        ((".", "--for", "vllm", "--on", "h100"), 2, "there is no device called `h100`", "--on sm90"),
        ((".", "--for", "vllm", "--on", "sm999"), 2, "there is no device called `sm999`", "--on sm121"),
        ((".", "--for", "vllm", "--on", "sm91"), 2, "there is no device called `sm91`", "--on sm90"),
    ],
)
def test_bad_words_end_in_a_sentence(qtool: Run, words: tuple[str, ...], code: int, says: str, hint: str) -> None:
    ended = qtool("doctor", *words)
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.splitlines()[0] == f"error: {says}"
    assert ended.err.splitlines()[-1] == f"hint: {hint}"
