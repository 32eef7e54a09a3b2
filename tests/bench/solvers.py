"""Seconds of each solver on one large layer against plain GPTQ, and of GPTQ against the products that it cannot avoid.

Plain GPTQ is without clip search, on INT4 in groups of 128. Its products are bare calls of torch in float32: Cholesky,
inverse, Cholesky of the inverse, and the updates of the columns behind each lazy block. Methods are those that plugins
offer, each with its defaults, behind plain GPTQ where it has to follow another; what follows is timed alone. Peers run
in turn in one process, as a machine is not the same from one minute to the next. What had no end after ``LIMIT``
seconds is stopped; what cannot be asked says why.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.bench.process import use_cores
from tests.bench.table import say, show

if TYPE_CHECKING:  # what starts the processes that are measured must stay small
    from torch import Tensor

    from qtool.engine.problem import LayerProblem, QuantizedLinear

ROWS, COLUMNS, GROUP, BLOCK = 2048, 8192, 128, 128
KEPT, NOISE = 0.98, 0.02  # inputs in full precision from those after quantized layers
ROW_GROUPS = 4  # of guidedquant, its default
LIMIT = 900
FIRST = "gptq, plain"
OWN_SCHEMES = {"spqr": "int3-asym-g16-sfp16-scales3g16"}
PRODUCTS = "its matrix products"


def compare_solvers(rounds: int, cores: int) -> None:
    """Time every mitigator on offer, each in a process of its own and in turn with its peer, and print ratios."""
    from qtool.plugins import Plugins

    say(f"one layer of {ROWS} x {COLUMNS} (out x in), INT4 in groups of {GROUP}, correlated inputs, best of {rounds}")
    show(("", "s", f"{PRODUCTS}, s", "ratio"), [_row(FIRST, rounds, cores)])
    say()
    names = sorted(Plugins.discover().offers["mitigators"])
    show(("method, defaults", "alone, s", f"{FIRST}, s", "ratio"), [_row(name, rounds, cores) for name in names])


def _row(what: str, rounds: int, cores: int) -> tuple[str, ...]:
    """Time in a process of its own; return the least seconds, those of the peer and the ratio, or why not."""
    command = [sys.executable, "-m", "tests.bench.solvers", what, str(rounds), str(cores)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return what, "", "", f"no end after {LIMIT} s"
    if done.returncode:
        return what, "", "", (done.stderr.strip().splitlines() or ["failed"])[-1]
    found = json.loads(done.stdout.splitlines()[-1])
    if isinstance(found, str):
        return what, "", "", found
    own, peer = found
    return what, f"{own:.2f}", f"{peer:.2f}", f"{own / peer:.2f}"


def main(what: str, rounds: int) -> None:
    """Time one thing and its peer in turn; print the least seconds of both, or why there are none, as JSON."""
    from qtool.errors import QtoolError

    try:
        works: list[Callable[[], object]] = [solver(what), _products() if what == FIRST else solver(FIRST)]
        taken = [[_seconds(work) for work in works] for _ in range(rounds)]
        found: list[float] | str = [min(column) for column in zip(*taken, strict=True)]
    except QtoolError as error:
        found = error.message
    sys.stdout.write(json.dumps(found))


def solver(what: str, rows: int = ROWS, columns: int = COLUMNS) -> Callable[[], QuantizedLinear | LayerProblem]:
    """Return what runs a method on a layer; anew each time, since siblings' memory would save work.

    Raises:
        UsageError: It is more than a method, sees more than a layer, or needs a statistic that a layer made up has not.
    """
    from dataclasses import replace

    import torch

    from qtool.builtin.mitigators.guidedquant import GUIDED
    from qtool.engine.grid import Grid
    from qtool.engine.problem import LayerProblem, Mitigator, Retargeter
    from qtool.errors import UsageError
    from qtool.model.statistics import BLOCKS
    from qtool.plugins import Plugins
    from qtool.scheme import parse_tensor_scheme

    plugins = Plugins.discover()
    method = plugins.load("mitigators", what.partition(",")[0])
    if not isinstance(method, (Mitigator, Retargeter)):
        raise UsageError("several methods, or one that sees more than a layer")
    gptq = plugins.load("mitigators", "gptq")
    plain = gptq.Config(clip="none", clip_metric="mse")
    config = plain if what == FIRST else method.Config()
    scheme = parse_tensor_scheme(OWN_SCHEMES.get(what, f"int4-g{GROUP}"), plugins.format)
    inputs = correlated_inputs(columns)
    entries = {"hessian": inputs.T @ inputs / len(inputs)}
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(2))
    full = KEPT * inputs + NOISE * noise
    held, held_full = inputs[::8], full[::8]
    made = {
        "cross": lambda: full.T @ inputs / len(inputs),
        "full_hessian": lambda: full.T @ full / len(inputs),
        "held_out": lambda: torch.stack([held.T @ held, held_full.T @ held]) / len(inputs),
        "absmax": lambda: inputs.abs().amax(0),
        "mean_abs": lambda: inputs.abs().mean(0),
        "mean": lambda: inputs.mean(0),
        "sample": lambda: inputs,
    }
    if "saliency" in method.needs:  # stands for what is made of it: a Hessian for each group of rows
        entries |= {"saliency": torch.ones(1), GUIDED: entries["hessian"].expand(ROW_GROUPS, -1, -1)}
    for need in (*method.needs, *getattr(config, "needs", ())):
        if need == BLOCKS:  # taken from the whole
            continue
        if need not in entries and need not in made:
            raise UsageError(f"needs `{need}`, which a made-up layer has not")
        entries.setdefault(need, made.get(need, lambda: entries["hessian"])())
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    problem = LayerProblem("layer", weight, Grid.of(scheme, plugins.format(scheme.format)), entries["hessian"], entries)
    if isinstance(method, Retargeter):
        return lambda: method.retarget(replace(problem, memory={}), config)
    small = replace(problem, weight=weight[:GROUP, :GROUP], hessian=entries["hessian"][:GROUP, :GROUP], entries={})
    try:  # on a corner: does it have to follow another?
        method.quantize(
            replace(small, entries={name: _corner(entry, columns) for name, entry in entries.items()}), config
        )
    except UsageError as error:
        if "first" not in error.message:
            raise
        problem = problem.after(gptq.quantize(problem, plain))
    return lambda: method.quantize(replace(problem, memory={}), config)


def _corner(entry: Tensor, columns: int) -> Tensor:
    return entry[..., :GROUP, :GROUP] if entry.shape[-2:-1] == (columns,) else entry[..., :GROUP]


def _products() -> Callable[[], object]:
    """Return what runs the products of GPTQ alone."""
    import torch

    inputs = correlated_inputs(COLUMNS)
    hessian = inputs.T @ inputs / len(inputs)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    columns, errors = torch.randn(COLUMNS, ROWS), torch.randn(BLOCK, ROWS)

    def run() -> None:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        upper = torch.linalg.cholesky(inverse, upper=True)
        for stop in range(BLOCK, COLUMNS, BLOCK):
            columns[stop:].addmm_(upper[stop - BLOCK : stop, stop:].T, errors, alpha=-1e-9)

    return run


def correlated_inputs(columns: int) -> Tensor:
    """Return inputs of as many tokens as columns, with a few strong directions."""
    import torch

    generator = torch.Generator().manual_seed(0)
    common = torch.randn(columns, 32, generator=generator) @ torch.randn(32, columns, generator=generator)
    return torch.randn(columns, columns, generator=generator).add_(common, alpha=0.3)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    use_cores(int(sys.argv[3]))
    main(sys.argv[1], int(sys.argv[2]))
