"""Seconds that closed-form transforms take to plan, in one process on the same statistics, against gathering them.

Every transform on offer that needs statistics or none; those that search, and so run blocks of the model again and
again, are left out. Imports and the opening of the model are in neither number.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.process import measure, qtool
from tests.bench.table import say, show

SAMPLES, SEQ_LEN = 32, 512
SEARCHES = ("awq", "outlier-suppression-plus")
SCHEME = "W4A4"


def compare_planning(name: str, rounds: int) -> bool:
    """Time one calibration pass and every plan, print medians and ratios, and say whether the plans took less."""
    data = "speeches" if name == "tiny" else "wikitext2" if os.environ.get("QTOOL_DATA") else "sotu"
    with tempfile.TemporaryDirectory() as folder:
        model = qtool("fetch", name, home=Path(folder)).output
    taken: list[dict[str, float]] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            cost = measure([sys.executable, "-m", "tests.bench.planning", model, data], {"QTOOL_HOME": folder})
        taken.append(json.loads(cost.output.splitlines()[-1]))
    middle = {what: statistics.median(one[what] for one in taken) for what in taken[0]}
    calibration = middle.pop("calibrate")
    together = sum(middle.values())
    say(f"{name}, {SAMPLES} x {SEQ_LEN} tokens of {data}, scheme {SCHEME}, medians of {rounds}")
    rows = [*sorted(middle.items(), key=lambda row: -row[1]), ("all of them", together)]
    cells = [(what, f"{seconds:.2f}", f"{calibration:.2f}", f"{seconds / calibration:.3f}") for what, seconds in rows]
    show(("plans by", "qtool transform, s", "qtool calibrate, s", "ratio"), cells)
    return together < calibration


def main(model: str, data: str) -> None:
    """Calibrate, plan with every transform, and print seconds by name as one JSON object."""
    from qtool.api import CalibrateRequest, TransformRequest, calibrate, open_workspace, read_scheme, transform

    workspace = open_workspace()
    workspace.model(model)
    taken: dict[str, float] = {}
    start = time.perf_counter()
    gathered, _ = calibrate(CalibrateRequest(model, data, num_samples=SAMPLES, seq_len=SEQ_LEN), workspace)
    taken["calibrate"] = time.perf_counter() - start
    scheme = read_scheme(SCHEME, {}, workspace.plugins)
    for method in sorted(workspace.plugins.offers["transforms"]):
        if method in SEARCHES:
            continue
        workspace.plugins.load("transforms", method)
        start = time.perf_counter()
        transform(TransformRequest(str(gathered.path), method, scheme=scheme), workspace)
        taken[method] = time.perf_counter() - start
    sys.stdout.write(json.dumps(taken))


if __name__ == "__main__":
    main(*sys.argv[1:])
