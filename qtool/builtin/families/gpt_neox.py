"""GPT-NeoX and Pythia: layer norms, a plain MLP, and one linear for q, k and v, whose rows come head by head.

Without a gate nothing in the MLP is linear, so only an order folds in front of its second linear; R1 is refused, since
the norms remove the mean. Attention and MLP run side by side or one after the other, each behind a norm of its own.
"""

from __future__ import annotations

from qtool.model.family import Family, Linear, Norm, Part

TINY = {"hidden_size": 48, "num_attention_heads": 6, "head_dim": None, "num_key_value_heads": None}
HEAD = (Part("head_dim"), Part("head_dim"), Part("head_dim", writes="vo"))

GPT_NEOX = Family(
    name="gpt-neox",
    model_types=("gpt_neox",),
    final_norm=Norm("gpt_neox.final_layer_norm", kind="layer"),
    norms={
        "attn_in": Norm("input_layernorm", kind="layer"),
        "mlp_in": Norm("post_attention_layernorm", kind="layer"),
    },
    linears=(
        Linear("attention.query_key_value", reads="attn_in", parts=HEAD, per_head=True),
        Linear("attention.dense", reads="o_in", writes="residual"),
        Linear("mlp.dense_h_to_4h", reads="mlp_in", feeds="up_down"),
        Linear("mlp.dense_4h_to_h", reads="up_down", writes="residual"),
    ),
    backbone="gpt_neox",
    layers="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    attention="attention",
    sizes={"kv_heads": "num_attention_heads"},
    stored_as={"lm_head.": "embed_out."},
    note="R1 is refused: its norms remove the mean, which only permutations keep.",
    tiny=tuple({**TINY, "use_parallel_residual": one} for one in (True, False)),
)
