"""Solving a block's linears one after the other, from what is known of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from qtool.engine.block_problem import BlockMitigator
from qtool.engine.grid import Grid
from qtool.engine.guided import own_entries
from qtool.engine.model_problem import ModelMitigator
from qtool.engine.problem import LayerProblem, Mitigator, QuantizedLinear, Retargeter, SiblingMitigator
from qtool.errors import NumericalError
from qtool.model.graph import LinearSite, ModelGraph
from qtool.model.statistics import SiteStatistics
from qtool.scheme import TensorScheme

Key = TypeVar("Key", bound=Hashable)

MOST_ROWS = 1 << 16
"""Output rows that are solved at once: the experts of a block have many times more, which must not all be copied."""


@dataclass(frozen=True)
class Method:
    """A mitigator with its options: of a layer, a block, the model, or one that says what the others aim at."""

    mitigator: Mitigator | Retargeter | BlockMitigator | ModelMitigator
    config: Any

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that the mitigator reads, and those that its options ask for."""
        return (*self.mitigator.needs, *getattr(self.config, "needs", ()))

    def bytes_beside(self, rows: int, columns: int, *, expert: bool) -> int:
        """Return the bytes of what it stores beside the codes of a weight, as far as its options tell."""
        told = getattr(self.config, "bytes_beside", None)
        return 0 if told is None else int(told(rows, columns, expert=expert))

    @property
    def of_block(self) -> bool:
        """Whether it sees a whole block at once."""
        return isinstance(self.mitigator, BlockMitigator)

    @property
    def of_model(self) -> bool:
        """Whether it sees the whole model at once."""
        return isinstance(self.mitigator, ModelMitigator)

    @property
    def rounded_inputs(self) -> bool:
        """Whether it does better where propagated activations are rounded as the scheme says."""
        return self.of_block or self.of_model or bool(getattr(self.mitigator, "rounded_inputs", False))


