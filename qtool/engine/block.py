"""Solving one block: what its linears are solved from, and how the solved block is stored and executed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from torch import Tensor

from qtool.engine.block_problem import BlockResult, Compensation
from qtool.engine.experts import Mode
from qtool.engine.grid import Grid
from qtool.engine.guided import own_name
from qtool.engine.network import Network
from qtool.engine.outputs import calibrated_outputs
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.engine.saliency import SALIENCY
from qtool.engine.solve import Method, Solution, Solver
from qtool.engine.starved import DEFAULT_SHARE, Completed, Routing, complete, expert_notes
from qtool.engine.static_scales import calibrated_scales, extremes_of, needs_of_range
from qtool.engine.stored import (
    compensation_tensors,
    input_scales,
    linear_tensors,
    odd_scales,
    read_compensation,
    read_linear,
)
from qtool.engine.subject import BlockContent, Subject
from qtool.errors import UsageError
from qtool.model.graph import LinearSite
from qtool.model.statistics import BLOCKS, HESSIAN, SAMPLE, SiteStatistics

Refine = Callable[[Method, Mapping[str, LayerProblem]], BlockResult]
"""Runs a block-wise method on the problems of a block's linears by full name."""


@dataclass(frozen=True)
class InputGrids:
    """What inputs are rounded to, where anything of that is calibrated.

    Attributes:
        grid_of: Says it of the input of a linear.
        needs: Statistics that calibration reads.
    """

    grid_of: Callable[[LinearSite], Grid | None]
    needs: tuple[str, ...]


def needs_of(methods: Iterable[Method], inputs: InputGrids | None) -> tuple[str, ...]:
    """Return the statistics that methods read, and those that scales of inputs are found from.

    What reads blocks of a Hessian takes them from the whole if another method reads that.
    """
    static = () if inputs is None else inputs.needs
    needs = dict.fromkeys((*(need for method in methods for need in method.needs), *static))
    return tuple(need for need in needs if need != BLOCKS or HESSIAN not in needs)


def static_inputs(subject: Subject) -> InputGrids | None:
    """Return what inputs are rounded to if anything is calibrated, of them, of outputs or of the cache; else None."""
    by_site = {
        (linear.reads, subject.scheme.of(linear.name).activations): linear
        for linear in (*subject.model.graph.linears, subject.model.graph.head)
    }
    found = (grid for grid in map(subject.input_grid, by_site.values()) if grid is not None)
    grids = [grid for grid in found if any(part.has_global_scale for part in grid.parts)]
    needs = [] if subject.cache is None else [need for own in subject.cache.needs.values() for need in own]
    needs += [need for grid in grids for need in needs_of_range(grid)]
    outputs = calibrated_outputs(subject, subject.linears)
    needs += [need for grid in outputs.values() for need in needs_of_range(grid)]
    needs += [SAMPLE] if any(part.scheme.static for grid in grids for part in grid.parts) else []
    return InputGrids(subject.input_grid, tuple(dict.fromkeys(needs))) if needs else None


