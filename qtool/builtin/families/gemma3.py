"""Gemma 3 with images: the text tower is that of Gemma 2, the vision tower is left alone.

The projector multiplies by a bare parameter, which writes the residual and is no linear: nothing is folded into the
residual, not even what Gemma 2 allows.
"""

from __future__ import annotations

from qtool.builtin.families.gemma2 import SANDWICH_LINEARS, SANDWICH_NORMS
from qtool.model.family import Family, Norm

GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3",),
    final_norm=Norm("model.language_model.norm", offset=1.0),
    norms=SANDWICH_NORMS,
    linears=SANDWICH_LINEARS,
    backbone="model.language_model",
    layers="model.language_model.layers",
    embedding="model.language_model.embed_tokens",
    stored_as={
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    loader="AutoModelForImageTextToText",
    untouched={
        "model.vision_tower.": "the vision tower",
        "model.multi_modal_projector.": "the projector between vision tower and text tower",
    },
    fixed_residual="the vision tower's projector writes it by a bare parameter; use transforms at attn_in and mlp_in",
    note="Only the text tower is quantized; the residual keeps its basis, for the projector's sake.",
    tiny=(
        {
            "text_config": {"query_pre_attn_scalar": 8},
            "vision_config": {
                **{"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2},
                **{"image_size": 28, "patch_size": 14},
            },
            "mm_tokens_per_image": 4,
        },
    ),
)
