"""What the keys of a GGUF file say of a model, compared with the config that transformers makes of them.

transformers knows the usual keys of an architecture and leaves out others without a word: caps of Gemma 2, scaling of
RoPE, windows of some families. Where its defaults are what the file says all is well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from qtool.errors import ModelError

_CHANGING = ("scal", "softcapping", "sliding_window", "swa", "expert")
"""What names of keys have in them that change a model where its config lacks them."""
_NEUTRAL = ("none", 1.0)
_ATTRIBUTES = MappingProxyType(
    {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "vocab_size": "vocab_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    }
)
_ROPE = MappingProxyType(
    {
        "freq_base": "rope_theta",
        "scaling.factor": "factor",
        "scaling.original_context_length": "original_max_position_embeddings",
        "scaling.attn_factor": "attention_factor",
    }
)


def refuse_other_keys(path: Path, keys: Mapping[str, Any], config: Any) -> None:  # noqa: ANN401 - each family has its own
    """Refuse a config that lacks something which a file says of its model, or has it otherwise.

    Args:
        path: The GGUF file.
        keys: Its scalar keys.
        config: What transformers makes of them.

    Raises:
        ModelError: Names the first key.
    """
    prefix, own = f"{keys['general.architecture']}.", config.get_text_config()
    for key, there in keys.items():
        if not key.startswith(prefix):
            continue
        read = _read(key.removeprefix(prefix), own)
        changes = bool(there) and there not in _NEUTRAL and any(word in key for word in _CHANGING)
        if changes if read is None else not _same(read, there):
            raise ModelError(
                f"`{path}` says what transformers does not read",
                facts=((key, there), ("read", read)),
                hint="use the folder of the original transformers model",
            )


def _read(key: str, config: Any) -> Any:  # noqa: ANN401 - values of all types
    """Return what a config has of a key; None where nobody here knows it, or where the config has nothing."""
    every = getattr(config, "rope_parameters", None) or {}
    rope = every.get("full_attention", every)
    if key == "rope.freq_base_swa":
        return every.get("sliding_attention", {}).get("rope_theta")
    if key == "rope.dimension_count":
        width = getattr(config, "head_dim", None)
        return None if width is None else int(width * rope.get("partial_rotary_factor", 1.0))
    if key == "rope.scaling.type":
        return "none" if rope.get("rope_type", "default") == "default" else rope["rope_type"]
    if key.startswith("rope."):
        name = _ROPE.get(key.removeprefix("rope."), "")
        return rope.get(name, getattr(config, name, None))
    if key == "expert_count":
        return getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    return getattr(config, _ATTRIBUTES.get(key, ""), None)


def _same(read: Any, there: Any) -> bool:  # noqa: ANN401 - likewise
    return read == there or (isinstance(read, float) and bool(np.float32(read) == np.float32(there)))
