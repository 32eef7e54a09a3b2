"""Mistral: Llama with sliding windows, which no operator sees."""

from __future__ import annotations

from qtool.model.family import LLAMA_LIKE_LINEARS, LLAMA_LIKE_NORMS, Family, Norm, Rotary

MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    final_norm=Norm("model.norm"),
    norms=LLAMA_LIKE_NORMS,
    linears=LLAMA_LIKE_LINEARS,
    rotary=Rotary(),
    tiny=({"sliding_window": 8},),
)
