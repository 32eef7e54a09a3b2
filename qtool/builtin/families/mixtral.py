"""Mixtral: Mistral with experts in every block; files call their module ``block_sparse_moe``."""

from __future__ import annotations

from qtool.model.family import LLAMA_LIKE_ATTENTION, LLAMA_LIKE_NORMS, Experts, Family, Linear, Norm, Rotary

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    final_norm=Norm("model.norm"),
    norms=LLAMA_LIKE_NORMS,
    linears=(*LLAMA_LIKE_ATTENTION, Linear("mlp.gate", reads="mlp_in", kept="the router")),
    rotary=Rotary(),
    experts=Experts(
        "mlp.experts",
        count="num_local_experts",
        chosen="num_experts_per_tok",
        linears=(
            Linear("w1", reads="mlp_in", feeds="up_down"),
            Linear("w3", reads="mlp_in", writes="up_down"),
            Linear("w2", reads="up_down", writes="residual"),
        ),
    ),
    sizes={"experts.up_down": "intermediate_size"},
    stored_as={"mlp.": "block_sparse_moe."},
    tiny=({"num_local_experts": 4, "num_experts_per_tok": 2},),
)
