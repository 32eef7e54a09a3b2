"""The attention that qtool executes: transformers' own, with operators on queries and keys and a quantized cache.

Registered once with transformers under the name ``qtool``. It sees queries and keys after the rotary positions, which
is where R3 acts and where caches are quantized; values are seen as ``v_proj`` made them. Quantizing a cached key each
time that it is read gives the same codes as quantizing it once, since its scale is its own.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qtool.numerics.groups import from_groups, to_groups
from qtool.numerics.operators import Operator
from qtool.scheme import Format, TensorScheme

NAME = "qtool"
CHILD = "kv_path"


class KVPath(nn.Module):
    """What happens between the rotary positions and the attention itself.

    Args:
        operators: Act on the head axis of queries and keys (keys get ``T``, queries ``T^{-T}``).
        scheme: Scheme of the cache, or None.
        fmt: Format of ``scheme``.
    """

    def __init__(self, operators: tuple[Operator, ...], scheme: TensorScheme | None, fmt: Format | None) -> None:
        super().__init__()
        self.operators = operators
        self.scheme = scheme
        self.format = fmt

    def forward(
        self,
        query: Float[Tensor, "batch heads tokens dim"],
        key: Float[Tensor, "batch kv_heads past dim"],
        value: Float[Tensor, "batch kv_heads past dim"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values as the attention sees them."""
        for operator in self.operators:
            query, key = operator.weight_in(query), operator.act(key)
        return query, self._rounded(key), self._rounded(value)

    def _rounded(self, values: Tensor) -> Tensor:
        if self.scheme is None or self.format is None:
            return values
        groups = to_groups(values, self.scheme.strategy, self.scheme.group_size)
        parameters = self.format.fit(groups.float(), self.scheme)
        return from_groups(self.format.round(groups, parameters), values.shape)


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
    result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key.to(query.dtype), value.to(query.dtype), attention_mask, **arguments
    )
    return result


def register() -> None:
    """Make the attention known to transformers; doing it again changes nothing."""
    AttentionInterface.register(NAME, executed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
