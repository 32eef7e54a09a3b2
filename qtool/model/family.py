"""A family of models as data: which linear reads which site and writes which, and what lies between.

One description serves every method. Names are those of the modules in transformers; ``{layer}`` and the like never
appear here, since a block's names are relative to the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "layer"]


@dataclass(frozen=True)
class Norm:
    """A normalisation in front of linears.

    Attributes:
        module: Path inside the block (or from the root, for the final norm).
        kind: ``rms``, or ``layer`` (which removes the mean and has a bias).
        offset: Constant added to the stored weight in the forward pass: 1 for Gemma's ``(1 + w)``.
    """

    module: str
    kind: NormKind = "rms"
    offset: float = 0.0


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block.

    Attributes:
        module: Path inside the block.
        reads: Site of its input: ``attn_in``, ``o_in``, ``mlp_in``, ``up_down``.
        writes: Site that its output feeds without a nonlinearity in between: ``residual``, ``vo`` (value heads),
            ``up_down`` (the value path of a gated MLP). Empty: nothing can be folded into its output.
        writes_through: Norm that the output passes before it reaches the residual (sandwich norms).
    """

    module: str
    reads: str
    writes: str = ""
    writes_through: str = ""


@dataclass(frozen=True)
class Family:
    """Everything that qtool needs to know of a family.

    Attributes:
        name: Name in manifests.
        model_types: ``model_type`` values of configs that it covers.
        backbone: Module that embeds tokens and runs the blocks.
        layers: Path of the list of blocks.
        embedding: Path of the token embedding.
        final_norm: Norm in front of the head.
        head: Path of the output projection.
        norms: Norm that produces each input site, by site.
        linears: The linears of a block, in order of execution; linears that read one site form a stage.
        attention: Path of the attention module inside the block.
    """

    name: str
    model_types: tuple[str, ...]
    final_norm: Norm
    norms: Mapping[str, Norm]
    linears: tuple[Linear, ...]
    backbone: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    attention: str = "self_attn"


LLAMA_LIKE_NORMS: Mapping[str, Norm] = {
    "attn_in": Norm("input_layernorm"),
    "mlp_in": Norm("post_attention_layernorm"),
}

LLAMA_LIKE_LINEARS: tuple[Linear, ...] = (
    Linear("self_attn.q_proj", reads="attn_in"),
    Linear("self_attn.k_proj", reads="attn_in"),
    Linear("self_attn.v_proj", reads="attn_in", writes="vo"),
    Linear("self_attn.o_proj", reads="o_in", writes="residual"),
    Linear("mlp.gate_proj", reads="mlp_in"),
    Linear("mlp.up_proj", reads="mlp_in", writes="up_down"),
    Linear("mlp.down_proj", reads="up_down", writes="residual"),
)
