"""The attention that qtool executes: transformers' own, with operators on queries and keys and a quantized cache.

Registered once with transformers under the name ``qtool``. It sees queries and keys after the rotary positions, which
is where R3 acts and where caches are quantized; values are seen as ``v_proj`` made them. Quantizing a cached key each
time that it is read gives the same codes as quantizing it once, since its scale is its own, or that of a group of
tokens which is full (``qtool.engine.cache``).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qtool.engine.cache import CacheRounding
from qtool.engine.linear import SiteInput
from qtool.engine.online import Turns

NAME = "qtool"
CHILD = "kv_path"


class KVPath(nn.Module):
    """What happens between the rotary positions and the attention itself.

    Args:
        operators: Act on the head axis of queries and keys (keys get ``T``, queries ``T^{-T}``).
        rounding: How keys and values are rounded, and queries, or None.

    Attributes:
        keys: Where keys are observed, a row a token, behind the operators and before they are rounded.
        values: The same, of values.
        queries: The same, of queries.
    """

    def __init__(self, operators: tuple[Turns, ...], rounding: CacheRounding | None) -> None:
        super().__init__()
        self.operators = operators
        self.rounding = rounding
        self.keys, self.values, self.queries = SiteInput(), SiteInput(), SiteInput()

    def forward(
        self,
        query: Float[Tensor, "batch heads tokens dim"],
        key: Float[Tensor, "batch kv_heads past dim"],
        value: Float[Tensor, "batch kv_heads past value_dim"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values as the attention sees them, but for keys that are rounded in groups."""
        for operator in self.operators:
            query, key = operator.weight_in(query), operator.act(key)
        for site, states in ((self.keys, key), (self.values, value), (self.queries, query)):
            if site.observer is not None:
                site.operated(states.transpose(1, 2).flatten(2))
        if self.rounding is None:
            return query, key, value
        query = query if self.rounding.queries is None else self.rounding.queries(query)
        return query, *self.rounding.by_token(key, value)


def executed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,  # noqa: ANN401 - passed through to transformers
) -> tuple[Tensor, Tensor | None]:
    """Run the module's ``KVPath``, then scaled dot-product attention."""
    path = getattr(module, CHILD, None)
    if isinstance(path, KVPath):
        query, key, value = path(query, key, value)
        if path.rounding is not None:
            window = arguments.get("sliding_window")
            key, value, attention_mask = path.rounding.by_group(
                key, value, attention_mask, queries=query.shape[2], window=window
            )
    key, value = key.to(query.dtype), value.to(query.dtype)
    softcap, sinks = arguments.pop("softcap", None), arguments.pop("s_aux", None)
    if softcap is not None or sinks is not None:
        scaling = arguments.get("scaling")
        causal = arguments.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if attention_mask is None and causal:
            attention_mask = _causal(query, key)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(query, key, value, attention_mask, scaling=scaling, softcap=softcap, sinks=sinks), None
    result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **arguments
    )
    return result


def attend(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads past dim"],
    value: Float[Tensor, "batch kv_heads past value_dim"],
    mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch tokens heads value_dim"]:
    """Return ``softmax(c tanh(q kᵀ s / c) + mask) v``, the softmax over the keys and a sink that holds nothing.

    For what fused kernels do not offer. The scores are formed one window at a time.

    Args:
        query: Queries.
        key: Keys; a head of them serves ``heads / kv_heads`` neighbouring heads of queries.
        value: Values.
        mask: True where a query sees a key, or what is added to the scores; its batch and heads may be one for all.
        scaling: Factor ``s`` of the scores.
        softcap: Bound ``c`` of the scores, or None.
        sinks: Score of each head's sink, or None.
    """
    groups = query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if mask is not None:
        mask = mask.expand(query.shape[0], *mask.shape[1:])
    results = []
    for window in range(query.shape[0]):
        scores = query[window] @ key[window].mT * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            seen = mask[window]
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~seen, lowest) if seen.dtype == torch.bool else scores + seen
        if sinks is not None:
            sink = sinks.to(scores).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, sink), dim=-1)
        weights = scores.softmax(dim=-1, dtype=wide).to(value.dtype)[..., : key.shape[2]]
        results.append((weights @ value[window]).transpose(0, 1))
    return torch.stack(results)


def _causal(query: Tensor, key: Tensor) -> Tensor | None:
    """Return the mask that goes without saying: none for one token, else every token sees those before it."""
    tokens, past = query.shape[2], key.shape[2]
    if tokens == 1:
        return None
    return torch.ones(tokens, past, dtype=torch.bool, device=query.device).tril()[None, None]


def register() -> None:
    """Make the attention known to transformers; doing it again changes nothing."""
    AttentionInterface.register(NAME, executed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
