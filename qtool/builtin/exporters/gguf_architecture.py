"""Models as llama.cpp knows them: names of architectures and tensors, keys, and what each architecture cannot run.

llama.cpp takes the layout of blocks from the name of the architecture, and says nothing of what it does not read. So
whatever a config may change and a file cannot say is refused here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qtool.builtin.exporters.gguf_ends import shares_codes
from qtool.engine.subject import Subject
from qtool.errors import UsageError
from qtool.model.naming import split_block
from qtool.model.source import Model

DENSE = "qtool pack SOURCE --to hf"
_GELU = ("gelu_pytorch_tanh",)
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp makes of an architecture.

    Attributes:
        name: ``general.architecture``.
        neighbours: Queries and keys turn in pairs of neighbours there, so their rows are reordered.
        biases: Linears of a block whose bias it reads.
        wide: Whether all heads of queries together may be wider, or less wide, than the residual.
        own_head: Whether a head of its own is read; otherwise the embedding stands for it.
        activations: Functions of the MLP that it computes.
        full_every: One block in so many attends to everything, the others to a window; 0: there are no windows.
        tensor_scales: Whether it multiplies by the scale of an NVFP4 tensor; where it does not, it says nothing.
        large: Number of blocks of the one size whose queries are scaled by hidden size over heads.
        capped: Whether scores and logits have caps, those of the paper where a file names none.
    """

    name: str
    neighbours: bool = False
    biases: tuple[str, ...] = ()
    wide: bool = True
    own_head: bool = True
    activations: tuple[str, ...] = ("silu",)
    full_every: int = 0
    tensor_scales: bool = False
    large: int = 0
    capped: bool = False


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = Architecture(
    "llama",
    neighbours=True,
    tensor_scales=True,
    biases=(*_QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", biases=_QKV, wide=False),
    "qwen3": Architecture("qwen3", tensor_scales=True),
    "gemma": Architecture("gemma", own_head=False, activations=_GELU),
    "gemma2": Architecture("gemma2", own_head=False, activations=_GELU, full_every=2, large=46, capped=True),
    "gemma3_text": Architecture("gemma3", activations=_GELU, full_every=6, large=62),
}
"""By the ``model_type`` of a config."""


def architecture_of(model: Model) -> Architecture:
    """Return what llama.cpp calls a model.

    Raises:
        UsageError: qtool does not write this one.
    """
    found = ARCHITECTURES.get(model.config.model_type)
    if found is None:
        raise UsageError(
            f"qtool writes no GGUF of the model type `{model.config.model_type}`",
            facts=(("written", ", ".join(ARCHITECTURES)),),
            hint=DENSE,
        )
    return found


def check_architecture(subject: Subject) -> None:
    """Refuse models and plans that llama.cpp would run as something else.

    Raises:
        UsageError: Says what it cannot run.
    """
    model, found = subject.model, architecture_of(subject.model)
    config, dims = model.config, model.graph.dims
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
    rope = rope_of(config)
    known = ("default", "linear", "llama3") if found is _LLAMA else ("default", "linear")
    heads = dims.hidden // dims.num_heads if dims.num_layers == found.large else dims.head_dim
    scalar = getattr(config, "query_pre_attn_scalar", heads)
    wrong = {
        f"the activation `{activation}`": activation not in found.activations,
        f"RoPE of the type `{rope['rope_type']}`": rope["rope_type"] not in known,
        "heads of which positions turn only a part": dims.turned != dims.head_dim,
        "heads that are not as wide as the residual": not found.wide and dims.num_heads * dims.head_dim != dims.hidden,
        "these blocks with sliding windows": _windows(config) != _windows_of(found, dims.num_layers),
        f"queries scaled by {scalar} ** -0.5 instead of {heads} ** -0.5": scalar != heads,
        "scores and logits without a cap": found.capped
        and not (config.attn_logit_softcapping and config.final_logit_softcapping),
        "a head beside the embedding": not found.own_head
        and (not dims.tied or subject.unties_head)
        and not shares_codes(subject),
    }
    reason = next((words for words, holds in wrong.items() if holds), None)
    if reason is not None:
        raise UsageError(f"llama.cpp's `{found.name}` does not run {reason}", hint=DENSE)
    for layer in range(dims.num_layers if subject.plan.empty else 1):
        prefix = f"{model.graph.block_name(layer)}."
        own = [name.removeprefix(prefix) for name in model.places if name.startswith(prefix)]
        check_biases(found, own if subject.plan.empty else list(subject.folded(layer, torch.float32)))


def check_tensor_scales(subject: Subject) -> None:
    """Refuse NVFP4 where llama.cpp does not multiply by the scale of a tensor, or stops beside a bias.

    Raises:
        UsageError: Names the nearest scheme that it runs.
    """
    model, found = subject.model, architecture_of(subject.model)
    in_mlp = next((linear.name for linear in model.graph.linears if ".mlp." in linear.name), "")
    biased = any(model.has(f"{one.name}.bias") for one in model.graph.linears if ".mlp." in one.name)
    if not found.tensor_scales or biased:
        reason = f"beside biases of an MLP (`{in_mlp}.bias`)" if biased else f"of `{found.name}`"
        raise UsageError(f"llama.cpp does not run NVFP4 {reason}", hint="nearest that fits: --weights mxfp4")


def check_biases(found: Architecture, names: list[str]) -> None:
    """Refuse biases that llama.cpp does not read.

    Args:
        found: The architecture.
        names: Names of tensors inside a block.

    Raises:
        UsageError: Names the first.
    """
    lost = [name for name in names if name.endswith(".bias") and name.removesuffix(".bias") not in found.biases]
    if lost:
        raise UsageError(f"llama.cpp's `{found.name}` reads no bias at `{lost[0]}`", hint=DENSE)


def tensor_names(model: Model) -> Mapping[str, str]:
    """Return what llama.cpp calls modules, by the names that the graph knows."""
    return names_of(model, {name.rpartition(".")[0] for name in model.places} | {model.family.head})


def names_of(model: Model, modules: Collection[str]) -> Mapping[str, str]:
    """Return what llama.cpp calls some modules, without those that it does not know."""
    wanted = architecture_of(model).name
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    table = gguf.get_tensor_name_map(kind, model.graph.dims.num_layers)
    named = {module: table.get_name(module) for module in modules}
    return {module: str(name) for module, name in named.items() if name is not None}


def row_order(model: Model, module: str) -> Int[Tensor, " rows"] | None:
    """Return which of our rows each row of a linear is in the file; None where they are in our order.

    transformers turns channels ``i`` and ``i + d/2`` of a head together, llama.cpp's llama ``2i`` and ``2i + 1``.

    Args:
        model: The model.
        module: Full name of the linear.
    """
    dims, inside = model.graph.dims, split_block(module, model.family)[1]
    heads = {"self_attn.q_proj": dims.num_heads, "self_attn.k_proj": dims.num_kv_heads}.get(inside)
    if heads is None or not architecture_of(model).neighbours:
        return None
    rows = torch.arange(heads * dims.head_dim)
    return rows.reshape(heads, 2, dims.head_dim // 2).transpose(1, 2).reshape(-1)


def rope_of(config: Any) -> Mapping[str, Any]:  # noqa: ANN401 - each family has its own config class
    """Return the RoPE parameters of the blocks that attend to everything."""
    found = config.rope_parameters
    return found.get("full_attention", found)  # type: ignore[no-any-return]


def rope_factors(model: Model) -> dict[str, Float[Tensor, " half"]]:
    """Return the tensor by which Llama 3 divides its frequencies; nothing for other RoPE."""
    parameters = rope_of(model.config)
    if parameters["rope_type"] != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    half = model.graph.dims.head_dim // 2
    plain = float(parameters["rope_theta"]) ** -(torch.arange(half, dtype=torch.float64) / half)
    return {_ROPE_FACTORS: (plain / scaled.double()).float()}


def add_keys(writer: Any, model: Model) -> None:  # noqa: ANN401 - the package has no types
    """Write what llama.cpp has to know of the sizes and numbers of a model."""
    config, dims, found = model.config, model.graph.dims, architecture_of(model)
    rope = rope_of(config)
    writer.add_type("model")
    writer.add_block_count(dims.num_layers)
    writer.add_context_length(dims.max_positions)
    writer.add_embedding_length(dims.hidden)
    writer.add_feed_forward_length(dims.intermediate)
    writer.add_head_count(dims.num_heads)
    writer.add_head_count_kv(dims.num_kv_heads)
    writer.add_key_length(dims.head_dim)
    writer.add_value_length(dims.value_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(dims.vocab)
    writer.add_rope_dimension_count(dims.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if found.full_every:
        writer.add_sliding_window(config.sliding_window)
        local = config.rope_parameters.get("sliding_attention")
        if local is not None:
            writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _windows(config: Any) -> list[bool]:  # noqa: ANN401 - each family has its own config class
    """Say of each block whether it attends to a window only."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return [kind == "sliding_attention" for kind in kinds]
    window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return [window] * config.num_hidden_layers


def _windows_of(found: Architecture, layers: int) -> list[bool]:
    return [bool(found.full_every) and (layer + 1) % found.full_every != 0 for layer in range(layers)]
