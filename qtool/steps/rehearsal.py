"""How long mitigate is going to take here: products of matrices, statistics and solves timed on made-up layers.

Each distinct site of a block is solved once, in sizes that double until the next would take longer than its share of a
few seconds; what is larger follows from the last two by ``a n + b n³``, steps of a loop over columns and products of
matrices. Nothing is read but shapes, and nothing is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.gather import AnyStatistic, Gathering, PairedStatistic, Statistic
from qtool.engine.grid import Grid
from qtool.engine.guided import statistics_at
from qtool.engine.saliency import SALIENCY, Saliencies
from qtool.engine.solve import Method, Solution, Solver
from qtool.engine.subject import Subject
from qtool.errors import QtoolError, UsageError
from qtool.model.graph import LinearSite, ModelGraph
from qtool.model.statistics import SiteStatistics
from qtool.plugins import Plugins

SECONDS = 6.0
"""For all solves together."""
_TOKENS = 1024
_DIRECTIONS = 8
_SMALLEST = 64
_HALVINGS = 4


@dataclass(frozen=True)
class Rehearsed:
    """Linears of one site, and how often a model has the like.

    Attributes:
        linears: Those of its first occurrence.
        rows: Output rows of each.
        width: Its channels.
        times: How often it occurs.
    """

    linears: tuple[LinearSite, ...]
    rows: tuple[int, ...]
    width: int
    times: int


@dataclass(frozen=True)
class Timed:
    """Seconds of one site: ``solve`` for its linears, or None where they could not be solved, ``gather`` a token."""

    solve: float | None
    gather: float


def sites_of(subject: Subject) -> list[Rehearsed]:
    """Return the sites that differ in shape or grid, each as often as it has grids; one expert stands for all.

    A quantized head comes last.
    """
    graph = subject.model.graph
    found: dict[object, Rehearsed] = {}
    solved = [subject.linears_of(layer) for layer in range(graph.dims.num_layers)]
    for together in (*solved, *([] if subject.head is None else [(subject.head,)])):
        groups: dict[object, list[LinearSite]] = {}
        for linear in together:
            if linear.expert in (None, 0):
                groups.setdefault((linear.observed, subject.scheme.of(linear.name).weights), []).append(linear)
        for linears in groups.values():
            rows = tuple(subject.shape(one)[0] for one in linears)
            width, times = graph.width(linears[0].spec.reads), 1 if linears[0].expert is None else graph.dims.experts
            key = (tuple(one.spec.module for one in linears), rows, width, subject.weight_grid(linears[0]))
            before = found[key].times if key in found else 0
            found[key] = Rehearsed(tuple(linears), rows, width, before + times)
    return list(found.values())


@dataclass(frozen=True)
class Rehearsal:
    """What is timed.

    Attributes:
        subject: Shapes and grids.
        methods: Run left to right.
        needs: Statistics that they read.
        gathering: What accumulators are told.
        device: Where.
    """

    subject: Subject
    methods: Sequence[Method]
    needs: tuple[str, ...]
    gathering: Gathering
    device: torch.device

    def time(self, sites: Sequence[Rehearsed]) -> list[Timed]:
        """Time one of each site, the smallest first.

        Raises:
            UsageError: A method refuses what it is asked.
        """
        ordered = sorted(range(len(sites)), key=lambda index: _work(sites[index]))
        left, found = SECONDS, {}
        for place, index in enumerate(ordered):
            start = time.perf_counter()
            found[index] = self._site(sites[index], left / (len(ordered) - place))
            left -= time.perf_counter() - start
        return [found[index] for index in range(len(sites))]

    def product_seconds(self, rows: int, width: int, tokens: int, dtype: torch.dtype) -> float:
        """Time one product of inputs and a weight."""
        x, weight = (torch.randn(count, width, device=self.device, dtype=dtype) for count in (tokens, rows))
        return min(self._seconds(partial(torch.matmul, x, weight.T)) for _ in range(2))

    def _site(self, site: Rehearsed, budget: float) -> Timed:
        """Time one site in growing sizes."""
        grid, taken = self.subject.weight_grid(site.linears[0]), list[tuple[int, float]]()
        gather, start = 0.0, time.perf_counter()
        for halvings in range(_HALVINGS, -1, -1):
            width = _smaller(site.width, halvings, grid)
            if width < min(_SMALLEST, site.width) or (taken and width == taken[-1][0]):
                continue
            spent = time.perf_counter() - start
            if taken and spent + taken[-1][1] * (width / taken[-1][0]) ** 3 > budget:
                break
            sized = grid if width == site.width else Grid((grid.parts[0],))
            entries, gather = self._entries(site, width)
            gather *= (site.width / width) ** 2
            try:
                taken.append((width, self._solve(site, sized, entries, width)))
            except QtoolError as error:  # what a small layer is refused for need not hold for the whole one
                if width == site.width and isinstance(error, UsageError):
                    raise
        return Timed(extrapolated(taken, site.width) if taken else None, gather)

    def _solve(self, site: Rehearsed, grid: Grid, entries: dict[str, Tensor], width: int) -> float:
        """Time the methods on random weights of so many columns, and of rows in proportion."""
        weights = {
            f"{one.spec.module}.weight": torch.randn(max(1, round(rows * width / site.width)), width)
            for one, rows in zip(site.linears, site.rows, strict=True)
        }
        statistics = {site.linears[0].observed: SiteStatistics(_TOKENS, entries)}
        layerwise = [method for method in self.methods if not (method.of_block or method.of_model)]
        solver = Solver(self.subject.model.graph, self.methods, lambda _: grid, 0, self.device)
        return self._seconds(lambda: solver.solve(layerwise, site.linears, weights, statistics, Solution()))

    @cached_property
    def _saliencies(self) -> Saliencies:
        """What made-up gradients cost, the same at every linear."""

        def read(_: str) -> Tensor:
            accumulator = self.subject.plugins.load("statistics", SALIENCY).start_gradient(
                _SMALLEST, self.gathering, self.device
            )
            accumulator.update(torch.randn(_TOKENS, _SMALLEST, generator=torch.Generator().manual_seed(2)))
            saliency: Tensor = accumulator.result()
            return saliency

        return Saliencies(self.subject.model.graph, read)

    def _entries(self, site: Rehearsed, width: int) -> tuple[dict[str, Tensor], float]:
        """Return statistics of made-up inputs, and the seconds that gathering them took for each token."""
        x = correlated_inputs(_TOKENS, width).to(self.device)
        entries, seconds = dict[str, Tensor](), 0.0
        exact = x + 0.1 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
        layer, reads = site.linears[0].layer, site.linears[0].spec.reads
        known = replace(self.gathering, saliencies=self._saliencies)
        gathering, statistics = known.at(layer, reads), statistics_of(self.needs, self.subject.plugins)
        for name, statistic in statistics_at(layer, reads, site.linears, statistics, known).items():
            if isinstance(statistic, PairedStatistic):
                pairs = statistic.start_pair(width, gathering, self.device)
                seconds += self._seconds(partial(pairs.update_pair, x, exact))
                entries[name] = pairs.result()
            elif isinstance(statistic, Statistic):
                accumulator = statistic.start(width, gathering, self.device)
                seconds += self._seconds(partial(accumulator.update, x))
                entries[name] = accumulator.result()
        return entries, seconds / _TOKENS

    def _seconds(self, work: Callable[[], object]) -> float:
        """Time some work on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def statistics_of(needs: Iterable[str], plugins: Plugins) -> dict[str, AnyStatistic]:
    """Return the statistics that plugins offer among the needs."""
    return {name: plugins.load("statistics", name) for name in needs if name in plugins.offers["statistics"]}


