"""OLMo 2 and 3: norms behind the sub-layers only, so that linears read the residual itself.

No norm lies in front that could hold a scale, and the norms behind forbid a rotation R1: what is not a permutation or a
sign runs online at the input sites. Norms of queries and keys span all heads, in front of the rotary positions.
"""

from __future__ import annotations

from qtool.model.family import LLAMA_LIKE_ATTENTION, Family, Linear, Norm, gated_mlp

OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2", "olmo3"),
    final_norm=Norm("model.norm"),
    norms={"attn_in": None, "mlp_in": None},
    linears=(
        *LLAMA_LIKE_ATTENTION[:-1],
        Linear("self_attn.o_proj", reads="o_in", writes="residual", writes_through="post_attention_layernorm"),
        *gated_mlp("mlp", through="post_feedforward_layernorm"),
    ),
    note="R1 and scales in front of attention and MLP are refused: norms lie behind the sub-layers only.",
)
