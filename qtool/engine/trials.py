"""Trials: what a block's output becomes when operators are tried at its sites and rounding behind them.

One decoder block is loaded at a time and given what full precision gives it on some calibration tokens. A trial puts
operators online at the inputs of the block, moves their inverses into the weights that read them, and rounds those
weights, and those inputs, as the scheme says. Everything else stays in full precision, so that the error is that of the
sites that are tried.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qtool.engine.grid import Grid
from qtool.engine.network import Network
from qtool.engine.stream import Stream, default_batch
from qtool.engine.subject import Subject
from qtool.errors import UsageError
from qtool.model.graph import LinearSite
from qtool.numerics.groups import from_groups
from qtool.numerics.operators import Operator
from qtool.scheme import ModelScheme

LONGEST = 512
"""Tokens of a window that trials run at most: more windows are worth more than longer ones."""


@dataclass(frozen=True)
class Trials:
    """Makes the trials of all blocks.

    Attributes:
        subject: The model with the plan so far.
        windows: Token ids that calibration ran.
        scheme: What is rounded in a trial.
        device: Where it runs.
        dtype: What it computes in.
    """

    subject: Subject
    windows: Int[Tensor, "windows tokens"]
    scheme: ModelScheme
    device: torch.device
    dtype: torch.dtype = torch.float32

    def __call__(self, tokens: int) -> Iterator[Trial]:
        """Yield the trials of each block in order; one is good until the next is asked for.

        Args:
            tokens: About how many tokens to run. Windows longer than 512 tokens are cut.

        Raises:
            UsageError: No weights are to be quantized, or there is not one token.
            SchemeError: A group does not divide the input of a linear.
        """
        if not self.scheme.every("weights"):
            raise UsageError(
                "a method that measures rounding needs to know how weights are going to be quantized",
                facts=(("scheme", self.scheme),),
                hint="--scheme W4A16",
            )
        if tokens < 1:
            raise UsageError(
                "a trial needs tokens",
                facts=(("expected", "1 or more"), ("received", tokens)),
                hint="--set tokens=2048",
            )
        graph, rounded = self.subject.model.graph, replace(self.subject, scheme=self.scheme, quantized=None)
        for linear in rounded.linears:
            for grid in (rounded.weight_grid(linear), rounded.input_grid(linear)):
                if grid is not None:
                    grid.check(graph.width(linear.spec.reads), layer=linear.name)
        return self._blocks(tokens, rounded)

    def _blocks(self, tokens: int, rounded: Subject) -> Iterator[Trial]:
        """Load each block, run it as it is, and carry its outputs to the next."""
        network = Network(replace(rounded, scheme=ModelScheme()), device=self.device, dtype=self.dtype)
        length = min(tokens, LONGEST, self.windows.shape[1])
        windows = self.windows[: -(-tokens // length), :length]
        batch = default_batch(self.device, length)
        stream = Stream(network, windows, batch=batch, spill=Path(tempfile.gettempdir()))
        for layer in range(self.subject.model.graph.dims.num_layers):
            network.load(layer)
            trial = Trial(layer, rounded, stream)
            yield trial
            trial.finish()
            network.drop(layer)


class Trial:
    """Tries operators in one loaded block.

    Args:
        layer: Block index.
        subject: The model with the plan so far, and the scheme to round by.
        stream: Holds the block's inputs; its network has the block, and rounds nothing itself.

    Attributes:
        layer: Block index.
    """

    def __init__(self, layer: int, subject: Subject, stream: Stream) -> None:
        self.layer, self.subject, self.stream = layer, subject, stream
        self._outputs = list(self._run())

    def error(self, operators: Mapping[str, Sequence[Operator]]) -> float:
        """Return the mean squared error of the block's output with operators tried at sites of the block.

        Args:
            operators: By site id, behind what is at the site already. What reads the sites is rounded.

        Returns:
            In units of the block's output squared, over all tokens and channels.

        Raises:
            UsageError: No linear of this block reads a site.
        """
        with self._tried(self._by_input(operators)):
            parts = zip(self._run(), self._outputs, strict=True)
            total = torch.stack([(found - exact).double().square().sum() for found, exact in parts]).sum()
        return float(total) / sum(exact.numel() for exact in self._outputs)

    def finish(self) -> None:
        """Let the block's outputs in full precision become the stream's states."""
        for rows, exact in zip(self.stream.batches(), self._outputs, strict=True):
            self.stream.states[rows] = exact.to(self.stream.states)
        self._outputs.clear()

    def _run(self) -> Iterator[Float[Tensor, "batch tokens hidden"]]:
        """Run the block as it stands on each batch."""
        network, arguments = self.stream.network, self.stream.arguments_of(self.layer)
        for rows in self.stream.batches():
            yield network.run(self.layer, self.stream.states[rows].to(network.device), arguments)

    def _by_input(self, operators: Mapping[str, Sequence[Operator]]) -> dict[str, _Tried]:
        """Return what is tried by the name of the input that shows it: heads show in front of o_proj."""
        tried: dict[str, _Tried] = {}
        for site_id, given in operators.items():
            site = self.subject.model.graph.site(site_id)
            if site.layer != self.layer or not self.subject.model.graph.consumers(site):
                raise UsageError(
                    f"no quantized linear of block {self.layer} reads `{site_id}`",
                    hint="try operators at the inputs of linears, or at `vo`",
                )
            of_heads = site.name == "vo"
            name = "o_in" if of_heads else site.name
            already = tried.get(name, _Tried())
            tried[name] = replace(already, heads=tuple(given)) if of_heads else replace(already, input=tuple(given))
        return tried

    @contextmanager
    def _tried(self, tried: Mapping[str, _Tried]) -> Iterator[None]:
        """Change inputs and weights of the loaded block for as long as the context lasts."""
        graph, sites = self.subject.model.graph, self.stream.network.sites[self.layer]
        with ExitStack() as undo:
            for name, operators in tried.items():
                site = sites[name]
                undo.callback(site.forget)
                undo.callback(setattr, site, "operators", site.operators)
                site.forget()
                site.operators = (*operators.heads, *site.operators, *operators.input)
                readers = [linear for linear in graph.readers_of(self.layer) if linear.spec.reads == name]
                self._replace_weights(name, operators, readers, undo)
                for linear in readers:
                    if not linear.spec.kept:
                        self._round_input(linear, undo)
            yield

    def _round_input(self, linear: LinearSite, undo: ExitStack) -> None:
        """Let what a linear reads be rounded; all experts read one site, but each rounds its own share of it."""
        site = self.stream.network.sites[self.layer][linear.observed]
        if site.rounding is None:
            undo.callback(setattr, site, "rounding", None)
            site.rounding = self.subject.rounding(self.layer, linear.observed, self.stream.network.device)

    def _replace_weights(self, name: str, operators: _Tried, readers: Sequence[LinearSite], undo: ExitStack) -> None:
        """Transform what reads an input, and round what is quantized of it."""
        block = self.stream.network.blocks[self.layer]
        chain = operators.chain(self.subject.plan.at(f"layers.{self.layer}.{name}").online)
        fused: dict[object, list[tuple[nn.Module, Tensor]]] = {}
        grids: dict[object, Grid] = {}
        for linear in readers:
            module = block.get_submodule(linear.spec.module)
            weight: Tensor = module.get_parameter("weight").data
            stored: Tensor | None = module._parameters.get("bias")
            bias = stored
            for operator in chain:
                bias = operator.bias_in(weight, bias)
                weight = operator.weight_in(weight)
            if bias is not None and bias is not stored:
                _put(module, "bias", bias, undo)
            if linear.spec.kept or linear.name in self.subject.kept:
                _put(module, "weight", weight, undo)
            else:
                alike = (linear.fused_with, self.subject.scheme.of(linear.name).weights)
                fused.setdefault(alike, []).append((module, weight))
                grids[alike] = self.subject.weight_grid(linear)
        for key, siblings in fused.items():
            rounded = round_siblings([weight for _, weight in siblings], grids[key])
            for (module, _), weight in zip(siblings, rounded, strict=True):
                _put(module, "weight", weight, undo)


@dataclass(frozen=True)
class _Tried:
    """What is tried at an input.

    Attributes:
        heads: In front of what is there already: at the heads that the input is made of.
        input: Behind it.
    """

    heads: tuple[Operator, ...] = ()
    input: tuple[Operator, ...] = ()

    def chain(self, online: Sequence[Operator]) -> tuple[Operator, ...]:
        """Return what a weight that is behind ``online`` already goes through: undone only where heads change."""
        if not self.heads:
            return self.input
        return (*(one.inverse() for one in reversed(online)), *self.heads, *online, *self.input)


def round_siblings(weights: Sequence[Float[Tensor, "_ in"]], grid: Grid) -> list[Float[Tensor, "_ in"]]:
    """Round weights to nearest, with one tensor-level multiplier for all where the format has one.

    Args:
        weights: Of linears that engines fuse into one. Not modified.
        grid: What their columns are rounded to.
    """
    amax = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).float()
    multipliers = grid.global_scales(amax)
    rounded = []
    for weight in weights:
        values = torch.empty_like(weight)
        for (columns, part), multiplier in zip(grid.places(weight.shape[-1]), multipliers, strict=True):
            groups = part.groups(weight[:, columns])
            parameters = part.fit(groups.float(), global_scale=multiplier)
            values[:, columns] = from_groups(part.format.round(groups, parameters), weight[:, columns].shape)
        rounded.append(values)
    return rounded


def _put(module: nn.Module, leaf: str, value: Tensor, undo: ExitStack) -> None:
    """Put a tensor in place of a parameter until it is undone."""
    undo.callback(setattr, module, leaf, module._parameters.get(leaf))
    setattr(module, leaf, nn.Parameter(value, requires_grad=False))
