"""Peak memory on a model whose weights alone exceed a limit, and on one of four blocks of the same width.

The peaks of the two differ by what every further block leaves in memory.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.bench.process import MIB, Cost, measure, qtool
from tests.bench.table import say, show

SHALLOW = 4
SAMPLES, SEQ_LEN = 16, 256


def check_memory(limit: int, width: int) -> bool:
    """Print the peaks of calibrate and mitigate; return whether all of them stay below the limit.

    Args:
        limit: Bytes that no process may exceed, and that the weights do.
        width: Hidden size of the synthetic models.
    """
    block = 2 * (4 * width * width + 3 * width * (8 * width // 3 // 64 * 64))  # linears in bfloat16
    depths = (SHALLOW, max(SHALLOW, limit * 5 // 4 // block) + 1)
    floor = measure([sys.executable, "-c", "import torch, transformers, qtool.engine.network"]).peak
    with tempfile.TemporaryDirectory() as folder:
        found = {depth: _peaks(Path(folder) / str(depth), width, depth) for depth in depths}
    say(f"random Llama of width {width}, {block / MIB:.0f} MiB a block, {SAMPLES} x {SEQ_LEN} tokens, GPTQ in bfloat16")
    rows = [
        (f"{depth}", f"{depth * block / MIB:.0f}", *(f"{cost.peak / MIB:.0f}" for cost in found[depth].values()))
        for depth in depths
    ]
    show(("blocks", "weights, MiB", *(f"{step}, MiB" for step in found[SHALLOW])), rows)
    highest = max(cost.peak for costs in found.values() for cost in costs.values())
    verdict = "kept" if highest < limit else "EXCEEDED"
    say(f"peak {highest / MIB:.0f} MiB, of which imports {floor / MIB:.0f}; limit {limit / MIB:.0f} MiB {verdict}")
    return highest < limit


def _peaks(folder: Path, width: int, depth: int) -> dict[str, Cost]:
    """Make a model and run the steps on it."""
    model, text, home = folder / "model", folder / "text.txt", folder / "home"
    model.mkdir(parents=True)
    text.write_text(" ".join(map(str, range(4000))))
    script = str(Path(__file__).with_name("synthetic.py"))
    measure([sys.executable, script, str(model), str(width), str(depth)])
    windows = ("--num-samples", str(SAMPLES), "--seq-len", str(SEQ_LEN))
    calibrated = qtool("calibrate", str(model), "--data", str(text), *windows, home=home)
    gptq = (calibrated.output, "--method", "gptq", "--weights", "int4-g64")
    return {
        "calibrate": calibrated,
        "mitigate": qtool("mitigate", *gptq, home=home),
        "mitigate without passes": qtool("mitigate", *gptq, "--propagate", "none", home=home),
    }
