"""``pack`` as a ratio to copying the bytes that it writes, and its peak memory on a shallow and on a deep model.

Copying is what a disk allows: every byte is read once, written once and flushed. Packing reads codes, writes them,
puts them in order, and reads all of it back, some of it with a consumer's decoder, while it is flushed and digested;
imports and the making of an empty model, which a model of one block shows, are taken off.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tests.bench.process import MIB, Cost, measure, qtool
from tests.bench.table import say, show

DEPTHS = (1, 4, 16)
LAYOUTS = (
    ("compressed-tensors", "int4-sym-g64"),
    ("compressed-tensors", "nvfp4"),
    ("compressed-tensors", "fp8-channel"),
    ("gptq", "int4-sym-g64"),
    ("awq", "int4-sym-g64"),
    ("modelopt", "nvfp4"),
    ("gguf", "int4-sym-g32-sfp16-signed_full"),
    ("gguf", "nvfp4"),
    ("hf", "int4-sym-g64"),
)
COPY = """
import os, shutil, sys, time
start = time.perf_counter()
shutil.copyfile(sys.argv[1], sys.argv[2])
with open(sys.argv[2], "rb+") as file:
    os.fsync(file.fileno())
print(time.perf_counter() - start)
"""


def compare_packing(width: int, rounds: int) -> None:
    """Print, for each layout, what packing takes beside copying, and the memory that it needs.

    Args:
        width: Hidden size of the synthetic models.
        rounds: Times that everything runs in turn; the fastest counts.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {depth: _model(folder, width, depth) for depth in DEPTHS}
        for to, weights in LAYOUTS:
            found = {depth: _packed(folder, models[depth], to, weights, rounds) for depth in DEPTHS}
            fixed, shallow, deep = (found[depth] for depth in DEPTHS)
            spent = deep[0].seconds - fixed[0].seconds
            size, dense = (deep[index] - fixed[index] for index in (2, 3))
            copied = deep[1] * size / deep[2]
            rows.append(
                (
                    f"{to}, {weights}",
                    f"{size / MIB:.0f}",
                    f"{spent / copied:.1f}",
                    f"{dense / spent / 1e9:.2f}",
                    f"{shallow[0].peak / MIB:.0f}",
                    f"{deep[0].peak / MIB:.0f}",
                )
            )
    say(f"pack, random Llama of width {width}, {DEPTHS[-1]} blocks; without the {DEPTHS[0]} block of a small one")
    peaks = (f"peak of {depth} blocks, MiB" for depth in DEPTHS[1:])
    show(("layout", "written, MiB", "time / copying", "GB of 16-bit weights a second", *peaks), rows)


def _model(folder: Path, width: int, depth: int) -> Path:
    """Write a model of so many blocks."""
    model = folder / f"model-{depth}"
    model.mkdir()
    measure([sys.executable, str(Path(__file__).with_name("synthetic.py")), str(model), str(width), str(depth)])
    return model


def _packed(folder: Path, model: Path, to: str, weights: str, rounds: int) -> tuple[Cost, float, int, int]:
    """Pack a model, and copy what came out.

    Returns:
        The least cost, the least seconds of the copy, the bytes written, and the bytes of the model in 16 bits.
    """
    home, output, copy = folder / "home", folder / "out", folder / "copy"
    artifact = home / f"{model.name}-{weights}.safetensors"
    home.mkdir(exist_ok=True)
    if not artifact.exists():
        qtool("mitigate", str(model), "--method", "rtn", "--weights", weights, "-o", str(artifact), home=home)
    costs, copies = [], []
    for _ in range(rounds):
        costs.append(qtool("pack", str(artifact), "--to", to, "-o", str(output), home=home))
        written = max(output.iterdir(), key=lambda file: file.stat().st_size)
        copies.append(float(measure([sys.executable, "-c", COPY, str(written), str(copy)]).output))
        size = written.stat().st_size
        shutil.rmtree(output)
    dense = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return min(costs, key=lambda cost: cost.seconds), min(copies), size, dense
