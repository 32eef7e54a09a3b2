"""Qwen 3 (dense): Llama with norms on q and k per head, and a head size of its own."""

from __future__ import annotations

from qtool.model.family import LLAMA_LIKE_LINEARS, LLAMA_LIKE_NORMS, Family, Norm, Rotary

QUERY_KEY_NORMS = (
    Norm("self_attn.q_norm", of_residual=False),
    Norm("self_attn.k_norm", of_residual=False),
)
QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    final_norm=Norm("model.norm"),
    norms=LLAMA_LIKE_NORMS,
    linears=LLAMA_LIKE_LINEARS,
    rotary=Rotary(norms=QUERY_KEY_NORMS),
)
