"""A quantized model run as a whole, with gradients of its divergence from full precision.

Blocks are quantized when this begins, and all of them are held, decoded: the only place where a whole model is. Forward
with what each block reads kept, then the divergence window by window, since logits are large, then from the last block
to the first, each run again with gradients. The full-precision model is not run again: what its last block puts out is
known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.grid import GridPart
from qtool.engine.model_problem import ModelMitigator, ModelProblem, Values
from qtool.engine.network import Network
from qtool.engine.propagate import Propagation
from qtool.engine.solve import Method
from qtool.engine.stored import NORMS, OUTLIERS, scale_names
from qtool.model.family import Norm
from qtool.numerics.groups import from_groups
from qtool.numerics.likelihood import divergence
from qtool.numerics.scales import decode_scale, encode_scale, store_scale
from qtool.numerics.straight_through import straight_through

WHOLE = "model"
"""The part of an artifact that holds what was learned from the whole model: the last one, so that it counts."""
WIDE_SCALES = frozenset({"fp32", "fp16", "bf16"})
"""Formats of scales that are fine enough to be moved by little."""

Progress = Callable[..., Iterable[int]]

Block = Callable[[int], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
"""Returns the float tensors of a block by name inside it, and what it became as it is stored."""


@dataclass(frozen=True)
class _Scale:
    """The scales of a part of a linear.

    Attributes:
        module: The linear by name inside its block.
        columns: Of its weight.
        part: What they are rounded to.
        start: The scales as they are stored.
    """

    module: str
    columns: slice
    part: GridPart
    start: Float[Tensor, "*groups"]

    def stored(self, scale: Float[Tensor, "*groups"]) -> Float[Tensor, "*groups"]:
        """Return scales as their format holds them, with gradients straight through."""
        return straight_through(scale, store_scale(scale.detach(), self.part.scheme.scale))


class WholeModel:
    """A model whose blocks are all quantized.

    Args:
        work: What solved them; both its streams stand behind the last block that they were run through.
        block: Finds a solved block.
        layers: The blocks in order.
    """

    def __init__(self, work: Propagation, block: Block, layers: Sequence[int]) -> None:
        if work.exact is None:
            raise TypeError(work.exact)
        self.network: Network = work.network
        self.stream, self.targets, self.layers = work.stream, work.exact.states, layers
        self._scales: list[dict[str, _Scale]] = []
        self._norms: dict[str, tuple[Norm, str]] = {}
        graph, device = self.network.subject.model.graph, self.network.device
        for layer in layers:
            state, stored = block(layer)
            work.block.install(self.network, layer, state, {name: one.to(device) for name, one in stored.items()})
            self._scales.append(dict(self._found(work, layer, stored)))
            prefix = graph.block_name(layer)
            self._norms |= {f"{prefix}.{norm.module}.weight": (norm, norm.module) for norm in graph.norms_in(layer)}
        self._ticks: Iterator[int] = iter(())
        self._final = f"{graph.family.final_norm.module}.weight"
        self._norms[self._final] = (graph.family.final_norm, graph.family.final_norm.module)

    def _found(self, work: Propagation, layer: int, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, _Scale]]:
        """Yield the scales of a block that are stored in formats fine enough to be moved."""
        graph = self.network.subject.model.graph
        for linear in work.block.solver.linears_of(layer):
            grid = work.block.solver.grid_of(linear)
            places = grid.places(graph.width(linear.spec.reads))
            if any(name.startswith(f"{linear.name}{OUTLIERS}.") for name in stored):
                continue  # the decoded weight has them in it, and they are not multiples of the scales
            for name, (columns, part) in zip(scale_names(linear.name, grid), places, strict=True):
                if part.scheme.scale in WIDE_SCALES and name in stored and part.block_rows == 1:
                    start = decode_scale(stored[name].to(self.network.device), part.scheme.scale)
                    yield name, _Scale(linear.spec.module, columns, part, start)

    def tune(self, method: Method, seed: int, progress: Progress) -> tuple[dict[str, Tensor], Mapping[str, float]]:
        """Let a method improve the model.

        Args:
            method: The method.
            seed: Seeds whatever is random.
            progress: Shows how many windows have run.

        Returns:
            The tensors that take the place of stored ones or stand for the model's own, and the method's report.
        """
        if not isinstance(method.mitigator, ModelMitigator):
            raise TypeError(method.mitigator)
        windows = len(self.stream.windows)
        total = method.mitigator.windows_run(windows, method.config)
        self._ticks = iter(progress(range(total), total=total, label="the whole model"))
        problem = ModelProblem(
            norms={name: self._gain(name) for name in self._norms},
            scales={name: scale.start for scales in self._scales for name, scale in scales.items()},
            loss=self.loss,
            descend=self.descend,
            windows=windows,
            device=self.network.device,
            seed=seed,
        )
        result = method.mitigator.tune(problem, method.config)
        for _ in self._ticks:  # what was not asked for
            pass
        return dict(self._stored(name, value) for name, value in result.values.items()), result.report

    def _stored(self, name: str, value: Tensor) -> tuple[str, Tensor]:
        """Return a value as it is stored, and its name there."""
        if name in self._norms:
            return f"{NORMS}{name}", (value - self._norms[name][0].offset).to(self.network.dtype)
        return name, encode_scale(value, self._every_scale[name].part.scheme.scale)

    def _tick(self, windows: int) -> None:
        """Show that some windows have run."""
        for _ in zip(range(windows), self._ticks, strict=False):
            pass

    @cached_property
    def _every_scale(self) -> dict[str, _Scale]:
        return {name: scale for scales in self._scales for name, scale in scales.items()}

    def _gain(self, name: str) -> Float[Tensor, " n"]:
        weight: Tensor = self.network.module.get_parameter(name)
        return weight.detach().float() + self._norms[name][0].offset

    def _weights(self, layer: int, values: Values) -> dict[str, Tensor]:
        """Return the weights of norms and linears of a block that these values change, by module name inside it."""
        prefix = f"{self.network.subject.model.graph.block_name(layer)}."
        norms = {name: self._norms[name] for name in values if name in self._norms and name.startswith(prefix)}
        weights = {module: values[name] - norm.offset for name, (norm, module) in norms.items()}
        pieces: dict[str, dict[int, tuple[_Scale, Tensor]]] = {}
        for name, scale in self._scales[layer].items():
            if name in values:
                pieces.setdefault(scale.module, {})[scale.columns.start] = scale, values[name]
        for module, own in pieces.items():
            weight = self.network.linear(layer, module).weight.detach()
            moved = weight.float()
            for scale, value in own.values():
                groups = scale.part.groups(weight[:, scale.columns].float())
                ratio = scale.stored(value) / scale.start
                values_now = from_groups(groups * ratio.unsqueeze(-1), weight[:, scale.columns].shape)
                rest = moved[:, : scale.columns.start], moved[:, scale.columns.stop :]
                moved = torch.cat([rest[0], values_now, rest[1]], dim=1)
            weights[module] = moved
        return weights

    def _names(self, layer: int, values: Values) -> list[str]:
        """Return which of these values a block has."""
        prefix = f"{self.network.subject.model.graph.block_name(layer)}."
        return [
            name for name in values if name in self._scales[layer] or (name in self._norms and name.startswith(prefix))
        ]

    def _run(self, layer: int, hidden: Tensor, values: Values) -> Tensor:
        arguments = self.stream.arguments_of(layer)
        return self.network.differentiable(layer, hidden, arguments, self._weights(layer, values))

    def _last(self, values: Values) -> dict[str, Tensor]:
        """Return the weight of the final norm if these values change it."""
        offset = self._norms[self._final][0].offset
        return {self._final: values[self._final] - offset} if self._final in values else {}

    @torch.no_grad()
    def _forward(self, rows: Sequence[int], values: Values) -> list[Tensor]:
        """Return what each block reads, and behind them what the last one puts out."""
        states = [self.network.embed(self.stream.windows[list(rows)])[0]]
        for layer in self.layers:
            states.append(self._run(layer, states[-1], values))
            self._forget(layer)
        return states

    def _divergence(self, row: int, hidden: Tensor, values: Values) -> Float[Tensor, ""]:
        """Return the mean divergence of one window."""
        with torch.no_grad():
            expected = self.network.logits(self.targets[[row]].to(self.network.device))
        return divergence(expected, self.network.logits(hidden, self._last(values)))[0].mean()

    def loss(self, rows: Sequence[int], values: Values) -> float:
        """Return the mean over tokens of KL(full precision ‖ quantized) of some windows."""
        hidden = self._forward(rows, values)[-1]
        with torch.no_grad():
            lost = [self._divergence(row, hidden[[place]], values) for place, row in enumerate(rows)]
        self._tick(len(rows))
        return float(torch.stack(lost).mean())

    def descend(self, rows: Sequence[int], values: Values) -> tuple[float, dict[str, Tensor]]:
        """Return the loss of some windows, and its gradients with respect to these values."""
        *inputs, hidden = self._forward(rows, values)
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        found = {name: torch.zeros_like(value) for name, value in values.items()}
        total, behind = 0.0, torch.empty_like(hidden)
        for place, row in enumerate(rows):
            own = hidden[[place]].detach().requires_grad_()
            wanted = [own, *(leaves[name] for name in (self._final,) if name in leaves)]
            with torch.enable_grad():
                loss = self._divergence(row, own, leaves) / len(rows)
                gradients = torch.autograd.grad(loss, wanted)
            total, behind[[place]] = total + float(loss), gradients[0]
            if len(gradients) > 1:
                found[self._final] += gradients[1]
        for layer, read in zip(reversed(self.layers), reversed(inputs), strict=True):
            names = self._names(layer, values)
            own = read.detach().requires_grad_()
            with torch.enable_grad():
                output = self._run(layer, own, leaves)
                behind, *gradients = torch.autograd.grad(output, [own, *(leaves[name] for name in names)], behind)
            self._forget(layer)
            for name, gradient in zip(names, gradients, strict=True):
                found[name] = gradient
        self._tick(4 * len(rows))
        return total, found

    def _forget(self, layer: int) -> None:
        """Let go of what the sites of a block remember."""
        for site in self.network.sites[layer].values():
            site.forget()
