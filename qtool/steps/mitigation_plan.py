"""What mitigate is going to do: its linears by kind, its passes over the data, and an estimate of memory and time."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from qtool.artifacts.manifest import Manifest
from qtool.engine.block import needs_of, static_inputs
from qtool.engine.block_problem import BlockMitigator
from qtool.engine.gather import Gathering, PairedStatistic
from qtool.engine.grid import Grid
from qtool.engine.model_problem import ModelMitigator
from qtool.engine.solve import MOST_ROWS, Method
from qtool.engine.stream import default_batch
from qtool.engine.subject import Subject
from qtool.model.graph import TOKENS
from qtool.model.statistics import HESSIAN
from qtool.numerics.token_weights import parse_token_weight
from qtool.scheme import ModelScheme
from qtool.steps.demand import StatisticSizes, known_of, methods_of, stored_bytes
from qtool.steps.description import Cell, Facts, Table, Tables
from qtool.steps.inspect_quantized import kinds_of
from qtool.steps.rehearsal import Rehearsal, forward_flops, sites_of, statistics_of
from qtool.steps.routing import alike
from qtool.steps.subjects import compute_dtype, open_subject
from qtool.steps.workspace import Workspace

NOTE = "from short measurements on made-up layers; expect half to twice"
NOTE_ON_LEARNING = "learning counts passes alone, not the rounding in each step, most of the time of a small model"
_FLOAT = 4
_MATRICES = 6
"""Of the width of a site squared, that a solver and its Hessian take at once."""
_COPIES = 8
"""Of the weights of a site, that a solver and its search for scales take at once."""


@dataclass(frozen=True)
class _Foreseen:
    """A step that is not done yet, as its manifest tells."""

    manifest: Manifest
    subject: Subject
    gathered: Manifest | None
    device: torch.device

    @property
    def config(self) -> Mapping[str, Any]:
        return self.manifest.step.config

    @cached_property
    def methods(self) -> list[Method]:
        return methods_of(self.manifest, self.subject.plugins)

    @property
    def known(self) -> tuple[str, ...]:
        needs = needs_of(self.methods, static_inputs(self.subject))
        return known_of(needs, self.config["propagate"], self.gathered, self.subject)

    @property
    def windows(self) -> tuple[int, int]:
        """Windows, and tokens to each; none without statistics."""
        shape: Sequence[int] = self.gathered.step.config["shape"] if self.gathered is not None else (0, 0)
        return shape[0], shape[1]

    @property
    def passes(self) -> int:
        """Times that the windows go through every block; the last time that they would leave the last one is saved."""
        if self.config["propagate"] == "none":
            return 0
        measured = any(method.of_model for method in self.methods)  # what the whole model has become
        return 1 + self.stages + self.exact_passes + measured

    @cached_property
    def stages(self) -> int:
        """Times that linears of a block are solved, each with a pass in front."""
        return len({one.stage for one in self.subject.linears}) if self.config["true_sequential"] else 1

    @cached_property
    def exact_passes(self) -> int:
        """Passes in full precision beside them: one to go on, and one of each stage to be compared with."""
        paired = any(
            isinstance(one, PairedStatistic) for one in statistics_of(self.known, self.subject.plugins).values()
        )
        return (paired or any(method.of_block or method.of_model for method in self.methods)) + paired * self.stages

    @property
    def windows_learned(self) -> int:
        """Windows that methods run through each block to learn from, one with gradients counted three or four times."""
        learning = ((method.mitigator, method.config) for method in self.methods)
        return sum(
            one.windows_run(self.windows[0], config)
            for one, config in learning
            if isinstance(one, BlockMitigator | ModelMitigator)
        )

    @cached_property
    def sizes(self) -> StatisticSizes | None:
        if not self.known or self.gathered is None:
            return None
        told, tokens = {**self.gathered.step.config, **self.config}, self.gathered.details["tokens"]
        return StatisticSizes.of(self.subject.model.graph, told, self.known, tokens, self.subject.plugins)

    def shape(self, name: str) -> tuple[int, int]:
        """Return the rows and columns of a linear's weight."""
        return self.subject.shape(self.subject.model.graph.linear(name))


def describe_mitigation(manifest: Manifest, workspace: Workspace) -> tuple[Facts, Tables]:
    """Describe what mitigate is going to do, and estimate what it takes; a few seconds of measurements, no file.

    Args:
        manifest: Its manifest without tensors.
        workspace: Where it would work.

    Raises:
        UsageError: A method refuses what it is asked.
    """
    inputs = manifest.inputs
    source = next(inputs[role].path for role in ("plan", "statistics", "model") if role in inputs)
    opened = open_subject(source, workspace)
    scheme = ModelScheme.from_json(manifest.schemes)
    subject = Subject(opened.model, workspace.plugins, opened.subject.plan, scheme)
    gathered = workspace.artifact(inputs["statistics"].path, "statistics").manifest if "statistics" in inputs else None
    step = _Foreseen(manifest, subject, gathered, workspace.device)
    windows, seq_len = step.windows
    memory = _memory(step)
    seconds = _seconds(step)
    known = [one for one in seconds.values() if one is not None]
    facts: Facts = {
        "statistics": ", ".join(step.known) or None,
        "propagate": step.config["propagate"],
        "passes_over_the_data": step.passes,
        "tokens_of_a_pass": windows * seq_len if step.passes else 0,
        "estimated_peak_memory_bytes": sum(memory.values()),
        "estimated_seconds": sum(known) if len(known) == len(seconds) else None,
        "estimates": "; ".join((NOTE, NOTE_ON_LEARNING) if step.windows_learned else (NOTE,)),
    }
    parts: list[tuple[Cell, ...]] = [(name, value, None) for name, value in memory.items()]
    parts += [(name, None, value) for name, value in seconds.items()]
    return facts, {"linears": _linears(step), "estimate": Table(("part", "bytes", "seconds"), parts)}


