"""Seed-OSS: Llama with biases on q, k and v, and if the config says so on o_proj and in the MLP."""

from __future__ import annotations

from qtool.model.family import LLAMA_LIKE_LINEARS, LLAMA_LIKE_NORMS, Family, Norm

SEED_OSS = Family(
    name="seed-oss",
    model_types=("seed_oss",),
    final_norm=Norm("model.norm"),
    norms=LLAMA_LIKE_NORMS,
    linears=LLAMA_LIKE_LINEARS,
    tiny=({}, {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}),
)