def correlated_inputs(tokens: int, width: int) -> Float[Tensor, "tokens width"]:
    """Return random inputs with a few strong directions in common."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(tokens, _DIRECTIONS, generator=generator) @ torch.randn(
        _DIRECTIONS, width, generator=generator
    )
    return torch.randn(tokens, width, generator=generator) + common / math.sqrt(_DIRECTIONS)


def extrapolated(taken: Sequence[tuple[int, float]], width: int) -> float:
    """Return the seconds at a width from those at smaller ones, ``a n + b n³`` through the last two.

    Args:
        taken: Widths, growing, and seconds.
        width: At least the last width.
    """
    (last, seconds), earlier = taken[-1], taken[:-1]
    if last == width:
        return seconds
    linear, cubic = 0.0, seconds / last**3
    if earlier:
        first, before = earlier[-1]
        ratio = last / first
        cubic = max(0.0, (seconds - ratio * before) / (last**3 - ratio * first**3))
        linear = max(0.0, (seconds - cubic * last**3) / last)
        if not linear:
            cubic = seconds / last**3
    return linear * width + cubic * width**3


def forward_flops(graph: ModelGraph, linears: Iterable[tuple[LinearSite, int, int]], seq_len: int, share: float) -> int:
    """Return the operations a token of all blocks.

    Args:
        graph: Knows heads and layers.
        linears: Each linear with its rows and columns.
        seq_len: Tokens to a window; attention looks at half of them on average.
        share: Part of the tokens that an expert computes.
    """
    dims = graph.dims
    products = sum(2 * rows * columns * (1 if one.expert is None else share) for one, rows, columns in linears)
    return round(products + dims.num_layers * dims.num_heads * seq_len * (dims.head_dim + dims.value_dim))


def _work(site: Rehearsed) -> int:
    return site.width**2 * (site.width + sum(site.rows))


def _smaller(width: int, halvings: int, grid: Grid) -> int:
    """Return about a part of a width that groups divide; the whole one is taken as it is."""
    size = grid.parts[0].scheme.group_size or 1
    return width if not halvings else (width >> halvings) // size * size
