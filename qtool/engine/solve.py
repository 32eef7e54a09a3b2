"""Solving a block's linears one after the other, from what is known of their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qtool.engine.problem import LayerProblem, Mitigator, QuantizedLinear
from qtool.errors import NumericalError
from qtool.model.graph import LinearSite, ModelGraph
from qtool.model.statistics import SiteStatistics
from qtool.scheme import Format, TensorScheme


@dataclass(frozen=True)
class Method:
    """A mitigator with its options."""

    mitigator: Mitigator
    config: Any


@dataclass(frozen=True)
class Solver:
    """Turns float weights into codes, by a composition of methods.

    Attributes:
        graph: The model's sites and linears.
        methods: Run left to right on every linear.
        scheme: How weights are stored.
        format: The format of ``scheme``.
        seed: Seeds whatever is random; every linear gets its own.
        device: Where the mathematics runs.
    """

    graph: ModelGraph
    methods: Sequence[Method]
    scheme: TensorScheme
    format: Format
    seed: int
    device: torch.device

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that the methods read."""
        return tuple(dict.fromkeys(name for method in self.methods for name in method.mitigator.needs))

    def solve(
        self,
        linears: Sequence[LinearSite],
        state: Mapping[str, Tensor],
        statistics: Mapping[str, SiteStatistics],
    ) -> dict[str, QuantizedLinear]:
        """Quantize linears of one block.

        Args:
            linears: Which; all that read one site must come together, since they may share a tensor-level scale.
            state: The block's float tensors by name inside the block.
            statistics: What is known of the sites that they read, by site name.

        Returns:
            The quantized linears by full name.
        """
        weights = {one.name: state[f"{one.spec.module}.weight"].to(self.device, torch.float32) for one in linears}
        solved: dict[str, QuantizedLinear] = {}
        shared = _Shared(self.device)
        for linear in linears:
            siblings = [weights[other.name] for other in linears if other.spec.reads == linear.spec.reads]
            amax = torch.stack([weight.abs().amax() for weight in siblings]).amax()
            known = shared.of(linear.spec.reads, statistics)
            problem = LayerProblem(
                name=linear.name,
                weight=weights[linear.name],
                scheme=self.scheme,
                format=self.format,
                hessian=known.get("hessian"),
                entries=known,
                global_scale=self.format.global_scale(amax, self.scheme),
                seed=self.seed + self.graph.linears.index(linear),
            )
            solved[linear.name] = self._composed(problem)
        return solved

    def _composed(self, problem: LayerProblem) -> QuantizedLinear:
        """Run the methods left to right on one linear."""
        if not torch.isfinite(problem.weight).all():
            raise NumericalError(f"the weight of `{problem.name}` holds NaN or Inf")
        result: QuantizedLinear | None = None
        for method in self.methods:
            result = method.mitigator.quantize(problem if result is None else problem.after(result), method.config)
        if result is None:
            raise LookupError(problem.name)
        return result


@dataclass
class _Shared:
    """Statistics of a site on the device, for the linears that read it one after the other."""

    device: torch.device
    _held: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def of(self, site: str, statistics: Mapping[str, SiteStatistics]) -> dict[str, Tensor]:
        if site not in self._held:
            known = statistics[site].entries if site in statistics else {}
            self._held = {site: {name: entry.to(self.device) for name, entry in known.items()}}
        return self._held[site]
