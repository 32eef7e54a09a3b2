"""Pack an artifact again and again in one process. Usage: packed.py ARTIFACT LAYOUT FOLDER ROUNDS.

Prints the seconds of the fastest round, those of the fastest copy of the largest file that it wrote, and the bytes of
that. What comes before the first round, imports and a warm-up, does not count.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from qtool.cli.app import main


def timed(artifact: str, layout: str, folder: Path, rounds: int) -> tuple[float, float, int]:
    output, copy = folder / "out", folder / "copy"
    packs, copies, size = [], [], 0
    for _ in range(rounds + 1):
        start = time.perf_counter()
        failed = main(["pack", artifact, "--to", layout, "-o", str(output), "--quiet"])
        packs.append(time.perf_counter() - start)
        if failed:
            raise SystemExit(failed)
        written = max(output.iterdir(), key=lambda file: file.stat().st_size)
        size = written.stat().st_size
        start = time.perf_counter()
        shutil.copyfile(written, copy)
        with copy.open("rb+") as file:
            os.fsync(file.fileno())
        copies.append(time.perf_counter() - start)
        shutil.rmtree(output)
    return min(packs[1:]), min(copies[1:]), size


if __name__ == "__main__":
    found = timed(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    sys.stdout.write(" ".join(map(str, found)))
