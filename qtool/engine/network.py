"""A model that is executed one decoder block at a time: skeleton without weights, blocks loaded and dropped.

The modules are transformers' own, so that no architecture is written twice; every linear of the family is replaced by
an ``ExecutedLinear``, the experts of a block by ``ExecutedExperts``, and attention runs through
``qtool.engine.attention``. What comes before the blocks and after them is the model's own forward pass with stubs in
place of its blocks. Peak memory is embedding, head and one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from qtool.engine import attention
from qtool.engine.attention import CHILD, KVPath
from qtool.engine.block_problem import Compensation
from qtool.engine.cache import KEYS, QUERIES, VALUES, CacheRounding
from qtool.engine.experts import ExecutedExperts, Mode, executed_experts, window_counter
from qtool.engine.fold import output_operators
from qtool.engine.linear import ExecutedLinear, Observer, Rounding, SiteInput
from qtool.engine.module_tensors import place, release, tensors_of
from qtool.engine.online import with_kernels
from qtool.engine.stubs import Stub, UnpackedError, stubs_for
from qtool.engine.subject import BlockContent, Subject
from qtool.errors import ModelError
from qtool.model.graph import HEAD_IN, LinearSite

Inputs = list[dict[str, Any]]


class Network:
    """An executable model whose blocks are loaded on demand.

    Args:
        subject: What is executed: weights, operators, codes, activation schemes.
        device: Where it runs.
        dtype: What it computes in.
        observed: What the observers of an expert are shown: ``all`` tokens, or those ``routed`` to it.

    Attributes:
        module: The whole model, as transformers builds it.
        sites: The inputs of each block by site name; an expert has ``experts.<e>.mlp_in`` of its own, whose operators
            are those of ``mlp_in``, done there for all experts. ``keys`` and ``values`` are for observers only. What a
            linear puts out is ``out.<module>``. Behind those of the last block comes the input of the head, which
            counts as one more block for ``show``, ``exact`` and ``rounded_by``.
        experts: The routed experts of each block that has any, by block.
    """

    def __init__(self, subject: Subject, *, device: torch.device, dtype: torch.dtype, observed: Mode = "all") -> None:
        attention.register()
        self.subject, self.device, self.dtype = subject, device, dtype
        model, family = subject.model, subject.model.family
        config = deepcopy(model.config)
        if subject.unties_head:
            config.tie_word_embeddings = False
        if getattr(config.get_text_config(), "output_router_logits", False):
            config.get_text_config().output_router_logits = False  # a loss for training, of all blocks at once
        with init_empty_weights(include_buffers=False):
            self.module: nn.Module = getattr(transformers, family.loader).from_config(
                config, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=model.trust_remote_code
            )
        self.module.eval().requires_grad_(False)
        self.backbone = self.module.get_submodule(family.backbone)
        self.blocks: nn.ModuleList = self.module.get_submodule(family.layers)
        self._tuples = False  # whether blocks return tuples
        self.experts: dict[int, ExecutedExperts] = {}
        self.compensations: dict[int, Compensation | None] = {}
        self.sites: list[dict[str, SiteInput]] = [self._equip(layer, observed) for layer in range(len(self.blocks))]
        self.sites.append(self._equip_head())
        for owner in self.module.modules():
            for key, buffer in owner.named_buffers(recurse=False):
                setattr(owner, key, buffer if buffer.is_meta else buffer.to(device))
        self._load_ends()

    def _equip(self, layer: int, observed: Mode) -> dict[str, SiteInput]:
        """Replace the linears of a block and give its attention a path for keys and values."""
        graph, block = self.subject.model.graph, self.blocks[layer]
        readers = graph.readers_of(layer)
        names = (*graph.input_sites_of(layer), *(linear.observed for linear in readers))
        sites = {name: SiteInput() for name in dict.fromkeys(names)}
        for linear in readers:
            if linear.expert is None:
                _replace(block, linear, sites[linear.spec.reads])
        if graph.family.experts is not None and graph.is_sparse(layer):
            owner, leaf = place(block, graph.family.experts.module)
            linears = [linear for linear in readers if linear.expert is not None]
            experts = executed_experts(getattr(owner, leaf), linears, sites, graph, dtype=self.dtype, observed=observed)
            setattr(owner, leaf, experts)
            block.register_forward_pre_hook(window_counter(experts, sites), with_kwargs=True)
            self.experts[layer] = experts
        operators, rounding = self.subject.kv_path(layer, self.device)
        path = KVPath(with_kernels(operators, self.subject.plugins, self.device), rounding)
        block.get_submodule(graph.family.attention).add_module(CHILD, path)
        release(block)
        block.register_forward_hook(partial(self._compensated, layer), with_kwargs=True)
        outputs = {one.puts_out: self.linear(layer, one.spec.module).output for one in graph.linears_of(layer)}
        return sites | {KEYS: path.keys, VALUES: path.values, QUERIES: path.queries} | outputs

    def _equip_head(self) -> dict[str, SiteInput]:
        """Replace the head, so that its input is rounded or observed where that is asked for."""
        head, site = self.subject.model.graph.head, SiteInput()
        site.rounding = self.subject.rounding(head.layer, HEAD_IN, self.device)
        _replace(self.module, head, site)
        return {HEAD_IN: site}

    def _compensated(
        self,
        layer: int,
        _: nn.Module,
        given: tuple[Any, ...],
        named: dict[str, Any],
        result: Tensor | tuple[Any, ...],
    ) -> Tensor | tuple[Any, ...]:
        """Add to the output of a block what a mitigator found to be missing."""
        compensation = self.compensations.get(layer)
        if compensation is None:
            return result
        x = given[0] if given else named["hidden_states"]
        if isinstance(result, tuple):
            return (compensation.added(x, result[0]), *result[1:])
        return compensation.added(x, result)

    def _load_ends(self) -> None:
        """Load what lies around the blocks: as the plan leaves it, or as it is stored."""
        family = self.subject.model.family
        for name, tensor in self.subject.ends(self.dtype).items():
            self._assign(name, tensor)
        for end in self.subject.coded_ends if self.subject.quantized is not None else ():
            found, target = self.subject.linear(end), self.module.get_submodule(end.name)
            self._assign(f"{end.name}.weight", found.weight(self.subject.weight_grid(end)))
            if isinstance(target, ExecutedLinear) and found.adapter is not None:
                target.adapter = found.adapter.on(self.device)
        around = {name: value for name, value in tensors_of(self.module) if not name.startswith(f"{family.layers}.")}
        for name, value in around.items():
            if value.is_meta and name.startswith((f"{family.backbone}.", f"{family.head}.")):
                self._assign(name, self.subject.stored(name))

    def _assign(self, name: str, tensor: Tensor) -> None:
        """Put a real tensor in place of a parameter or buffer by its full name; what the module lacks is left out."""
        try:
            owner, leaf = place(self.module, name)
        except AttributeError:
            return
        dtype = self._dtype_of(name) if tensor.is_floating_point() else tensor.dtype
        value = tensor.to(device=self.device, dtype=dtype)
        if leaf in owner._buffers and leaf not in owner._non_persistent_buffers_set:
            owner.register_buffer(leaf, value)
        elif leaf in owner._parameters:
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))

    def _dtype_of(self, name: str) -> torch.dtype:
        """Return what a tensor computes in: the network's dtype, unless the model wants more for this one."""
        wide: list[str] = []
        if self.dtype in (torch.float16, torch.bfloat16):
            wide += getattr(self.module, "_keep_in_fp32_modules_strict", None) or ()
        if self.dtype == torch.float16:
            wide += getattr(self.module, "_keep_in_fp32_modules", None) or ()
        return torch.float32 if set(wide) & set(name.split(".")) else self.dtype

    def load(self, layer: int, content: BlockContent | None = None) -> BlockContent:
        """Load a block: weights, operators, roundings, adapters.

        Args:
            layer: Block index.
            content: What to load; by default what the subject holds.

        Returns:
            What was loaded.

        Raises:
            ModelError: A parameter of the block is not in it.
        """
        content = content or self.subject.block(layer, self.dtype)
        graph = self.subject.model.graph
        prefix = graph.block_name(layer)
        for name, tensor in content.state.items():
            self._assign(f"{prefix}.{name}", tensor)
        missing = [name for name, value in tensors_of(self.blocks[layer]) if value.is_meta]
        if missing:
            raise ModelError(
                f"the model lacks the tensor `{prefix}.{missing[0]}`",
                facts=(("model", self.subject.model.path), ("family", self.subject.model.family.name)),
                hint="check that the download is complete",
            )
        shared = graph.input_sites_of(layer)
        for name, site in self.sites[layer].items():
            site.forget()
            if name in shared:
                plan = self.subject.plan.at(f"layers.{layer}.{name}")
                site.operators = with_kernels(plan.online, self.subject.plugins, self.device)
            site.rounding = self.subject.rounding(layer, name, self.device)
        self.compensations[layer] = content.compensation
        if layer in self.experts:
            self.experts[layer].reset()
        for linear in graph.linears_of(layer):
            target = self.linear(layer, linear.spec.module)
            adapter = content.adapters.get(linear.spec.module)
            target.adapter, target.replaced = None if adapter is None else adapter.on(self.device), None
            undone = [one.inverse() for one in reversed(output_operators(self.subject.plan, linear))]
            target.undone = with_kernels(undone, self.subject.plugins, self.device)
        return content

    def linear(self, layer: int, module: str) -> ExecutedLinear:
        """Return a linear of a block by its name inside the block."""
        found = self.blocks[layer].get_submodule(module)
        if not isinstance(found, ExecutedLinear):
            raise TypeError(module)
        return found

    @contextmanager
    def exact(self, layer: int) -> Iterator[None]:
        """Let a loaded block compute in full precision: no activations, keys or values rounded, no weights replaced."""
        linears = self.subject.model.graph.linears_of(layer) if layer < len(self.blocks) else ()
        with ExitStack() as stack:
            stack.enter_context(self.rounded_by(layer, lambda name: None, None))
            for linear in linears:
                stack.enter_context(self.linear(layer, linear.spec.module).restored())
            yield

    @contextmanager
    def rounded_by(
        self, layer: int, rounding_of: Callable[[str], Rounding | None], of_cache: CacheRounding | None
    ) -> Iterator[None]:
        """Let a loaded block round as it is told for as long as the context lasts.

        Args:
            layer: Block index.
            rounding_of: What rounds the activations of a site, by name.
            of_cache: What rounds keys and values.
        """
        sites, paths = self.sites[layer], [self.kv_path(layer)] if layer < len(self.blocks) else []
        before, caches = {name: site.rounding for name, site in sites.items()}, [path.rounding for path in paths]
        try:
            for name, site in sites.items():
                site.forget()
                site.rounding = rounding_of(name)
            for path in paths:
                path.rounding = of_cache
            yield
        finally:
            for path, cache in zip(paths, caches, strict=True):
                path.rounding = cache
            for name, site in sites.items():
                site.forget()
                site.rounding = before[name]

    def kv_path(self, layer: int) -> KVPath:
        """Return what a block's attention does to keys and values."""
        found = self.blocks[layer].get_submodule(f"{self.subject.model.graph.family.attention}.{CHILD}")
        if not isinstance(found, KVPath):
            raise TypeError(CHILD)
        return found

    def drop(self, layer: int) -> None:
        """Forget a block's weights, adapters and what its sites remember."""
        self.forget(layer)
        for linear in self.subject.model.graph.linears_of(layer):
            target = self.linear(layer, linear.spec.module)
            target.adapter = target.replaced = None
        self.compensations[layer] = None
        release(self.blocks[layer])

    def forget(self, layer: int) -> None:
        """Let go of what the sites of a block remember."""
        for site in self.sites[layer].values():
            site.forget()

    def load_all(self) -> nn.Module:
        """Load every block; return the whole model, for tasks that generate or score with it."""
        for layer in range(len(self.blocks)):
            self.load(layer)
        return self.module

    @torch.no_grad()
    def embed(self, ids: Int[Tensor, "batch tokens"]) -> tuple[Float[Tensor, "batch tokens hidden"], Inputs]:
        """Return what the first block reads, and the keyword arguments of every block.

        The backbone runs once with stubs for blocks: so masks, positions and scalings are the model's own.
        """
        stubs, _ = self._with_stubs(lambda: self.backbone(input_ids=ids.to(self.device), use_cache=False))
        return stubs[0].hidden, [stub.arguments for stub in stubs]

    def run(self, layer: int, hidden: Float[Tensor, "batch tokens hidden"], arguments: Mapping[str, Any]) -> Tensor:
        """Run one loaded block; with gradients where ``hidden`` requires them."""
        with torch.set_grad_enabled(hidden.requires_grad):
            result = self.blocks[layer](hidden, **arguments)
        self._tuples = isinstance(result, tuple)
        output: Tensor = result[0] if self._tuples else result
        return output

    def differentiable(
        self,
        layer: int,
        hidden: Float[Tensor, "batch tokens hidden"],
        arguments: Mapping[str, Any],
        weights: Mapping[str, Tensor],
    ) -> Tensor:
        """Run one loaded block with other weights, by module name inside the block, and keep what gradients need."""
        given = {f"{module}.weight": weight.to(self.dtype) for module, weight in weights.items()}
        result = functional_call(self.blocks[layer], given, (hidden,), dict(arguments))
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def show(self, layer: int, hidden: Float[Tensor, "batch tokens hidden"], arguments: Mapping[str, Any]) -> None:
        """Run one loaded block for its observers only: what comes after the last site that has one is not computed."""
        observers = {site: site.observer for site in self.sites[layer].values() if site.observer is not None}
        waiting = set(observers)
        try:
            for site, observer in observers.items():
                site.observer = partial(_shown, site, observer, waiting)
            if layer == len(self.blocks):
                self.logits(hidden)
            else:
                self.run(layer, hidden, arguments)
        except _AllSeen:
            pass
        finally:
            for site, observer in observers.items():
                site.observer = observer

    def logits(
        self, hidden: Float[Tensor, "batch tokens hidden"], weights: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Float[Tensor, "batch tokens vocab"]:
        """Run what follows the blocks: the model's own forward pass with stubs, of which the last gives ``hidden``.

        With gradients where ``hidden`` requires them.

        Args:
            hidden: What the last block puts out.
            weights: Other weights for what follows, by full name.
        """
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        given, named = (
            {name: one.to(self.dtype) for name, one in weights.items()},
            {"input_ids": ids, "use_cache": False},
        )
        with torch.set_grad_enabled(hidden.requires_grad):
            _, result = self._with_stubs(lambda: functional_call(self.module, given, (), named), hidden)
        logits: Tensor = result.logits
        return logits

    def _with_stubs(self, call: Callable[[], Any], hidden: Tensor | None = None) -> tuple[list[Stub], Any]:
        """Call the model with stubs in place of its blocks, of which the last gives ``hidden``; return both."""
        owner, leaf = place(self.module, self.subject.model.family.layers)
        stubs = stubs_for(self.blocks, tuples=self._tuples)
        stubs[-1].result = hidden
        setattr(owner, leaf, nn.ModuleList(stubs))
        try:
            return stubs, call()
        except UnpackedError:
            if self._tuples:
                raise
            self._tuples = True
        finally:
            setattr(owner, leaf, self.blocks)
        return self._with_stubs(call, hidden)


class _AllSeen(Exception):  # noqa: N818 - not an error: it leaves a block from within
    """Every observed site of a block has had its input."""


def _shown(site: SiteInput, observer: Observer, waiting: set[SiteInput], x: Float[Tensor, "tokens n"]) -> None:
    """Show a site's observer its input, and leave the block if it is the last that waits for one."""
    observer(x)
    waiting.discard(site)
    if not waiting:
        raise _AllSeen


def _replace(block: nn.Module, linear: LinearSite, site: SiteInput) -> None:
    """Let a linear read a site: its own module, if it is kept in full precision, sees the operators only."""
    owner, leaf = place(block, linear.spec.module)
    original = getattr(owner, leaf)
    if not linear.spec.kept:
        setattr(owner, leaf, ExecutedLinear(original.weight, original.bias, site, linear.spec.module))
        return

    def operated(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if given:
            return (site.operated(given[0]), *given[1:]), named
        name = next(iter(named))
        return (), named | {name: site.operated(named[name])}

    original.register_forward_pre_hook(operated, with_kwargs=True)
    site.readers += 1
