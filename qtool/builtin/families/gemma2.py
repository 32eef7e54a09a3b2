"""Gemma 2 and the text models of Gemma 3: norms around each sub-layer, all of which multiply by ``1 + w``.

The norm behind a sub-layer weighs its output in the basis of the residual: a rotation R1 is refused there, and
permutations and signs are exact. A soft cap on the logits of the attention forbids a shift of the keys. Sliding windows
and Gemma 3's norms of queries and keys lie where no operator acts.
"""

from __future__ import annotations

from qtool.model.family import LLAMA_LIKE_ATTENTION, Family, Linear, Norm, gated_mlp

SANDWICH_NORMS = {
    "attn_in": Norm("input_layernorm", offset=1.0),
    "mlp_in": Norm("pre_feedforward_layernorm", offset=1.0),
}
SANDWICH_LINEARS = (
    *LLAMA_LIKE_ATTENTION[:-1],
    Linear("self_attn.o_proj", reads="o_in", writes="residual", writes_through="post_attention_layernorm"),
    *gated_mlp("mlp", through="post_feedforward_layernorm"),
)

GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2", "gemma3_text"),
    final_norm=Norm("model.norm", offset=1.0),
    norms=SANDWICH_NORMS,
    linears=SANDWICH_LINEARS,
    logits="capped",
    note="R1 is refused: norms behind the sub-layers weigh their outputs in the basis of the residual.",
    tiny=(
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "query_pre_attn_scalar": 8},
        {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "attention_bias": True},
    ),
)
