"""Granite: Llama with multipliers on embeddings, attention, residual and logits.

They are numbers, which every operator passes.
"""

from __future__ import annotations

from qtool.model.family import LLAMA_LIKE_LINEARS, LLAMA_LIKE_NORMS, Family, Norm, Rotary

MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}

GRANITE = Family(
    name="granite",
    model_types=("granite",),
    final_norm=Norm("model.norm"),
    norms=LLAMA_LIKE_NORMS,
    linears=LLAMA_LIKE_LINEARS,
    rotary=Rotary(),
    tiny=({**MULTIPLIERS, "logits_scaling": 4.0}, {"attention_bias": True, "mlp_bias": True}),
)
