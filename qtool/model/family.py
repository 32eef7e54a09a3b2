"""A family of models as data: which linear reads which site and writes which, and what lies between.

One description serves every method. Names are those of the modules in transformers, relative to the block; where files
name tensors otherwise, ``Family.stored_as`` says how. Experts are described once, for all of them: whatever a file or a
module does with them (one three-dimensional parameter for all), here every expert has linears of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

NormKind = Literal["rms", "layer"]
Blocks = Literal["all", "dense", "sparse"]


@dataclass(frozen=True)
class Norm:
    """A normalisation in front of linears.

    Attributes:
        module: Path inside the block (or from the root, for the final norm).
        kind: ``rms``, or ``layer`` (which removes the mean and has a bias).
        offset: Constant added to the stored weight in the forward pass: 1 for Gemma's ``(1 + w)``.
        bias: Of a layer norm, whether it has a bias.
        of_residual: Whether it normalises the residual; otherwise the output of another linear, or a part of it.
    """

    module: str
    kind: NormKind = "rms"
    offset: float = 0.0
    bias: bool = True
    of_residual: bool = True


@dataclass(frozen=True)
class Part:
    """Neighbouring output rows of a fused linear.

    Attributes:
        size: Number of rows, by its name in ``Dimensions.sizes``.
        writes: Site that they feed, as ``Linear.writes``.
        feeds: Site that they reach through functions of each channel alone, as ``Linear.feeds``.
    """

    size: str
    writes: str = ""
    feeds: str = ""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block.

    Attributes:
        module: Path inside the block (inside an expert, for those of ``Experts``).
        reads: Site of its input: ``attn_in``, ``o_in``, ``mlp_in``, ``up_down``, ….
        writes: Site that its output feeds without a nonlinearity in between: ``residual``, ``vo`` (value heads),
            ``up_down`` (the value path of a gated MLP), ``queries`` and ``keys``. Empty: nothing can be folded into
            its output.
        feeds: Site that its output reaches through functions of each channel alone (the gate of an MLP): permutations
            of the site reorder its rows.
        writes_through: Norm that the output passes before it reaches the residual (sandwich norms).
        parts: Of a fused linear, its outputs in the order of their rows; ``writes`` is empty then.
        per_head: Whether the parts come again for each key/value head, instead of once.
        kept: Why it stays in full precision (a router, a gate); it is transformed with its site all the same.
        blocks: Which blocks have it, in a model where experts are not everywhere.
    """

    module: str
    reads: str
    writes: str = ""
    feeds: str = ""
    writes_through: str = ""
    parts: tuple[Part, ...] = ()
    per_head: bool = False
    kept: str = ""
    blocks: Blocks = "all"


@dataclass(frozen=True)
class Rotary:
    """How positions turn queries and keys.

    Attributes:
        pairs: Channels that turn together, of the d that turn: ``halves`` are i and i + d/2, ``neighbours`` 2i and
            2i + 1.
        norms: Norms of queries and of keys in front of that, whose weight all heads share; None without them.
    """

    pairs: Literal["halves", "neighbours"] = "halves"
    norms: tuple[Norm, Norm] | None = None


@dataclass(frozen=True)
class Experts:
    """The routed experts of a block.

    Attributes:
        module: The module that holds them all.
        count: Attribute of the config with their number.
        chosen: Attribute of the config with how many a token is sent to.
        linears: Linears of one expert, named inside it; what they write or read beside ``mlp_in`` and the residual is
            the expert's own (``up_down`` becomes ``experts.3.up_down``).
        stacked: Whether files hold one tensor ``[experts, in, out]`` for all, instead of one linear for each.
    """

    module: str
    count: str
    chosen: str
    linears: tuple[Linear, ...]
    stacked: bool = False


