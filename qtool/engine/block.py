"""Solving one block: what its linears are solved from, and how the solved block is stored and executed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from qtool.engine.experts import Mode
from qtool.engine.grid import Grid
from qtool.engine.network import Network
from qtool.engine.problem import QuantizedLinear
from qtool.engine.saliency import SALIENCY
from qtool.engine.solve import Solver
from qtool.engine.starved import DEFAULT_SHARE, Completed, Routing, complete, expert_notes
from qtool.engine.stored import input_scales, linear_tensors, read_input_scales, read_linear
from qtool.engine.subject import BlockContent, Subject
from qtool.model.graph import LinearSite
from qtool.model.statistics import SiteStatistics

InputGrids = Callable[[LinearSite], Grid | None]
"""What the input of a linear is rounded to."""


def static_inputs(subject: Subject) -> InputGrids | None:
    """Return what inputs are rounded to if tensor-level multipliers of any are calibrated; None where nothing is."""
    by_site = {linear.reads: linear for linear in subject.model.graph.linears}
    grids = [grid for grid in map(subject.input_grid, by_site.values()) if grid is not None]
    return subject.input_grid if any(part.has_global_scale for grid in grids for part in grid.parts) else None


@dataclass
class SolvedBlock:
    """A block, or as much of it as has been solved.

    Attributes:
        linears: Quantized linears by full name.
        scales: Tensor-level multipliers of activations, by the name that they are stored under.
        seen: What the experts of each stage went by, without the statistics themselves.
    """

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    seen: list[Completed] = field(default_factory=list)


@dataclass(frozen=True)
class BlockSolver:
    """Solves the blocks of a model one after the other.

    Attributes:
        solver: Solves linears.
        inputs: What activations are rounded to, where anything of that is static.
        experts: Which tokens the statistics of experts are of.
        share: Part of even routing below which an expert is starved.
    """

    solver: Solver
    inputs: InputGrids | None = None
    experts: Mode = "all"
    share: float = DEFAULT_SHARE

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that solving reads."""
        static = () if self.inputs is None else ("absmax",)
        return tuple(dict.fromkeys((*self.solver.needs, *static)))

    def solve(
        self,
        linears: Sequence[LinearSite],
        state: Mapping[str, Tensor],
        statistics: Mapping[str, SiteStatistics],
        tokens: Tensor | None = None,
    ) -> SolvedBlock:
        """Solve linears of one block, all or those of a stage.

        Args:
            linears: Which.
            state: The block's float tensors by name inside the block.
            statistics: What is known of the sites that they read, by site name; none where no method needs any.
            tokens: How many tokens each expert was sent.
        """
        routing = None if tokens is None else Routing(tokens, self.share)
        known = Completed(dict(statistics), routing=routing)
        if routing is not None and self.experts == "routed":
            known = complete(statistics, linears, routing)
        if known.statistics:
            for linear in linears:
                for need in (one for one in self.needs if one != SALIENCY):  # what becomes of it is each linear's own
                    site = linear.observed if linear.observed in known.statistics else linear.spec.reads
                    known.statistics[site].need(need, site=f"layers.{linear.layer}.{site}")
        solved = self.solver.solve(linears, state, known.statistics)
        scales = self._static_scales(linears, known.statistics)
        return SolvedBlock(solved, scales, [replace(known, statistics={})])

    def _static_scales(self, linears: Sequence[LinearSite], known: Mapping[str, SiteStatistics]) -> dict[str, Tensor]:
        """Return the calibrated tensor-level multipliers; of a site that all experts read there is one for all."""
        if self.inputs is None:
            return {}
        scales: dict[str, Tensor] = {}
        for linear in {linear.reads: linear for linear in linears}.values():
            grid = self.inputs(linear)
            if grid is not None:
                absmax = known[linear.spec.reads].need("absmax", site=linear.reads).float()
                scales |= input_scales(linear.reads, grid.global_scales(absmax))
        return scales

    def put(self, network: Network, linears: Sequence[LinearSite], solved: Mapping[str, QuantizedLinear]) -> None:
        """Put decoded weights and adapters into a loaded block."""
        for linear in linears:
            target, found = network.linear(linear.layer, linear.spec.module), solved[linear.name]
            target.weight.data = found.weight(self.solver.grid_of(linear)).to(target.weight)
            target.adapter = found.adapter

    def install(self, network: Network, layer: int, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Load a finished block as it is going to be executed.

        Args:
            network: Executes it.
            layer: Block index.
            state: The block's float tensors by name inside the block.
            tensors: What ``stored`` made of the block.
        """
        graph = self.solver.graph
        network.load(layer, BlockContent(state))
        read: dict[str, str] = {}
        for linear in graph.linears_of(layer):  # one at a time: decoded, they take several times what codes take
            found = read_linear(linear.name, graph.width(linear.spec.reads), tensors, self.solver.grid_of(linear))
            self.put(network, [linear], {linear.name: found})
            read |= {linear.spec.reads: linear.reads, linear.observed: linear.reads}
        for site, module in network.sites[layer].items():
            if module.rounding is not None and site in read:
                scales = read_input_scales(read[site], module.rounding.grid, tensors.get, network.device)
                module.rounding = replace(module.rounding, global_scales=scales)

    def stored(self, solved: SolvedBlock) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a solved block as tensors, and what there is to say of it as plain values."""
        tensors = dict(solved.scales)
        counters: Counter[str] = Counter()
        sites = {linear.name: linear for linear in self.solver.graph.linears}
        for name, linear in solved.linears.items():
            tensors |= linear_tensors(name, linear, self.solver.grid_of(sites[name]))
            counters.update(linear.counters)
        experts = expert_notes(solved.seen)
        counters.update({name: len(experts[name]) for name in ("shrunk_experts", "experts_rtn") if name in experts})
        reports = {name: dict(linear.report) for name, linear in solved.linears.items()}
        notes = {"reports": reports, "counters": {k: v for k, v in counters.items() if v}}
        return tensors, {**notes, **({"experts": experts} if experts else {})}
