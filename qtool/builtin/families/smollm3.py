"""SmolLM3: Llama in which every fourth block knows no positions, which no operator sees."""

from __future__ import annotations

from qtool.model.family import LLAMA_LIKE_LINEARS, LLAMA_LIKE_NORMS, Family, Norm, Rotary

SMOLLM3 = Family(
    name="smollm3",
    model_types=("smollm3",),
    final_norm=Norm("model.norm"),
    norms=LLAMA_LIKE_NORMS,
    linears=LLAMA_LIKE_LINEARS,
    rotary=Rotary(),
    tiny=({"pad_token_id": 0, "no_rope_layers": [1, 0]},),
)
