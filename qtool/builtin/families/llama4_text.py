"""Llama 4, text: experts and dense MLPs in turn, a shared expert, experts stored as one tensor for all.

A token is weighed by its router's score in front of the expert, not behind; a number passes every operator. Positions
turn neighbouring channels, and the norms of queries and keys have no weight: both lie in front of R3.
"""

from __future__ import annotations

from qtool.model.family import (
    LLAMA_LIKE_ATTENTION,
    LLAMA_LIKE_NORMS,
    Experts,
    Family,
    Linear,
    Norm,
    Part,
    gated_mlp,
)

GATE_UP = (Part("intermediate", feeds="up_down"), Part("intermediate", writes="up_down"))

LLAMA4_TEXT = Family(
    name="llama4-text",
    model_types=("llama4_text",),
    final_norm=Norm("model.norm"),
    norms=LLAMA_LIKE_NORMS,
    linears=(
        *LLAMA_LIKE_ATTENTION,
        *gated_mlp("feed_forward", blocks="dense"),
        Linear("feed_forward.router", reads="mlp_in", kept="the router", blocks="sparse"),
        *gated_mlp("feed_forward.shared_expert", site="shared.up_down", blocks="sparse"),
    ),
    experts=Experts(
        "feed_forward.experts",
        count="num_local_experts",
        chosen="num_experts_per_tok",
        linears=(
            Linear("gate_up_proj", reads="mlp_in", parts=GATE_UP),
            Linear("down_proj", reads="up_down", writes="residual"),
        ),
        stacked=True,
    ),
    sparse=lambda config, layer: layer in config.moe_layers,
    sizes={
        "up_down": "intermediate_size_mlp",
        "shared.up_down": "intermediate_size",
        "experts.up_down": "intermediate_size",
    },
    tiny=(
        {
            **{"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 28, "floor_scale": 4},
            **{"interleave_moe_layer_step": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 16},
        },
    ),
)
