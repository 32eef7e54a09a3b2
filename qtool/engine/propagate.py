"""Solving a model from the activations of what is quantized already, and if methods ask for it beside full precision.

Two streams run through the blocks: one sees the blocks as they have been quantized, the other (``exact``) as they are.
One copy of a block serves both: linears that are replaced by quantized ones keep their weights for the other stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from qtool.engine.block import BlockSolver, SolvedBlock
from qtool.engine.block_problem import BlockMitigator, BlockProblem, BlockResult
from qtool.engine.gather import AnyStatistic, Gathering, PairedStatistic
from qtool.engine.linear import Rounding
from qtool.engine.network import Network
from qtool.engine.outputs import output_needs, output_scales
from qtool.engine.problem import LayerProblem
from qtool.engine.solve import Method
from qtool.engine.stream import Stream
from qtool.engine.subject import BlockContent, Subject
from qtool.model.graph import EXPERTS, LinearSite
from qtool.model.statistics import SiteStatistics


@dataclass
class Propagation:
    """The blocks of a model, solved one after the other.

    Attributes:
        block: Solves a block.
        executed: What is going to be executed: its scheme says how activations are rounded.
        stream: Activations of what is quantized already; its network holds the blocks.
        exact: The same in full precision, or None where no method asks for it.
        statistics: What to gather, by name.
        gathering: What the accumulators are told.
        true_sequential: Whether linears see the quantized ones before them in their block.
    """

    block: BlockSolver
    executed: Subject
    stream: Stream
    exact: Stream | None
    statistics: Mapping[str, AnyStatistic]
    gathering: Gathering
    true_sequential: bool = False

    @property
    def network(self) -> Network:
        """What executes the blocks."""
        return self.stream.network

    def solve(self, layer: int, state: Mapping[str, Tensor]) -> SolvedBlock:
        """Solve a block from both streams, which stand in front of it; the exact one stands behind it afterwards.

        Args:
            layer: Block index.
            state: The block's float tensors by name inside the block.
        """
        network = self.network
        network.load(layer, BlockContent(state))
        linears = self.block.solver.linears_of(layer)
        solved, cache = SolvedBlock(), self.executed.cache
        cached = ({} if cache is None else cache.needs) | output_needs(self.executed, layer)
        stages = self._stages(linears) or ([[]] if cached else [])
        for stage in stages:
            gathered = self.stream.gather(
                layer, stage, self.statistics, self.gathering, exact=self.exact, cached=cached
            )
            self.block.solve(stage, state, gathered.statistics, solved, gathered.tokens)
            if cache is not None:  # of several stages the last sees the keys and values of quantized projections
                solved.scales |= cache.scales(layer, gathered.statistics, dims=self.executed.model.graph.dims)
            solved.scales |= output_scales(self.executed, layer, gathered.statistics)
            if stage is not stages[-1] and solved.solution.linears:
                self.block.replace(network, stage, solved.solution.linears)
        if self.exact is None:
            return solved
        self._run_exactly(layer)
        self.block.finish(
            linears, state, solved, lambda method, problems: self._refine(layer, method, problems, solved)
        )
        return solved

    def solve_head(self, head: LinearSite, state: Mapping[str, Tensor]) -> SolvedBlock:
        """Solve the head from both streams, which stand behind the last block.

        Args:
            head: The head.
            state: Its float weight by full name.
        """
        found: Mapping[str, SiteStatistics] = {}
        if self.statistics:
            found = self.stream.gather(head.layer, [head], self.statistics, self.gathering, exact=self.exact).statistics
        return self.block.solve_head(head, state, found)

    def skip(self, layer: int, state: Mapping[str, Tensor]) -> None:
        """Let the exact stream pass a block that has been solved before."""
        if self.exact is not None:
            self.network.load(layer, BlockContent(state))
            self._run_exactly(layer)

    def advance(self, layer: int, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Let the other stream pass a block as it has been solved.

        Args:
            layer: Block index.
            state: The block's float tensors by name inside the block.
            tensors: The solved block as it is stored.
        """
        device = self.network.device
        self.block.install(self.network, layer, state, {name: tensor.to(device) for name, tensor in tensors.items()})
        self.stream.run(layer, keep=True)

    def _stages(self, linears: Sequence[LinearSite]) -> list[list[LinearSite]]:
        if not linears:
            return []
        if not self.true_sequential:
            return [list(linears)]
        return [[one for one in linears if one.stage == stage] for stage in sorted({one.stage for one in linears})]

    def _run_exactly(self, layer: int) -> None:
        if self.exact is not None:
            with self.network.exact(layer):
                self.exact.run(layer, keep=True)

    def _refine(
        self, layer: int, method: Method, problems: Mapping[str, LayerProblem], solved: SolvedBlock
    ) -> BlockResult:
        """Run a block-wise method on a loaded block."""
        network, stream, exact = self.network, self.stream, self.exact
        if exact is None or not isinstance(method.mitigator, BlockMitigator):
            raise TypeError(method.mitigator)
        modules = {linear.name: linear.spec.module for linear in self.block.solver.linears_of(layer)}
        arguments = stream.arguments_of(layer)
        for name, module in modules.items():
            previous = problems[name].previous
            network.linear(layer, module).adapter = None if previous is None else previous.adapter
        network.compensations[layer] = solved.compensation

        def forward(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
            by_module = {modules[name]: weight for name, weight in weights.items()}
            return network.differentiable(layer, hidden, arguments, by_module)

        problem = BlockProblem(
            layer=layer,
            problems=problems,
            inputs=lambda rows: stream.states[list(rows)].to(network.device),
            targets=lambda rows: exact.states[list(rows)].to(network.device),
            forward=forward,
            windows=len(stream.windows),
            fixed=layer not in network.experts,
            device=network.device,
            seed=self.block.solver.seed + layer,
        )
        cache = self.executed.cache
        if cache is not None:
            cache = cache.calibrated(layer, solved.scales.get, network.device)
        with network.rounded_by(layer, self._rounding(layer, solved), cache):
            return method.mitigator.refine(problem, method.config)

    def _rounding(self, layer: int, solved: SolvedBlock) -> Callable[[str], Rounding | None]:
        """Return what rounds the activations of each site of a block when it is executed."""
        shared, device = self.block.solver.graph.input_sites_of(layer), self.network.device

        def rounding_of(name: str) -> Rounding | None:
            share = name.startswith(EXPERTS) and name not in shared
            site = name.rpartition(".")[2] if share else name
            rounding = self.executed.rounding(layer, name, device)
            found = solved.scales.get
            return None if rounding is None else rounding.calibrated(f"layers.{layer}.{site}", found, device)

        return rounding_of


def compares_inputs(statistics: Mapping[str, AnyStatistic]) -> bool:
    """Say whether any statistics are of both streams."""
    return any(isinstance(one, PairedStatistic) for one in statistics.values())
