"""Gemma 1: Llama whose norms multiply by ``1 + w`` and whose embeddings are scaled by ``sqrt(hidden)``.

The scaling is a number, which rotations pass, so everything is as for Llama.
"""

from __future__ import annotations

from qtool.model.family import LLAMA_LIKE_LINEARS, Family, Norm, Rotary

GEMMA = Family(
    name="gemma",
    model_types=("gemma",),
    final_norm=Norm("model.norm", offset=1.0),
    norms={
        "attn_in": Norm("input_layernorm", offset=1.0),
        "mlp_in": Norm("post_attention_layernorm", offset=1.0),
    },
    linears=LLAMA_LIKE_LINEARS,
    rotary=Rotary(),
    tiny=({}, {"attention_bias": True}),
)