@dataclass(frozen=True)
class Family:
    """Everything that qtool needs to know of a family.

    Attributes:
        name: Name in manifests.
        model_types: ``model_type`` values of configs that it covers.
        covers: Says of a config whether it is meant, where an option of the config gives blocks other linears and
            families share a ``model_type``; None: always.
        backbone: Module that embeds tokens and runs the blocks.
        layers: Path of the list of blocks.
        embedding: Path of the token embedding.
        final_norm: Norm in front of the head.
        head: Path of the output projection.
        norms: Norm that produces each input site, by site; None for a site that is the residual itself.
        linears: The linears of a block, in order of execution; linears that read one site form a stage.
        attention: Path of the attention module inside the block.
        rotary: How positions turn queries and keys, for scales in front of that; None allows none there.
        experts: The routed experts of sparse blocks, if the family has them.
        sparse: Says of a config and a block index whether the block has experts; None: all have, where any has.
        sizes: Names of sizes that differ from ``Dimensions`` or are missing there, to attributes of the config, or to
            products of them: ``{"shared.up_down": "moe_intermediate_size*n_shared_experts"}``. An input site's width
            is the size of its name.
        writers: Modules outside of the blocks, beside the embedding, whose outputs become the residual: the projector
            of a vision tower.
        fixed_residual: Why no operator may be folded into the residual at all: something that writes it is no linear.
        logits: What happens to a query's logits before softmax: ``capped`` ones do not bear the constant that a shift
            of the keys adds to all of them; beside a ``sink`` the weights do not sum to one, so values bear no shift
            either.
        stored_as: Beginnings of module names to what files call them, where they differ.
        loader: The Auto class of transformers that builds the model.
        untouched: Beginnings of names of parameters that are left alone, to the reason.
        note: What a user must know of the family: what is refused, and why.
        tiny: Changes to the small config that ``qtool.testing`` makes models of, one mapping for each variant of the
            family that is worth a check; the first is the usual one.
    """

    name: str
    model_types: tuple[str, ...]
    final_norm: Norm
    norms: Mapping[str, Norm | None]
    linears: tuple[Linear, ...]
    backbone: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    attention: str = "self_attn"
    rotary: Rotary | None = None
    covers: Callable[[Any], bool] | None = None
    experts: Experts | None = None
    sparse: Callable[[Any, int], bool] | None = None
    sizes: Mapping[str, str] = field(default_factory=dict)
    writers: tuple[str, ...] = ()
    fixed_residual: str = ""
    logits: Literal["free", "capped", "sink"] = "free"
    stored_as: Mapping[str, str] = field(default_factory=dict)
    loader: Literal["AutoModelForCausalLM", "AutoModelForImageTextToText"] = "AutoModelForCausalLM"
    untouched: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    tiny: tuple[Mapping[str, Any], ...] = ({},)


LLAMA_LIKE_NORMS: Mapping[str, Norm] = {
    "attn_in": Norm("input_layernorm"),
    "mlp_in": Norm("post_attention_layernorm"),
}

LLAMA_LIKE_ATTENTION: tuple[Linear, ...] = (
    Linear("self_attn.q_proj", reads="attn_in", writes="queries"),
    Linear("self_attn.k_proj", reads="attn_in", writes="keys"),
    Linear("self_attn.v_proj", reads="attn_in", writes="vo"),
    Linear("self_attn.o_proj", reads="o_in", writes="residual"),
)


def gated_mlp(module: str, *, site: str = "up_down", blocks: Blocks = "all", through: str = "") -> tuple[Linear, ...]:
    """Return gate, up and down projection of a gated MLP.

    Args:
        module: Path of the MLP inside the block.
        site: Name of the input site of its down projection.
        blocks: Which blocks have it.
        through: Norm between its output and the residual, if there is one.
    """
    return (
        Linear(f"{module}.gate_proj", reads="mlp_in", feeds=site, blocks=blocks),
        Linear(f"{module}.up_proj", reads="mlp_in", writes=site, blocks=blocks),
        Linear(f"{module}.down_proj", reads=site, writes="residual", writes_through=through, blocks=blocks),
    )


LLAMA_LIKE_LINEARS: tuple[Linear, ...] = (*LLAMA_LIKE_ATTENTION, *gated_mlp("mlp"))

EXPERT_LINEARS: tuple[Linear, ...] = (
    Linear("gate_proj", reads="mlp_in", feeds="up_down"),
    Linear("up_proj", reads="mlp_in", writes="up_down"),
    Linear("down_proj", reads="up_down", writes="residual"),
)
