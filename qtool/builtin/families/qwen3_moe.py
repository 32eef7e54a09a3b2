"""Qwen 3 with experts: no shared one, norms on q and k per head; the config says which blocks are dense."""

from __future__ import annotations

from qtool.builtin.families.qwen2_moe import ROUTED, ROUTER, sparse
from qtool.builtin.families.qwen3 import QUERY_KEY_NORMS
from qtool.model.family import LLAMA_LIKE_ATTENTION, LLAMA_LIKE_NORMS, Family, Norm, Rotary, gated_mlp

QWEN3_MOE = Family(
    name="qwen3-moe",
    model_types=("qwen3_moe",),
    final_norm=Norm("model.norm"),
    norms=LLAMA_LIKE_NORMS,
    linears=(*LLAMA_LIKE_ATTENTION, *gated_mlp("mlp", blocks="dense"), ROUTER),
    rotary=Rotary(norms=QUERY_KEY_NORMS),
    experts=ROUTED,
    sparse=sparse,
    sizes={"experts.up_down": "moe_intermediate_size"},
    tiny=(
        {
            **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
            "decoder_sparse_step": 2,
        },
    ),
)
