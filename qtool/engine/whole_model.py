"""A quantized model run as a whole, with gradients of its divergence from full precision.

Blocks are quantized when this begins, and all of them are held, decoded: the only place where a whole model is. Forward
with what each block reads kept, then the divergence window by window, since logits are large, then from the last block
to the first, each run again with gradients. The full-precision model is not run again: what its last block puts out is
known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.gather import AnyStatistic
from qtool.engine.grid import GridPart
from qtool.engine.model_problem import ModelMitigator, ModelProblem, Values
from qtool.engine.propagate import Propagation
from qtool.engine.solve import Method
from qtool.engine.stored import NORMS, OUTLIERS, read_linear, scale_names
from qtool.model.family import Norm
from qtool.model.graph import LinearSite
from qtool.model.statistics import HESSIAN
from qtool.numerics.groups import from_groups
from qtool.numerics.likelihood import divergence
from qtool.numerics.losses import relative_loss
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
        offset: What is added to what they multiply.
    """

    module: str
    columns: slice
    part: GridPart
    start: Float[Tensor, "*groups"]
    offset: Float[Tensor, "*groups"]

    def moved(self, weight: Float[Tensor, "out in"], value: Float[Tensor, "*groups"]) -> Float[Tensor, "out in"]:
        """Return the linear's weight with other scales, as their format holds them; gradients pass straight through."""
        held = straight_through(value, store_scale(value.detach(), self.part.scheme.scale))
        own, offset = weight[:, self.columns], self.offset.unsqueeze(-1)
        groups = (self.part.groups(own) - offset) * (held / self.start).unsqueeze(-1) + offset
        changed = from_groups(groups, own.shape)
        return torch.cat([weight[:, : self.columns.start], changed, weight[:, self.columns.stop :]], dim=1)


@dataclass(frozen=True)
class _Block:
    """What can be learned of a block, by full name: the weights of its norms, and scales of its linears."""

    norms: Mapping[str, Norm]
    scales: Mapping[str, _Scale]

    def names(self, values: Values) -> list[str]:
        """Return which of these values the block has."""
        return [name for name in values if name in self.norms or name in self.scales]

    def weights(self, values: Values, weight_of: Callable[[str], Float[Tensor, "out in"]]) -> dict[str, Tensor]:
        """Return what these values make of the weights that they change, by module name inside the block.

        Args:
            values: Gains and scales by full name.
            weight_of: Returns the weight of a linear as it is at the start, decoded, by module name.
        """
        weights = {norm.module: values[name] - norm.offset for name, norm in self.norms.items() if name in values}
        for name, scale in self.scales.items():
            if name in values:
                before = weights[scale.module] if scale.module in weights else weight_of(scale.module).float()
                weights[scale.module] = scale.moved(before, values[name])
        return weights