@dataclass
class SolvedBlock:
    """A block, or as much of it as has been solved.

    Attributes:
        solution: Quantized linears, and what their weights stand for.
        scales: Tensor-level multipliers of activations, and static scales of keys and values, by their stored names.
        seen: What the experts of each stage went by, without the statistics themselves.
        statistics: What is known of the sites, while methods are left that want to know.
        compensation: What is added to the block's output, if anything.
        report: What block-wise methods have to say.
    """

    solution: Solution = field(default_factory=Solution)
    scales: dict[str, Tensor] = field(default_factory=dict)
    seen: list[Completed] = field(default_factory=list)
    statistics: dict[str, SiteStatistics] = field(default_factory=dict)
    compensation: Compensation | None = None
    report: dict[str, float] = field(default_factory=dict)


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
        return needs_of(self.solver.methods, self.inputs)

    @cached_property
    def leading(self) -> tuple[Method, ...]:
        """The methods that run before any that sees the whole block."""
        return tuple(takewhile(lambda method: not (method.of_block or method.of_model), self.solver.methods))

    @cached_property
    def following(self) -> tuple[Method, ...]:
        """The first method that sees the whole block, and all behind it but one that sees the whole model."""
        return tuple(method for method in self.solver.methods[len(self.leading) :] if not method.of_model)

    def solve(
        self,
        linears: Sequence[LinearSite],
        state: Mapping[str, Tensor],
        statistics: Mapping[str, SiteStatistics],
        block: SolvedBlock,
        tokens: Tensor | None = None,
    ) -> None:
        """Solve linears of one block, all or those of a stage, by the leading methods.

        Args:
            linears: Which.
            state: The block's float tensors by name inside the block.
            statistics: What is known of the sites that they read, by site name; none where no method needs any.
            block: What has been solved of the block; modified.
            tokens: How many tokens each expert was sent.
        """
        routing = None if tokens is None else Routing(tokens, self.share)
        known = Completed(dict(statistics), routing=routing)
        if routing is not None and self.experts == "routed":
            known = complete(statistics, linears, routing)
        if known.statistics:
            for linear in linears:
                for need in (one for one in self.needs if one != SALIENCY):
                    site = linear.observed if linear.observed in known.statistics else linear.spec.reads
                    found = known.statistics[site]
                    if own_name(linear, need) not in found.entries:
                        found.need(need, site=f"layers.{linear.layer}.{site}")
        self.solver.solve(self.leading, linears, state, known.statistics, block.solution)
        block.scales |= self._static_scales(linears, state, known.statistics)
        block.seen.append(replace(known, statistics={}))
        if self.following:
            block.statistics |= known.statistics

    def finish(
        self, linears: Sequence[LinearSite], state: Mapping[str, Tensor], block: SolvedBlock, refine: Refine
    ) -> None:
        """Run the methods that follow on a block whose linears are all solved.

        Args:
            linears: All of the block.
            state: The block's float tensors by name inside the block.
            block: What has been solved of the block; modified.
            refine: Runs a block-wise method on the problems of the linears.

        Raises:
            UsageError: Two methods add to the block's output.
        """
        for method in self.following if linears else ():
            if not method.of_block:
                self.solver.solve([method], linears, state, block.statistics, block.solution)
                continue
            stacks = self.solver.problems(linears, state, block.statistics, block.solution)
            result = refine(method, {one.name: one for stack in stacks for one in stack})
            block.solution.linears |= result.linears
            if result.compensation is not None and block.compensation is not None:
                raise UsageError("two methods add to the output of a block", hint="leave one of them out")
            block.compensation = result.compensation or block.compensation
            block.report |= result.report
        block.statistics = {}

    def solve_head(
        self, head: LinearSite, state: Mapping[str, Tensor], statistics: Mapping[str, SiteStatistics]
    ) -> SolvedBlock:
        """Solve the head by all methods that see one linear at a time.

        Args:
            head: The head.
            state: Its float weight by full name.
            statistics: What is known of its input, by site name; none where no method needs any.
        """
        solved = SolvedBlock()
        self.solve([head], state, statistics, solved)
        for method in self.following:
            if not method.of_block:
                self.solver.solve([method], [head], state, solved.statistics, solved.solution)
        return solved

    def _static_scales(
        self, linears: Sequence[LinearSite], state: Mapping[str, Tensor], known: Mapping[str, SiteStatistics]
    ) -> dict[str, Tensor]:
        """Return the calibrated tensor-level multipliers; of a site that all experts read there is one for all."""
        if self.inputs is None:
            return {}
        scales: dict[str, Tensor] = {}
        inputs = ((linear, self.inputs.grid_of(linear)) for linear in linears)
        grids = {(linear.reads, linear.spec.reads): grid for linear, grid in inputs if grid is not None}
        device = self.solver.device
        for (site, name), grid in grids.items():
            if not any(part.has_global_scale for part in grid.parts):
                continue
            extremes = extremes_of(grid, known[name], site=site)
            if not any(part.scheme.static for part in grid.parts):
                scales |= input_scales(site, grid.global_scales(extremes[0]))
                continue
            sample = known[name].need(SAMPLE, site=site).to(device)
            read = (linear.spec.module for linear in linears if linear.reads == site)
            weights = [state[f"{module}.weight"].to(device) for module in read]
            scales |= input_scales(site, *calibrated_scales(grid, extremes.to(device), sample, weights))
        return scales

    def replace(self, network: Network, linears: Sequence[LinearSite], solved: Mapping[str, QuantizedLinear]) -> None:
        """Let linears of a loaded block compute with decoded weights and adapters."""
        for linear in linears:
            target, found = network.linear(linear.layer, linear.spec.module), solved[linear.name]
            target.replace(found.weight(self.solver.grid_of(linear)).to(target.weight), found.adapter)

    def install(self, network: Network, layer: int, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Load a finished block as it is going to be executed.

        Args:
            network: Executes it.
            layer: Block index.
            state: The block's float tensors by name inside the block.
            tensors: What ``stored`` made of the block.
        """
        graph = self.solver.graph
        compensation = read_compensation(graph.block_name(layer), tensors)
        network.load(layer, BlockContent(state, compensation=compensation))
        read: dict[str, str] = {}
        for linear in self.solver.linears_of(layer):  # one at a time: decoded, they take several times what codes take
            found = read_linear(linear.name, graph.width(linear.spec.reads), tensors, self.solver.grid_of(linear))
            target = network.linear(layer, linear.spec.module)
            target.weight.data = found.weight(self.solver.grid_of(linear)).to(target.weight)
            target.adapter = found.adapter
            read |= dict.fromkeys((linear.spec.reads, linear.observed), linear.reads)
            read[linear.puts_out] = f"layers.{layer}.{linear.puts_out}"
        for site, module in network.sites[layer].items():
            if module.rounding is not None and site in read:
                module.rounding = module.rounding.calibrated(read[site], tensors.get, network.device)
        path = network.kv_path(layer)
        if path.rounding is not None:
            path.rounding = path.rounding.calibrated(layer, tensors.get, network.device)

    def stored(self, solved: SolvedBlock) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a solved block as tensors, and what there is to say of it as plain values."""
        tensors = dict(solved.scales)
        counters: Counter[str] = Counter()
        graph = self.solver.graph
        sites = {linear.name: linear for linear in (*graph.linears, *graph.ends)}
        for name, linear in solved.solution.linears.items():
            grid = self.solver.grid_of(sites[name])
            tensors |= linear_tensors(name, linear, grid)
            counters.update(linear.counters)
            counters.update({f"{what} {name}": count for what, count in odd_scales(linear, grid).items()})
        if solved.compensation is not None:
            layer = sites[next(iter(solved.solution.linears))].layer
            tensors |= compensation_tensors(graph.block_name(layer), solved.compensation)
        experts = expert_notes(solved.seen)
        counters.update({name: len(experts[name]) for name in ("shrunk_experts", "experts_rtn") if name in experts})
        aimed = solved.solution.reports
        reports = {name: {**aimed.get(name, {}), **linear.report} for name, linear in solved.solution.linears.items()}
        notes: dict[str, Any] = {"reports": reports, "counters": {k: v for k, v in counters.items() if v}}
        if solved.report:
            notes["block"] = solved.report
        return tensors, {**notes, **({"experts": experts} if experts else {})}