def _linears(step: _Foreseen) -> Table:
    """Return a row for each kind of linear that differs in name, shape or grid."""
    nbytes = stored_bytes(step.subject, step.methods)
    linears = (*step.subject.model.graph.linears, *step.subject.coded_ends)
    kinds = kinds_of(linear.name for linear in linears)
    rows: dict[tuple[str, str, str, str], list[int]] = {}
    for linear in linears:
        routed = step.sizes is not None and step.sizes.routed
        site = linear.observed if routed else linear.spec.reads
        shape = "x".join(str(size) for size in step.shape(linear.name))
        kept = linear.name in step.subject.kept
        written = "16 bits" if kept else _written(step.subject.weight_grid(linear))
        key = (kinds[linear.name], shape, written, alike(linear.spec.reads))
        gathered = step.sizes is not None and not kept and site != TOKENS
        found = rows.setdefault(key, [0, step.sizes.at(site) if step.sizes is not None and gathered else 0, 0])
        found[0] += 1
        found[2] += 2 * _size(step.shape(linear.name)) if kept else nbytes[linear.name]
    cells = [
        (kind, count, shape, written, site, statistics, stored)
        for (kind, shape, written, site), (count, statistics, stored) in rows.items()
    ]
    return Table(("module", "linears", "shape", "format", "reads", "statistics_bytes_of_site", "stored_bytes"), cells)


def _written(grid: Grid) -> str:
    """Return how the parts of a grid are written."""
    first, *others = grid.parts
    return " + ".join([str(first.scheme), *(f"{part.channels} {part.scheme.format}" for part in others)])


def _memory(step: _Foreseen) -> dict[str, int]:
    """Return about what is held at once, by part: on the device, or on a CPU all together."""
    graph = step.subject.model.graph
    dtype = compute_dtype(step.config["dtype"], step.subject.model)
    blocks = [
        sum(_size(step.shape(linear.name)) for linear in graph.linears_of(layer))
        for layer in range(graph.dims.num_layers)
    ]
    ends = [_size(step.shape(end.name)) for end in step.subject.coded_ends]
    held = "a block's weights" if max(ends, default=0) <= max(blocks) else "the weights of a head or embedding"
    (windows, seq_len), size = step.windows, dtype.itemsize
    batch = min(windows, default_batch(step.device, max(1, seq_len)))
    sites = sites_of(step.subject)
    squares = max(site.width**2 for site in sites) if HESSIAN in step.known else 0
    largest = max(min(sum(site.rows), MOST_ROWS) * site.width for site in sites)
    wide = graph.dims.hidden * 4 + max(site.width for site in sites) * 3
    memory = {
        "the process so far": _so_far(),
        f"{held}, before and after": max(*blocks, *ends) * (_FLOAT + size + _FLOAT),
        "solving a site": _FLOAT * (_MATRICES * squares + _COPIES * largest),
    }
    if step.sizes is not None:
        memory["statistics of a layer"] = max(step.sizes.of_layers(head=step.subject.head), default=0)
    if step.passes:
        memory["embedding"] = graph.dims.vocab * graph.dims.hidden * size
        streams = 1 + bool(step.exact_passes)
        memory["activations between blocks"] = streams * windows * seq_len * graph.dims.hidden * size
        if any(method.of_model for method in step.methods):
            memory["all weights, decoded"] = sum(blocks) * size
        memory["activations inside a block"] = batch * seq_len * wide * _FLOAT
    return memory


def _seconds(step: _Foreseen) -> dict[str, float | None]:
    """Return about how long each part takes; None where that cannot be told."""
    windows, seq_len = step.windows
    rule = parse_token_weight(step.config["token_weight"] or "uniform")
    sample = step.gathered.step.config["sample_size"] if step.gathered is not None else 0
    gathering = Gathering(windows * seq_len, rule, 0, sample, 0)
    rehearsal = Rehearsal(step.subject, step.methods, step.known, gathering, step.device)
    sites = sites_of(step.subject)
    timed = rehearsal.time(sites)
    solves = [None if one.solve is None else one.solve * site.times for one, site in zip(timed, sites, strict=True)]
    known = [solve for solve in solves if solve is not None]
    seconds: dict[str, float | None] = {"solving": sum(known) if len(known) == len(solves) else None}
    if step.passes:
        graph, tokens = step.subject.model.graph, windows * seq_len
        every = not graph.dims.experts or step.config.get("experts") == "all"
        share = 1.0 if every else graph.dims.chosen / graph.dims.experts
        rows, width = max((step.shape(linear.name) for linear in graph.linears), key=_size)
        dtype = compute_dtype(step.config["dtype"], step.subject.model)
        some = min(tokens, default_batch(step.device, seq_len) * seq_len)
        rate = 2 * rows * width * some / rehearsal.product_seconds(rows, width, some, dtype)
        shaped = [(linear, *step.shape(linear.name)) for linear in graph.linears]
        each = forward_flops(graph, shaped, seq_len, share)
        seconds["passes"] = each * tokens * step.passes / rate
        if step.windows_learned:
            seconds["learning"] = each * seq_len * step.windows_learned / rate
        seen = [one.gather * site.times for one, site in zip(timed, sites, strict=True)]
        seconds["gathering"] = sum(seen) * tokens
    return seconds


def _size(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _so_far() -> int:
    """Return the peak of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
