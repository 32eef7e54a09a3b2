"""Qwen 2 with experts (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): routed experts, a shared one, and the shared one's gate.

Which blocks have experts is the config's choice (``decoder_sparse_step``, ``mlp_only_layers``).
"""

from __future__ import annotations

from typing import Any

from qtool.model.family import (
    EXPERT_LINEARS,
    LLAMA_LIKE_ATTENTION,
    LLAMA_LIKE_NORMS,
    Experts,
    Family,
    Linear,
    Norm,
    Rotary,
    gated_mlp,
)


def sparse(config: Any, layer: int) -> bool:  # noqa: ANN401 - each family has its own config class
    """Say whether a block has experts."""
    return layer not in (config.mlp_only_layers or ()) and (layer + 1) % config.decoder_sparse_step == 0


ROUTED = Experts("mlp.experts", count="num_experts", chosen="num_experts_per_tok", linears=EXPERT_LINEARS)
ROUTER = Linear("mlp.gate", reads="mlp_in", kept="the router", blocks="sparse")

QWEN2_MOE = Family(
    name="qwen2-moe",
    model_types=("qwen2_moe",),
    final_norm=Norm("model.norm"),
    norms=LLAMA_LIKE_NORMS,
    linears=(
        *LLAMA_LIKE_ATTENTION,
        *gated_mlp("mlp", blocks="dense"),
        ROUTER,
        *gated_mlp("mlp.shared_expert", site="shared.up_down", blocks="sparse"),
        Linear("mlp.shared_expert_gate", reads="mlp_in", kept="the gate of the shared expert", blocks="sparse"),
    ),
    rotary=Rotary(),
    experts=ROUTED,
    sparse=sparse,
    sizes={"experts.up_down": "moe_intermediate_size", "shared.up_down": "shared_expert_intermediate_size"},
    tiny=(
        {
            **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"shared_expert_intermediate_size": 20, "mlp_only_layers": [0]},
        },
    ),
)
