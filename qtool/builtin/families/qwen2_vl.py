"""Qwen2-VL and Qwen2.5-VL: the text tower is Qwen 2, the vision tower is left alone.

The last linear of the vision tower's merger writes the residual, so rotations of the residual are folded into it too.
"""

from __future__ import annotations

from qtool.model.family import LLAMA_LIKE_LINEARS, LLAMA_LIKE_NORMS, Family, Norm, Rotary

TEXT = {
    **{"hidden_size": 48, "num_attention_heads": 6, "head_dim": None},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}
VISION = {
    **{"depth": 1, "num_heads": 2, "embed_dim": 16, "mlp_ratio": 2},
    **{"hidden_size": 48, "intermediate_size": 20, "out_hidden_size": 48},
}

QWEN2_VL = Family(
    name="qwen2-vl",
    model_types=("qwen2_vl", "qwen2_5_vl"),
    final_norm=Norm("model.language_model.norm"),
    norms=LLAMA_LIKE_NORMS,
    linears=LLAMA_LIKE_LINEARS,
    rotary=Rotary(),
    backbone="model.language_model",
    layers="model.language_model.layers",
    embedding="model.language_model.embed_tokens",
    writers=("model.visual.merger.mlp.2",),
    stored_as={"model.language_model.": "model.", "model.visual.": "visual."},
    loader="AutoModelForImageTextToText",
    untouched={"model.visual.": "the vision tower"},
    note="Only the text tower is quantized.",
    tiny=({"text_config": TEXT, "vision_config": VISION},),
)
