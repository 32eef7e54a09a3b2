"""Solving a block's linears one after the other, from what is known of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem, Mitigator, QuantizedLinear, SiblingMitigator
from qtool.errors import NumericalError
from qtool.model.graph import LinearSite, ModelGraph
from qtool.model.statistics import SiteStatistics

Key = TypeVar("Key", bound=Hashable)

MOST_ROWS = 1 << 16
"""Output rows that are solved at once: the experts of a block have many times more, which must not all be copied."""


@dataclass(frozen=True)
class Method:
    """A mitigator with its options."""

    mitigator: Mitigator
    config: Any

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that the mitigator reads, and those that its options ask for."""
        return (*self.mitigator.needs, *getattr(self.config, "needs", ()))


@dataclass(frozen=True)
class Solver:
    """Turns float weights into codes, by a composition of methods.

    Attributes:
        graph: The model's sites and linears.
        methods: Run left to right on every linear.
        grid_of: Says what the weight of a linear is rounded to.
        seed: Seeds whatever is random; every linear gets its own.
        device: Where the mathematics runs.
    """

    graph: ModelGraph
    methods: Sequence[Method]
    grid_of: Callable[[LinearSite], Grid]
    seed: int
    device: torch.device

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that the methods read."""
        return tuple(dict.fromkeys(name for method in self.methods for name in method.needs))

    def solve(
        self,
        linears: Sequence[LinearSite],
        state: Mapping[str, Tensor],
        statistics: Mapping[str, SiteStatistics],
    ) -> dict[str, QuantizedLinear]:
        """Quantize linears of one block.

        Args:
            linears: Which; all that read one site must come together, since they are solved together.
            state: The block's float tensors by name inside the block.
            statistics: What is known of the sites that they read, by site name. An expert goes by what it saw itself,
                and where that is not there by the site that all experts read.

        Returns:
            The quantized linears by full name.
        """
        solved: dict[str, QuantizedLinear] = {}
        in_stages = sorted(linears, key=lambda linear: linear.stage)
        for site, readers in _grouped(in_stages, lambda linear: _known_as(linear, statistics)).items():
            entries = statistics[site].entries if site in statistics else {}
            known = {name: entry.to(self.device) for name, entry in entries.items()}
            for siblings in self._stacks(readers, state, known):
                solved |= zip((one.name for one in siblings), self._composed(siblings), strict=True)
        return solved

    def _stacks(
        self, readers: Sequence[LinearSite], state: Mapping[str, Tensor], known: Mapping[str, Tensor]
    ) -> Iterator[list[LayerProblem]]:
        """Yield the problems of linears that share statistics, as many at once as memory allows.

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
                    weight=weight,
                    grid=grid,
                    hessian=known.get("hessian"),
                    entries=known,
                    global_scales=multipliers,
                    seed=self.seed + self._places[linear.name],
                    expert=linear.expert is not None,
                    memory=memory,
                )
                for linear, weight in zip(fused, weights, strict=True)
            ]
            rows = sum(len(problem.weight) for problem in (*stack, *problems))
            if stack and (rows > MOST_ROWS or any(one is not None for one in multipliers)):
                yield stack
                stack = []
            stack += problems
        yield stack

    @cached_property
    def _places(self) -> dict[str, int]:
        """Place of each linear in the order of execution, by name."""
        return {linear.name: place for place, linear in enumerate(self.graph.linears)}

    def _composed(self, problems: Sequence[LayerProblem]) -> list[QuantizedLinear]:
        """Run the methods left to right on the linears of a site."""
        results: list[QuantizedLinear] = []
        for problem in problems:
            if not torch.isfinite(problem.weight).all():
                raise NumericalError(f"the weight of `{problem.name}` holds NaN or Inf")
        for method in self.methods:
            if results:
                problems = [problem.after(result) for problem, result in zip(problems, results, strict=True)]
            if isinstance(method.mitigator, SiblingMitigator):
                results = method.mitigator.quantize_siblings(problems, method.config)
            else:
                results = [method.mitigator.quantize(problem, method.config) for problem in problems]
        return results


def _known_as(linear: LinearSite, statistics: Mapping[str, SiteStatistics]) -> str:
    """Return the site whose statistics a linear goes by."""
    return linear.observed if linear.observed in statistics else linear.spec.reads


def _grouped(linears: Iterable[LinearSite], key: Callable[[LinearSite], Key]) -> dict[Key, list[LinearSite]]:
    """Group linears, keeping their order."""
    groups: dict[Key, list[LinearSite]] = {}
    for linear in linears:
        groups.setdefault(key(linear), []).append(linear)
    return groups