class WholeModel:
    """A model whose blocks are all quantized.

    Args:
        work: What solved them; its stream in full precision stands behind the last block.
        block: Finds a solved block.
        layers: The blocks in order.
    """

    def __init__(self, work: Propagation, block: Block, layers: Sequence[int]) -> None:
        if work.exact is None:
            raise TypeError(work.exact)
        self.network, self.stream, self.targets, self.layers = work.network, work.stream, work.exact.states, layers
        self._work, self._content = work, block
        self._blocks: list[_Block] = []
        self._ticks: Iterator[int] = iter(())
        graph, device = self.network.subject.model.graph, self.network.device
        for layer in layers:
            state, stored = block(layer)
            stored = {name: tensor.to(device) for name, tensor in stored.items()}
            work.block.install(self.network, layer, state, stored)
            norms = {f"{graph.block_name(layer)}.{norm.module}.weight": norm for norm in graph.norms_in(layer)}
            self._blocks.append(_Block(norms, dict(_scales_of(work, layer, stored))))
        final = graph.family.final_norm
        self._final = {f"{final.module}.weight": final}

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
        self._ticks = iter(progress(range(total), total=total, label="mitigate the whole model"))
        norms, scales = dict(self._final), dict[str, _Scale]()
        for block in self._blocks:
            norms |= block.norms
            scales |= block.scales
        problem = ModelProblem(
            norms={name: self.network.module.get_parameter(name).float() + one.offset for name, one in norms.items()},
            scales={name: scale.start for name, scale in scales.items()},
            loss=self.loss,
            descend=self.descend,
            windows=windows,
            device=self.network.device,
            seed=seed,
        )
        result = method.mitigator.tune(problem, method.config)
        self._tick(total)
        found = result.values
        tensors = {
            f"{NORMS}{name}": (found[name] - norm.offset).to(self.network.dtype)
            for name, norm in norms.items()
            if name in found
        }
        formats = {name: scale.part.scheme.scale for name, scale in scales.items() if name in found}
        return tensors | {name: encode_scale(found[name], kind) for name, kind in formats.items()}, result.report

    def losses(
        self, tensors: Mapping[str, Tensor], hessian: AnyStatistic, progress: Progress
    ) -> dict[str, dict[str, float]]:
        """Return the loss of each linear by its inputs in the model that was made, in one more pass over all windows.

        Args:
            tensors: What ``tune`` returned; the model becomes that.
            hessian: The statistic of second moments.
            progress: Shows how many blocks have been measured.

        Returns:
            ``loss``, ``tr(EHEᵀ) / tr(WHWᵀ)``, and ``weight_error``, the same with the identity, by name of the linear.
        """
        network, solver = self.network, self._work.block.solver
        found: dict[str, dict[str, float]] = {}
        self.stream.restart()
        for layer in progress(self.layers, total=len(self.layers), label="losses of the whole model"):
            state, stored = self._content(layer)
            now = {name: tensors.get(name, tensor).to(network.device) for name, tensor in stored.items()}
            self._work.block.install(network, layer, state, now)
            for name in self._blocks[layer].norms:
                if f"{NORMS}{name}" in tensors:
                    network.module.get_parameter(name).data = tensors[f"{NORMS}{name}"].to(network.device)
            linears = solver.linears_of(layer)
            seen = self.stream.gather(layer, linears, {HESSIAN: hessian}, self._work.gathering, keep=True).statistics
            for linear in linears:
                site = linear.observed if linear.observed in seen else linear.spec.reads
                moments = seen[site].need(HESSIAN, site=f"layers.{layer}.{site}").to(network.device)
                weight = state[f"{linear.spec.module}.weight"].to(network.device, torch.float32)
                executed = self._executed(linear, now)
                found[linear.name] = {
                    "loss": relative_loss(weight, executed, moments),
                    "weight_error": relative_loss(weight, executed),
                }
            network.drop(layer)
        return found

    def _executed(self, linear: LinearSite, tensors: Mapping[str, Tensor]) -> Float[Tensor, "out in"]:
        """Return what stands for the weight of a linear that is stored so, low-rank correction included."""
        solver = self._work.block.solver
        grid = solver.grid_of(linear)
        solved = read_linear(linear.name, solver.graph.width(linear.spec.reads), tensors, grid)
        decoded = solved.weight(grid)
        return decoded if solved.adapter is None else decoded + solved.adapter.product()

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
        final = [name for name in self._final if name in values]
        total, behind = 0.0, torch.empty_like(hidden)
        for place, row in enumerate(rows):
            own = hidden[[place]].requires_grad_()
            with torch.enable_grad():
                loss = self._divergence(row, own, leaves) / len(rows)
                gradients = torch.autograd.grad(loss, [own, *(leaves[name] for name in final)])
            behind[[place]] = gradients[0]
            for name, gradient in zip(final, gradients[1:], strict=True):
                found[name] += gradient
            total += float(loss.detach())
        for layer, read in zip(reversed(self.layers), reversed(inputs), strict=True):
            names, read = self._blocks[layer].names(values), read.requires_grad_()
            with torch.enable_grad():
                output = self._run(layer, read, leaves)
                gradients = torch.autograd.grad(output, [read, *(leaves[name] for name in names)], behind)
            self.network.forget(layer)
            behind = gradients[0]
            found |= dict(zip(names, gradients[1:], strict=True))
        self._tick(4 * len(rows))
        return total, found

    @torch.no_grad()
    def _forward(self, rows: Sequence[int], values: Values) -> list[Tensor]:
        """Return what each block reads, and behind them what the last one puts out."""
        states = [self.network.embed(self.stream.windows[list(rows)])[0]]
        for layer in self.layers:
            states.append(self._run(layer, states[-1], values))
            self.network.forget(layer)
        return states

    def _run(self, layer: int, hidden: Tensor, values: Values) -> Tensor:
        weights = self._blocks[layer].weights(values, lambda module: self.network.linear(layer, module).weight)
        return self.network.differentiable(layer, hidden, self.stream.arguments_of(layer), weights)

    def _divergence(self, row: int, hidden: Tensor, values: Values) -> Float[Tensor, ""]:
        """Return the mean divergence of one window from what the last block puts out."""
        weights = {name: values[name] - norm.offset for name, norm in self._final.items() if name in values}
        with torch.no_grad(), self.network.exact(len(self.layers)):
            expected = self.network.logits(self.targets[[row]].to(self.network.device))
        return divergence(expected, self.network.logits(hidden, weights))[0].mean()

    def _tick(self, windows: int) -> None:
        """Show that some windows have run."""
        for _ in zip(range(windows), self._ticks, strict=False):
            pass


def _scales_of(work: Propagation, layer: int, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, _Scale]]:
    """Yield the scales of a block that are stored in formats fine enough to be moved, by full name."""
    graph, solver = work.network.subject.model.graph, work.block.solver
    for linear in solver.linears_of(layer):
        if any(name.startswith(f"{linear.name}{OUTLIERS}.") for name in stored):
            continue  # the decoded weight has them in it, and they are not multiples of the scales
        grid = solver.grid_of(linear)
        places = grid.places(graph.width(linear.spec.reads))
        for name, (columns, part) in zip(scale_names(linear.name, grid), places, strict=True):
            if part.scheme.scale in WIDE_SCALES and name in stored and part.block_rows == 1:
                scale = decode_scale(stored[name], part.scheme.scale)
                offset = stored.get(f"{name.removesuffix('scale')}offset", torch.zeros_like(scale)).float()
                yield name, _Scale(linear.spec.module, columns, part, scale, offset)
