"""Phi-3 and Phi-4: Llama with one linear for q, k and v, and one for gate and up.

They are solved, stored and executed as one; folding looks at their rows. Phi-4-mini turns only a part of each head by
its position, behind which R3 acts on the whole head.
"""

from __future__ import annotations

from qtool.model.family import LLAMA_LIKE_NORMS, Family, Linear, Norm, Part, Rotary

QUERY_KEY_VALUE = (Part("queries", "queries"), Part("keys", "keys"), Part("values", "vo"))
GATE_UP = (Part("intermediate", feeds="up_down"), Part("intermediate", "up_down"))
PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    final_norm=Norm("model.norm"),
    norms=LLAMA_LIKE_NORMS,
    linears=(
        Linear("self_attn.qkv_proj", reads="attn_in", parts=QUERY_KEY_VALUE),
        Linear("self_attn.o_proj", reads="o_in", writes="residual"),
        Linear("mlp.gate_up_proj", reads="mlp_in", parts=GATE_UP),
        Linear("mlp.down_proj", reads="up_down", writes="residual"),
    ),
    rotary=Rotary(),
    tiny=(
        {"pad_token_id": 0, "head_dim": 8},
        {
            **{"pad_token_id": 0, "head_dim": 8, "sliding_window": 8},
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
)
