"""Qwen 2 and 2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from qtool.model.family import LLAMA_LIKE_LINEARS, LLAMA_LIKE_NORMS, Family, Norm, Rotary

QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    final_norm=Norm("model.norm"),
    norms=LLAMA_LIKE_NORMS,
    linears=LLAMA_LIKE_LINEARS,
    rotary=Rotary(),
)
