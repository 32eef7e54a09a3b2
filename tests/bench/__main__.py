"""``python -m tests.bench``: prints what it ran on, then the tables of speed, memory, packing, planning and solvers."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

from tests.bench.memory import check_memory
from tests.bench.packing import compare_packing
from tests.bench.planning import compare_planning
from tests.bench.process import MIB, use_cores
from tests.bench.solvers import compare_solvers
from tests.bench.speed import compare_speed
from tests.bench.table import say


def main() -> int:
    """Run what was asked for; return 1 if the memory limit was exceeded, or planning took longer than calibrating."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "what",
        nargs="*",
        default=["speed", "memory", "packing"],
        choices=["speed", "memory", "packing", "planning", "solvers"],
    )
    parser.add_argument("--cores", type=int, default=2, help="for every process that is measured")
    parser.add_argument("--rounds", type=int, default=2, help="times that everything runs in turn")
    parser.add_argument("--model", default="smollm2-135m", help="what is quantized for speed, and planned for")
    parser.add_argument("--peer", type=Path, default=Path(".venv-llm-compressor"), help="llm-compressor's environment")
    parser.add_argument("--memory-limit", type=int, default=1024, metavar="MIB", help="the weights exceed it")
    parser.add_argument("--width", type=int, default=1024, help="hidden size of the models for memory and packing")
    chosen = parser.parse_args()
    cores = use_cores(chosen.cores)
    versions = ", ".join(f"{name} {version(name)}" for name in ("qtool", "torch", "transformers"))
    say(f"{time.strftime('%Y-%m-%d %H:%M')}, {versions}, Python {platform.python_version()}")
    say(f"{_processor()}, {cores} cores used, load before {os.getloadavg()[0]:.1f}")
    kept = True
    if "speed" in chosen.what:
        compare_speed(chosen.model, chosen.rounds, chosen.peer)
    if "memory" in chosen.what:
        kept = check_memory(chosen.memory_limit * MIB, chosen.width)
    if "packing" in chosen.what:
        compare_packing(chosen.width, chosen.rounds)
    if "planning" in chosen.what:
        kept = compare_planning(chosen.model, chosen.rounds) and kept
    if "solvers" in chosen.what:
        compare_solvers(chosen.rounds, cores)
    say(f"load after {os.getloadavg()[0]:.1f}")
    return 0 if kept else 1


def _processor() -> str:
    """Return the processor's name where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
