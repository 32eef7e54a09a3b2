"""What is executed: a model, perhaps transformed by a plan, perhaps with quantized linears.

A subject says what each block holds; ``Network`` runs it. Everything that is evaluated, calibrated or packed goes
through here, so a plan, a quantized artifact and the original model are executed by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from qtool.artifacts.store import Artifact
from qtool.engine.block_problem import Compensation
from qtool.engine.cache import CacheRounding
from qtool.engine.fold import fold_block, fold_ends, shifts_inputs
from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding
from qtool.engine.packed import PackedLinear
from qtool.engine.problem import Adapter, QuantizedLinear
from qtool.engine.stored import (
    COMPENSATION,
    NORMS,
    OUTLIERS,
    read_compensation,
    read_linear,
    read_packed_linear,
)
from qtool.model.graph import LinearSite
from qtool.model.plan import Plan
from qtool.model.source import Model
from qtool.numerics.operators import Operator
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme


@dataclass(frozen=True)
class BlockContent:
    """A block ready to run: tensors by name inside the block, adapters by linear, and what is added to its output."""

    state: Mapping[str, Tensor]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    compensation: Compensation | None = None


@dataclass(frozen=True)
class Subject:
    """A model as it is to be executed.

    Attributes:
        model: The original model.
        plugins: Where formats are found.
        plan: Its transform.
        scheme: What is quantized: activations and KV cache always as it says, weights if ``quantized`` is given.
        quantized: The artifact that holds the linears' codes, or None for float weights.
    """

    model: Model
    plugins: Plugins
    plan: Plan = field(default_factory=Plan)
    scheme: ModelScheme = field(default_factory=ModelScheme)
    quantized: Artifact | None = None

    def stored(self, name: str) -> Tensor:
        """Read a stored tensor of the model by its full name; the embedding stands for a tied head."""
        family = self.model.family
        if name == f"{family.head}.weight" and not self.model.has(name) and self.model.graph.dims.tied:
            name = f"{family.embedding}.weight"
        return self.model.tensor(name)

    def ends(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Return final norm, and embedding and head unless they are quantized, as they are executed, by full name.

        Args:
            dtype: Of the embedding and the head where the plan changes them.
        """
        graph, family = self.model.graph, self.model.family
        coded = {f"{one.name}.weight" for one in self.coded_ends} if self.quantized is not None else set()

        def state(name: str) -> Tensor:
            return torch.empty(0, graph.dims.hidden) if name in coded else self.stored(name)

        ends = fold_ends(graph, self.plan, state, dtype=dtype)
        ends = {name: tensor for name, tensor in ends.items() if name not in coded}
        return {**ends, **self._norms(family.final_norm.module)}

    @cached_property
    def head(self) -> LinearSite | None:
        """The head, if its weights are quantized."""
        head = self.model.graph.head
        return None if self.scheme.of(head.name).weights is None else head

    @cached_property
    def coded_ends(self) -> tuple[LinearSite, ...]:
        """Those of head and embedding whose weights are quantized."""
        return tuple(one for one in self.model.graph.ends if self.scheme.of(one.name).weights is not None)

    @property
    def unties_head(self) -> bool:
        """Whether a head that shares the embedding's weights gets its own: of the plan, or since one is quantized."""
        tied = self.model.graph.dims.tied
        return self.plan.unties_head(tied=tied) or (tied and bool(self.coded_ends))

    def shape(self, linear: LinearSite) -> tuple[int, int]:
        """Return the rows and columns of a linear's weight; those of a tied head are the embedding's."""
        places, family = self.model.places, self.model.family
        rows, columns = places.get(f"{linear.name}.weight", places[f"{family.embedding}.weight"]).shape
        return rows, columns

    def folded(self, layer: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Return a block's float tensors with the plan folded in, names relative to the block.

        Args:
            layer: Block index.
            dtype: Of the linears' weights where the plan changes them.
        """
        graph = self.model.graph
        block = graph.block_name(layer)
        folded = fold_block(graph, self.plan, layer, self.model.tensors(f"{block}."), dtype=dtype)
        return folded | self._norms(block, inside=True)

    def _norms(self, owner: str, *, inside: bool = False) -> dict[str, Tensor]:
        """Return the weights of norms that a mitigator changed, by full name or by name inside their owner."""
        if self.quantized is None:
            return {}
        found = self.quantized.tensors(f"{NORMS}{owner}.")
        return found if inside else {f"{owner}.{name}": tensor for name, tensor in found.items()}

    def beside(self, layer: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Return what ``folded`` does without the weights of quantized linears, whose codes stand for them.

        They are not even read, unless biases are folded that take something of them.
        """
        graph, places = self.model.graph, self.model.places
        block = graph.block_name(layer)
        weights = {linear.spec.module: f"{linear.name}.weight" for linear in self.linears_of(layer)}
        if shifts_inputs(graph, self.plan, layer, lambda name: f"{block}.{name}" in places):
            state = self.folded(layer, dtype)
            return {name: tensor for name, tensor in state.items() if f"{block}.{name}" not in weights.values()}
        rows = {module: places[name].shape[0] for module, name in weights.items()}
        state = self.model.tensors(f"{block}.", without=weights.values())
        return fold_block(graph, self.plan, layer, state, dtype=dtype, rows=rows) | self._norms(block, inside=True)

    def block(self, layer: int, dtype: torch.dtype) -> BlockContent:
        """Return a block as it is executed in a dtype."""
        coded = self.quantized is not None and bool(self.scheme.every("weights"))
        state = self.beside(layer, dtype) if coded else self.folded(layer, dtype)
        adapters: dict[str, Adapter] = {}
        compensation = None
        if self.quantized is not None and coded:
            block = self.model.graph.block_name(layer)
            prefix = f"{block}{COMPENSATION}"
            stored = {f"{prefix}{name}": tensor for name, tensor in self.quantized.tensors(prefix).items()}
            compensation = read_compensation(block, stored)
            for linear in self.linears_of(layer):
                found = self.linear(linear)
                state[f"{linear.spec.module}.weight"] = found.weight(self.weight_grid(linear))
                if found.adapter is not None:
                    adapters[linear.spec.module] = found.adapter
        return BlockContent(state, adapters, compensation)

    def linear(self, linear: LinearSite) -> QuantizedLinear:
        """Read one quantized linear."""
        width = self.model.graph.width(linear.spec.reads)
        return read_linear(linear.name, width, self._stored_of(linear), self.weight_grid(linear))

    def packed(self, linear: LinearSite) -> PackedLinear:
        """Read one quantized linear of one scheme, and leave its codes packed."""
        width = self.model.graph.width(linear.spec.reads)
        return read_packed_linear(linear.name, width, self._stored_of(linear), self.weight_grid(linear))

    def only_codes(self, linear: LinearSite) -> bool:
        """Say whether all that is stored of a quantized linear is in what ``packed`` reads."""
        stored = () if self.quantized is None else self.quantized.names(f"{linear.name}.")
        beside = any(mark in name for name in stored for mark in (".adapter.", f"{OUTLIERS}."))
        return not beside and self.weight_grid(linear).only is not None

    def _stored_of(self, linear: LinearSite) -> dict[str, Tensor]:
        """Read the stored tensors of a quantized linear by their full names."""
        if self.quantized is None:
            raise LookupError(linear.name)
        prefix = f"{linear.name}."
        return {f"{prefix}{name}": tensor for name, tensor in self.quantized.tensors(prefix).items()}

    @cached_property
    def linears(self) -> tuple[LinearSite, ...]:
        """The linears of blocks whose weights are quantized, in order of execution."""
        return tuple(one for one in self.model.graph.linears if one.name not in self.kept)

    @cached_property
    def coded(self) -> tuple[LinearSite, ...]:
        """All that has quantized weights: the linears of blocks, and behind them head and embedding if they have."""
        return (*self.linears, *self.coded_ends)

    @cached_property
    def kept(self) -> frozenset[str]:
        """Names of the linears of blocks whose weights the scheme leaves in 16 bits."""
        names = (linear.name for linear in self.model.graph.linears)
        return frozenset(name for name in names if self.scheme.of(name).weights is None)

    def linears_of(self, layer: int) -> tuple[LinearSite, ...]:
        """Return the linears of one block whose weights are quantized."""
        return tuple(one for one in self.model.graph.linears_of(layer) if one.name not in self.kept)

    def weight_grid(self, linear: LinearSite) -> Grid:
        """Return what the weight of a linear is rounded to.

        Raises:
            LookupError: The scheme leaves it as it is.
        """
        weights = self.scheme.of(linear.name).weights
        if weights is None:
            raise LookupError(linear.name)
        return Grid.segmented(weights, self.plan.at(linear.reads).segments, self.plugins.format)

    def input_grid(self, linear: LinearSite) -> Grid | None:
        """Return what the input of a linear is rounded to, or None."""
        own = self.scheme.of(linear.name)
        scheme = own.activations
        if scheme is None:
            return None
        if own.scale_per_head and linear.spec.reads == "o_in":
            scheme = replace(scheme, strategy="group", group_size=self.model.graph.dims.head_dim)
        return Grid.segmented(scheme, self.plan.at(linear.reads).segments, self.plugins.format)

    def output_grid(self, linear: LinearSite) -> Grid | None:
        """Return what the output of a linear is rounded to, or None."""
        scheme = self.scheme.of(linear.name).outputs
        return None if scheme is None else Grid.of(scheme, self.plugins.format(scheme.format))

    def rounding(self, layer: int, site: str, device: torch.device) -> Rounding | None:
        """Return how the activations of a site are quantized, or None.

        Args:
            layer: Block index.
            site: A site that linears read or put out, or where an expert's own share of one is observed.
            device: Where calibrated multipliers are to be.
        """
        if (linear := self._writers.get((layer, site))) is not None:
            grid, site_id = self.output_grid(linear), f"layers.{layer}.{site}"
            return None if grid is None else Rounding(grid).calibrated(site_id, self._quantized_tensor, device)
        readers = self._readers.get((layer, site), ())
        grids = [(linear, self.input_grid(linear)) for linear in readers]
        found = next(((linear.reads, grid) for linear, grid in grids if grid is not None), None)
        if found is None:
            return None
        site_id, used = found
        spared = frozenset(linear.spec.module for linear, grid in grids if grid is None)
        return Rounding(used, spared=spared).calibrated(site_id, self._quantized_tensor, device)

    @cached_property
    def _writers(self) -> dict[tuple[int, str], LinearSite]:
        """The linears by layer and name of what they put out."""
        return {(linear.layer, linear.puts_out): linear for linear in self.model.graph.linears}

    @cached_property
    def _readers(self) -> dict[tuple[int, str], list[LinearSite]]:
        """The linears that read a site, or an expert's share of it, by layer and name."""
        readers: dict[tuple[int, str], list[LinearSite]] = {}
        for linear in (*self.model.graph.linears, self.model.graph.head):
            for name in dict.fromkeys((linear.spec.reads, linear.observed)):
                readers.setdefault((linear.layer, name), []).append(linear)
        return readers

    def _quantized_tensor(self, name: str) -> Tensor | None:
        """Read a tensor of the quantized artifact, None where there is no such."""
        if self.quantized is None or name not in self.quantized.header.slots:
            return None
        return self.quantized.tensor(name)

    @cached_property
    def cache(self) -> CacheRounding | None:
        """How keys and values are rounded, and queries, before anything of it is calibrated."""
        return CacheRounding.of(self.scheme, self.plugins.format)

    def kv_path(self, layer: int, device: torch.device) -> tuple[tuple[Operator, ...], CacheRounding | None]:
        """Return what acts on a block's keys and queries, and how its keys and values are rounded.

        Args:
            layer: Block index.
            device: Where calibrated scales are to be.
        """
        operators, cache = self.plan.at(f"layers.{layer}.qk_post").operators, self.cache
        return operators, None if cache is None else cache.calibrated(layer, self._quantized_tensor, device)
