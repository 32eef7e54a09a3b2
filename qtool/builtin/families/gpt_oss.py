"""gpt-oss: experts stored as one tensor for all, with gate and up row by row in turn, and biases everywhere.

The activation clamps the up path and adds one, so no scale passes it: nothing folds in front of an expert's second
linear, where operators run online. Each head's sink takes a share of the attention: keys and values bear no shift.
"""

from __future__ import annotations

from qtool.model.family import LLAMA_LIKE_ATTENTION, LLAMA_LIKE_NORMS, Experts, Family, Linear, Norm, Rotary

GPT_OSS = Family(
    name="gpt-oss",
    model_types=("gpt_oss",),
    final_norm=Norm("model.norm"),
    norms=LLAMA_LIKE_NORMS,
    linears=(*LLAMA_LIKE_ATTENTION, Linear("mlp.router", reads="mlp_in", kept="the router")),
    experts=Experts(
        "mlp.experts",
        count="num_local_experts",
        chosen="num_experts_per_tok",
        linears=(
            Linear("gate_up_proj", reads="mlp_in"),
            Linear("down_proj", reads="up_down", writes="residual"),
        ),
        stacked=True,
    ),
    rotary=Rotary(),
    logits="sink",
    sizes={"experts.up_down": "intermediate_size"},
    note="Scales in front of an expert's down_proj are refused: the activation clamps the up path.",
    tiny=({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},),
)
