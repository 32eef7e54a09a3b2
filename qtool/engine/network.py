"""A model that is executed one decoder block at a time: skeleton without weights, blocks loaded and dropped.

The modules are transformers' own, so that no architecture is written twice; every linear of the family is replaced by
an ``ExecutedLinear``, and attention runs through ``qtool.engine.attention``. Peak memory is embedding,
head and one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from accelerate import init_empty_weights
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtool.engine import attention
from qtool.engine.attention import CHILD, KVPath
from qtool.engine.linear import ExecutedLinear, SiteInput
from qtool.engine.online import with_kernels
from qtool.engine.subject import BlockContent, Subject
from qtool.errors import ModelError

Inputs = list[dict[str, Any]]


class Network:
    """An executable model whose blocks are loaded on demand.

    Args:
        subject: What is executed: weights, operators, codes, activation schemes.
        device: Where it runs.
        dtype: What it computes in.
    """

    def __init__(self, subject: Subject, *, device: torch.device, dtype: torch.dtype) -> None:
        attention.register()
        self.subject, self.device, self.dtype = subject, device, dtype
        model, family = subject.model, subject.model.family
        config = deepcopy(model.config)
        if subject.plan.unties_head(tied=model.graph.dims.tied):
            config.tie_word_embeddings = False
        with init_empty_weights(include_buffers=False):
            self.module: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=model.trust_remote_code
            )
        self.module.eval().requires_grad_(False)
        self.backbone = self.module.get_submodule(family.backbone)
        self.blocks: nn.ModuleList = self.module.get_submodule(family.layers)
        self.sites: list[dict[str, SiteInput]] = [self._equip(layer) for layer in range(len(self.blocks))]
        ends = subject.ends()
        for name, tensor in ends.items():
            self._assign(name, tensor)
        for buffer_owner in self.module.modules():
            for key, buffer in buffer_owner.named_buffers(recurse=False):
                setattr(buffer_owner, key, buffer.to(device))

    def _equip(self, layer: int) -> dict[str, SiteInput]:
        """Replace the linears of a block and give its attention a path for keys and values."""
        family, block = self.subject.model.family, self.blocks[layer]
        sites = {name: SiteInput() for name in self.subject.model.graph.input_sites}
        for spec in family.linears:
            parent, _, leaf = spec.module.rpartition(".")
            owner = block.get_submodule(parent)
            original = getattr(owner, leaf)
            setattr(owner, leaf, ExecutedLinear(original, sites[spec.reads]))
        path = KVPath(*self.subject.kv_path(layer))
        block.get_submodule(family.attention).add_module(CHILD, path)
        return sites

    def _assign(self, name: str, tensor: Tensor) -> None:
        """Put a real tensor in place of a parameter by its full name."""
        owner_name, _, leaf = name.rpartition(".")
        owner = self.module.get_submodule(owner_name)
        value = tensor.to(device=self.device, dtype=self.dtype if tensor.is_floating_point() else tensor.dtype)
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))

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
        content = content or self.subject.block(layer)
        prefix = self.subject.model.graph.block_name(layer)
        for name, tensor in content.state.items():
            self._assign(f"{prefix}.{name}", tensor)
        missing = [name for name, parameter in self.blocks[layer].named_parameters() if parameter.is_meta]
        if missing:
            raise ModelError(
                f"the model lacks the tensor `{prefix}.{missing[0]}`",
                facts=(("model", self.subject.model.path), ("family", self.subject.model.family.name)),
                hint="check that the download is complete",
            )
        for name, site in self.sites[layer].items():
            site.forget()
            plan = self.subject.plan.at(f"layers.{layer}.{name}")
            site.operators = with_kernels(plan.online, self.subject.plugins, self.device)
            site.rounding = self.subject.rounding(layer, name, self.device)
        for spec in self.subject.model.family.linears:
            self.linear(layer, spec.module).adapter = content.adapters.get(spec.module)
        return content

    def linear(self, layer: int, module: str) -> ExecutedLinear:
        """Return a linear of a block by its name inside the block."""
        found = self.blocks[layer].get_submodule(module)
        if not isinstance(found, ExecutedLinear):
            raise TypeError(module)
        return found

    def drop(self, layer: int) -> None:
        """Forget a block's weights, adapters and what its sites remember."""
        for site in self.sites[layer].values():
            site.forget()
        for spec in self.subject.model.family.linears:
            self.linear(layer, spec.module).adapter = None
        self.blocks[layer].to("meta")

    def load_all(self) -> nn.Module:
        """Load every block and return the whole model, for tasks that generate or score with it."""
        for layer in range(len(self.blocks)):
            self.load(layer)
        return self.module

    @torch.no_grad()
    def embed(self, ids: Int[Tensor, "batch tokens"]) -> tuple[Float[Tensor, "batch tokens hidden"], Inputs]:
        """Return what the first block reads, and the keyword arguments of every block.

        The backbone runs once with recorders in place of its blocks: so masks, positions and scalings are the
        model's own, for every architecture.
        """
        recorders = [_Recorder(block) for block in self.blocks]
        owner_name, _, leaf = self.subject.model.family.layers.rpartition(".")
        owner = self.module.get_submodule(owner_name)
        real = getattr(owner, leaf)
        setattr(owner, leaf, nn.ModuleList(recorders))
        try:
            self.backbone(input_ids=ids.to(self.device), use_cache=False)
        finally:
            setattr(owner, leaf, real)
        return recorders[0].hidden, [recorder.arguments for recorder in recorders]

    @torch.no_grad()
    def run(self, layer: int, hidden: Float[Tensor, "batch tokens hidden"], arguments: Mapping[str, Any]) -> Tensor:
        """Run one loaded block."""
        result = self.blocks[layer](hidden, **arguments)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens vocab"]:
        """Run the final norm and the head."""
        family = self.subject.model.family
        normed = self.module.get_submodule(family.final_norm.module)(hidden)
        result: Tensor = self.module.get_submodule(family.head)(normed)
        return result


class _Recorder(nn.Module):
    """Stands in for a block and remembers what it was called with."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.hidden: Tensor = torch.empty(0)
        self.arguments: dict[str, Any] = {}
        for name in ("attention_type", "layer_type"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:  # noqa: ANN401 - whatever the model passes
        self.hidden = hidden_states
        skipped = ("past_key_values", "use_cache")
        self.arguments = {k: v for k, v in arguments.items() if k not in skipped}
        return hidden_states
