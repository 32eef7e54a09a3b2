"""Llama 1 to 3, and everything saved under its architecture (SmolLM2, TinyLlama, …)."""

from __future__ import annotations

from qtool.model.family import LLAMA_LIKE_LINEARS, LLAMA_LIKE_NORMS, Family, Norm, Rotary

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    final_norm=Norm("model.norm"),
    norms=LLAMA_LIKE_NORMS,
    linears=LLAMA_LIKE_LINEARS,
    rotary=Rotary(),
    tiny=({}, {"attention_bias": True, "mlp_bias": True}),
)
