"""``pack`` as a ratio to copying the bytes that it writes, and its peak memory on a shallow and on a deep model.

Copying is what a disk allows: every byte is read once, written once and flushed. Packing reads codes, writes them,
puts them in order, and reads all of it back, some of it with a consumer's decoder, while it is flushed and digested.
Imports, which take seconds, are not in it: one process packs again and again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.bench.process import MIB, Cost, measure, qtool
from tests.bench.table import say, show

DEPTHS = (4, 16)
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
            shallow, deep = (_packed(folder, models[depth], to, weights, rounds) for depth in DEPTHS)
            spent, copied, size = (float(number) for number in deep.output.split()[-3:])
            rows.append(
                (
                    f"{to}, {weights}",
                    f"{size / MIB:.0f}",
                    f"{spent / copied:.1f}",
                    f"{_dense(models[DEPTHS[-1]]) / spent / 1e9:.2f}",
                    f"{shallow.peak / MIB:.0f}",
                    f"{deep.peak / MIB:.0f}",
                )
            )
    say(f"pack, random Llama of width {width}, {DEPTHS[-1]} blocks")
    peaks = (f"peak of {depth} blocks, MiB" for depth in DEPTHS)
    show(("layout", "written, MiB", "time / copying", "GB of 16-bit weights a second", *peaks), rows)


def _model(folder: Path, width: int, depth: int) -> Path:
    """Write a model of so many blocks."""
    model = folder / f"model-{depth}"
    model.mkdir()
    measure([sys.executable, str(Path(__file__).with_name("synthetic.py")), str(model), str(width), str(depth)])
    return model


def _dense(model: Path) -> int:
    """Return the bytes of a model's weights."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _packed(folder: Path, model: Path, to: str, weights: str, rounds: int) -> Cost:
    """Quantize a model and pack it so often; the output is that of ``tests.bench.packed``."""
    home = folder / "home"
    artifact = home / f"{model.name}-{weights}.safetensors"
    home.mkdir(exist_ok=True)
    if not artifact.exists():
        qtool("mitigate", str(model), "--method", "rtn", "--weights", weights, "-o", str(artifact), home=home)
    script = Path(__file__).with_name("packed.py")
    return measure(
        [sys.executable, str(script), str(artifact), to, str(folder), str(rounds)], {"QTOOL_HOME": str(home)}
    )