@dataclass
class Solution:
    """What has been made of linears so far.

    Attributes:
        linears: Quantized linears by full name.
        aims: What their weights are to stand for, where a method aims at something else than the weight itself.
        reports: What such methods have to say, by full name.
    """

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    aims: dict[str, Tensor] = field(default_factory=dict)
    reports: dict[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Solver:
    """Turns float weights into codes, by a composition of methods.

    Attributes:
        graph: The model's sites and linears.
        methods: Run left to right on every linear.
        grid_of: Says what the weight of a linear is rounded to.
        seed: Seeds whatever is random; every linear gets its own.
        device: Where the mathematics runs.
        kept: Names of the linears that stay as they are.
    """

    graph: ModelGraph
    methods: Sequence[Method]
    grid_of: Callable[[LinearSite], Grid]
    seed: int
    device: torch.device
    kept: frozenset[str] = frozenset()

    def linears_of(self, layer: int) -> tuple[LinearSite, ...]:
        """Return the linears of one block that are quantized."""
        return tuple(linear for linear in self.graph.linears_of(layer) if linear.name not in self.kept)

    def solve(
        self,
        methods: Sequence[Method],
        linears: Sequence[LinearSite],
        state: Mapping[str, Tensor],
        statistics: Mapping[str, SiteStatistics],
        solution: Solution,
    ) -> None:
        """Quantize linears of one block, or go on with what other methods made of them.

        Args:
            methods: Some of the solver's own, each for one linear at a time.
            linears: Which; all that read one site must come together, since they are solved together.
            state: The block's float tensors by name inside the block.
            statistics: What is known of the sites that they read, by site name. An expert goes by what it saw itself,
                and where that is not there by the site that all experts read.
            solution: What has been made of them before; what is made now takes its place.
        """
        for siblings in self.problems(linears, state, statistics, solution):
            for before, problem in zip(siblings, self._composed(methods, siblings), strict=True):
                if problem.weight is not before.weight:
                    solution.aims[problem.name], solution.reports[problem.name] = problem.weight, problem.report
                if problem.previous is not None:
                    solution.linears[problem.name] = problem.previous

    def problems(
        self,
        linears: Sequence[LinearSite],
        state: Mapping[str, Tensor],
        statistics: Mapping[str, SiteStatistics],
        solution: Solution,
    ) -> Iterator[list[LayerProblem]]:
        """Yield the problems of linears; those in one list are solved together. Arguments as in ``solve``.

        Raises:
            NumericalError: A weight is not finite.
        """
        in_stages = sorted(linears, key=lambda linear: linear.stage)
        for site, readers in _grouped(in_stages, lambda linear: _known_as(linear, statistics)).items():
            entries = statistics[site].entries if site in statistics else {}
            known = {name: entry.to(self.device) for name, entry in entries.items()}
            for alike in _grouped(readers, self._schemes).values():
                yield from self._stacks(alike, state, known, solution)

    def _stacks(
        self,
        readers: Sequence[LinearSite],
        state: Mapping[str, Tensor],
        known: Mapping[str, Tensor],
        solution: Solution,
    ) -> Iterator[list[LayerProblem]]:
        """Yield the problems of linears that share statistics and a grid, as many at once as memory allows.

        What engines fuse stays together. What has another tensor-level multiplier is not of the same grid.
        """
        stack: list[LayerProblem] = []
        memory: dict[Any, Any] = {}
        for fused in _grouped(readers, lambda linear: linear.fused_with).values():
            weights = [state[f"{one.spec.module}.weight"].to(self.device, torch.float32) for one in fused]
            grid = self.grid_of(fused[0])
            multipliers = grid.global_scales(torch.stack([weight.abs().amax(0) for weight in weights]).amax(0))
            problems = [
                LayerProblem(
                    name=linear.name,
                    weight=_finite(weight, linear.name),
                    grid=grid,
                    hessian=known.get("hessian"),
                    entries=own_entries(linear, known),
                    global_scales=multipliers,
                    seed=self.seed + self._places[linear.name],
                    expert=linear.expert is not None,
                    previous=solution.linears.get(linear.name),
                    memory=memory,
                )
                for linear, weight in zip(fused, weights, strict=True)
            ]
            problems = [
                replace(one, weight=solution.aims[one.name], report=solution.reports[one.name])
                if one.name in solution.aims
                else one
                for one in problems
            ]
            rows = sum(len(problem.weight) for problem in (*stack, *problems))
            if stack and (rows > MOST_ROWS or any(one is not None for one in multipliers)):
                yield stack
                stack = []
            stack += problems
        yield stack

    def _schemes(self, linear: LinearSite) -> tuple[TensorScheme, ...]:
        """Return what linears that are solved as one must have in common: the schemes of their grids' parts."""
        return tuple(part.scheme for part in self.grid_of(linear).parts)

    @cached_property
    def _places(self) -> dict[str, int]:
        """Place of each linear in the order of execution, by name; head and embedding come last."""
        return {linear.name: place for place, linear in enumerate((*self.graph.linears, *self.graph.ends))}

    def _composed(self, methods: Sequence[Method], problems: Sequence[LayerProblem]) -> Sequence[LayerProblem]:
        """Run methods left to right on the linears of a site; each sees what the one before it left."""
        for method in methods:
            mitigator, config = method.mitigator, method.config
            if isinstance(mitigator, Retargeter):
                problems = [mitigator.retarget(problem, config) for problem in problems]
                continue
            if isinstance(mitigator, SiblingMitigator):
                results = mitigator.quantize_siblings(problems, config)
            elif isinstance(mitigator, Mitigator):
                results = [mitigator.quantize(problem, config) for problem in problems]
            else:
                raise TypeError(mitigator)
            problems = [problem.after(result) for problem, result in zip(problems, results, strict=True)]
        return problems


def _finite(weight: Tensor, name: str) -> Tensor:
    if not torch.isfinite(weight).all():
        raise NumericalError(f"the weight of `{name}` holds NaN or Inf")
    return weight


def _known_as(linear: LinearSite, statistics: Mapping[str, SiteStatistics]) -> str:
    """Return the site whose statistics a linear goes by."""
    return linear.observed if linear.observed in statistics else linear.spec.reads


def _grouped(linears: Iterable[LinearSite], key: Callable[[LinearSite], Key]) -> dict[Key, list[LinearSite]]:
    """Group linears, keeping their order."""
    groups: dict[Key, list[LinearSite]] = {}
    for linear in linears:
        groups.setdefault(key(linear), []).append(linear)
    return groups
