"""StableLM: Llama with layer norms, which remove the mean and have biases, and positions on a part of each head.

A mean that is removed forbids a rotation R1; shifts and scales fold into the norms. With ``use_parallel_residual``
attention and MLP read one norm, and so one site.
"""

from __future__ import annotations

from dataclasses import replace

from qtool.model.family import LLAMA_LIKE_ATTENTION, LLAMA_LIKE_LINEARS, Family, Linear, Norm

TINY = {"hidden_size": 48, "num_attention_heads": 6, "head_dim": None}
STABLELM = Family(
    name="stablelm",
    model_types=("stablelm",),
    covers=lambda config: not config.use_parallel_residual,
    final_norm=Norm("model.norm", kind="layer"),
    norms={
        "attn_in": Norm("input_layernorm", kind="layer"),
        "mlp_in": Norm("post_attention_layernorm", kind="layer"),
    },
    linears=LLAMA_LIKE_LINEARS,
    note="R1 is refused: its norms remove the mean, which only permutations keep.",
    tiny=(TINY, {**TINY, "use_qkv_bias": True, "qk_layernorm": True}),
)
STABLELM_PARALLEL = replace(
    STABLELM,
    name="stablelm-parallel",
    covers=lambda config: config.use_parallel_residual,
    norms={"attn_in": Norm("input_layernorm", kind="layer")},
    linears=(
        *LLAMA_LIKE_ATTENTION,
        Linear("mlp.gate_proj", reads="attn_in", feeds="up_down"),
        Linear("mlp.up_proj", reads="attn_in", writes="up_down"),
        Linear("mlp.down_proj", reads="up_down", writes="residual"),
    ),
    tiny=({**TINY, "use_parallel_residual": True},),
)
