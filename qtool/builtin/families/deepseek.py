"""DeepSeek V2 and V3: latent attention, routed and shared experts behind some dense blocks.

Keys and values are made of a latent behind a norm of its own (``kv_b_in``), queries too (``q_b_in``) unless
``q_lora_rank`` is null, as in the Lite models. Rows of kv_b_proj come head by head: the part of a key without
positions, then a value. Heads of keys and of values differ in size.
"""

from __future__ import annotations

from dataclasses import replace

from qtool.model.family import EXPERT_LINEARS, LLAMA_LIKE_NORMS, Experts, Family, Linear, Norm, Part, gated_mlp

QUERY = (Linear("self_attn.q_a_proj", reads="attn_in"), Linear("self_attn.q_b_proj", reads="q_b_in"))
REST = (
    Linear("self_attn.kv_a_proj_with_mqa", reads="attn_in"),
    Linear("self_attn.kv_b_proj", reads="kv_b_in", parts=(Part("nope"), Part("value_dim", writes="vo")), per_head=True),
    Linear("self_attn.o_proj", reads="o_in", writes="residual"),
    *gated_mlp("mlp", blocks="dense"),
    Linear("mlp.gate", reads="mlp_in", kept="the router", blocks="sparse"),
    *gated_mlp("mlp.shared_experts", site="shared.up_down", blocks="sparse"),
)
LATENT = {**LLAMA_LIKE_NORMS, "kv_b_in": Norm("self_attn.kv_a_layernorm", of_residual=False)}
SIZES = {
    **{"head_dim": "qk_nope_head_dim+qk_rope_head_dim", "value_dim": "v_head_dim", "kv_heads": "num_attention_heads"},
    **{"nope": "qk_nope_head_dim", "kv_b_in": "kv_lora_rank", "experts.up_down": "moe_intermediate_size"},
    "shared.up_down": "moe_intermediate_size*n_shared_experts",
}
TINY = {
    **{"head_dim": 4, "num_key_value_heads": 4, "kv_lora_rank": 8, "v_head_dim": 8, "first_k_dense_replace": 1},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2},
    **{"topk_group": 1, "n_shared_experts": 2, "moe_intermediate_size": 16},
}
DEEPSEEK = Family(
    name="deepseek",
    model_types=("deepseek_v2", "deepseek_v3"),
    covers=lambda config: config.q_lora_rank is not None,
    final_norm=Norm("model.norm"),
    norms={**LATENT, "q_b_in": Norm("self_attn.q_a_layernorm", of_residual=False)},
    linears=(*QUERY, *REST),
    experts=Experts("mlp.experts", "n_routed_experts", "num_experts_per_tok", EXPERT_LINEARS),
    sparse=lambda config, layer: layer >= config.first_k_dense_replace,
    sizes={**SIZES, "q_b_in": "q_lora_rank"},
    tiny=({**TINY, "q_lora_rank": 12},),
)
DEEPSEEK_LITE = replace(
    DEEPSEEK,
    name="deepseek-lite",
    covers=lambda config: config.q_lora_rank is None,
    norms=LATENT,
    linears=(Linear("self_attn.q_proj", reads="attn_in"), *REST),
    sizes=SIZES,
    tiny=({**TINY, "q_lora_rank": None},),
)
