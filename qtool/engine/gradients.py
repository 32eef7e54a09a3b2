"""The gradients of the language-model loss at the outputs of linears, with one block in memory at a time.

Forward, block by block, keeping what each block reads; then the loss of every next token, summed over all windows; then
from the last block to the first, each run again with gradients. The model's parameters get none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qtool.engine.gather import Accumulator, Gathering, GradientStatistic
from qtool.engine.linear import OutputObserver
from qtool.engine.network import Network
from qtool.engine.stream import Stream
from qtool.errors import NumericalError

Shown = Callable[[Float[Tensor, "tokens out"]], None]


class BackwardPass:
    """Goes through the network once and back.

    Args:
        network: Runs the blocks, without any rounding.
        windows: Token ids.
        batch: Windows that run at once.
        spill: Folder for files that hold what memory does not.
        first: The block at which the way back ends.
    """

    def __init__(
        self, network: Network, windows: Int[Tensor, "windows tokens"], *, batch: int, spill: Path, first: int = 0
    ) -> None:
        self.network, self.first = network, first
        self.stream = Stream(network, windows, batch=batch, spill=spill)
        self.spill = spill
        self.inputs: dict[int, Tensor] = {}

    def forward(self, layers: Iterable[int]) -> None:
        """Run all blocks, then turn what the last one gave into the loss's gradient there.

        Args:
            layers: All blocks in order.
        """
        for layer in layers:
            self.network.load(layer)
            if layer >= self.first:
                self.inputs[layer] = self.stream.allocate(self.spill, host=True).copy_(self.stream.states)
            self.stream.run(layer, keep=True)
            self.network.drop(layer)
        for row in range(len(self.stream.windows)):  # one at a time: logits are large
            self._differentiate_loss(slice(row, row + 1))

    def _differentiate_loss(self, rows: slice) -> None:
        hidden = self.stream.states[rows].to(self.network.device).requires_grad_()
        ids = self.stream.windows[rows].to(hidden.device)
        logits = self.network.logits(hidden)[:, :-1].flatten(0, 1)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = torch.nn.functional.cross_entropy(wide, ids[:, 1:].flatten(), reduction="sum")
        self.stream.states[rows] = torch.autograd.grad(loss, hidden)[0].to(self.stream.states.device)

    def backward(self, layer: int, shown: Mapping[str, Shown]) -> None:
        """Go back through a block; blocks come from the last to the first.

        Args:
            layer: Block index.
            shown: By name inside the block, what is shown the gradients at the outputs of a linear, windows in order.
        """
        network, stream = self.network, self.stream
        inputs, arguments = self.inputs.pop(layer), stream.arguments_of(layer)
        network.load(layer)
        with _observing_outputs(network, layer, shown):
            for rows in stream.batches():
                hidden = inputs[rows].to(network.device, copy=True).requires_grad_()
                output = network.run(layer, hidden, arguments)
                behind = stream.states[rows].to(output.device, copy=True)  # who is shown it may keep it
                stream.states[rows] = torch.autograd.grad(output, hidden, behind)[0].to(stream.states.device)
                del hidden, output, behind
                network.forget(layer)
        network.drop(layer)

    def gather(
        self, layer: int, statistics: Mapping[str, GradientStatistic], gathering: Gathering
    ) -> dict[str, Tensor]:
        """Go back through a block and gather statistics of the gradients at the outputs of its linears.

        Args:
            layer: Block index.
            statistics: What to gather at each.
            gathering: What the accumulators are told.

        Returns:
            The statistics by name in the artifact.

        Raises:
            NumericalError: A value is NaN or infinite.
        """
        linears = self.network.subject.model.graph.linears_of(layer)
        gathered = {
            one.spec.module: _Gathered(f"layers.{layer}.{one.spec.module}", statistics, gathering) for one in linears
        }
        self.backward(layer, gathered)
        return {name: entry for one in gathered.values() for name, entry in one.results()}


class _Gathered:
    """Feeds the gradients at one linear to its accumulators."""

    def __init__(self, place: str, statistics: Mapping[str, GradientStatistic], gathering: Gathering) -> None:
        self.place, self.statistics, self.gathering = place, statistics, gathering
        self.accumulators: dict[str, Accumulator] = {}

    def __call__(self, gradient: Float[Tensor, "tokens out"]) -> None:
        if not self.accumulators:
            n, device = gradient.shape[-1], gradient.device
            self.accumulators = {
                name: statistic.start_gradient(n, self.gathering, device) for name, statistic in self.statistics.items()
            }
        for accumulator in self.accumulators.values():
            accumulator.update(gradient.float())

    def results(self) -> Iterator[tuple[str, Tensor]]:
        for name, accumulator in self.accumulators.items():
            entry = accumulator.result().cpu()
            if not torch.isfinite(entry).all():
                raise NumericalError(
                    f"`{name}` of the gradients at `{self.place}` holds NaN or Inf",
                    hint="run the model in float32: --dtype float32",
                )
            yield f"{self.place}.{name}", entry


@contextmanager
def _observing_outputs(network: Network, layer: int, shown: Mapping[str, Shown]) -> Iterator[None]:
    """Show the gradients at the outputs of linears of a loaded block as they are found."""

    def told(show: Shown) -> OutputObserver:
        def observe(output: Tensor) -> None:
            def found(gradient: Tensor) -> None:
                show(gradient.reshape(-1, gradient.shape[-1]))

            output.register_hook(found)  # type: ignore[no-untyped-call]

        return observe

    linears = {module: network.linear(layer, module) for module in shown}
    try:
        for module, linear in linears.items():
            linear.output_observer = told(shown[module])
        yield
    finally:
        for linear in linears.values():
            linear.output_observer = None
