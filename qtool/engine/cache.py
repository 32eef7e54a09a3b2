"""How a KV cache is rounded, and what each query sees of it.

Most scales are of one token, so that its codes never change. Keys may have scales of channels over a group of tokens:
those are rounded once the group is full, as KIVI does, and stay as they are until then. So a query sees rounded keys
in the groups that its own token is behind or fills, and keys in 16 bits after those; the same whether a text comes at
once or token by token. What is kept in 16 bits is at most one group less a token, where KIVI keeps 128 tokens and
values too.

One scale for all keys of a layer, or one for those of each head, and of values likewise, are found once where the
scheme says ``static``: the largest magnitude over the calibration tokens is at the end of the range, of keys behind the
rotary positions and a plan's operators there; integers may have a zero point, and then both ends are. They are what
engines with an FP8 cache read from checkpoints. Without ``static`` such scales are of all that attention sees, as if
those of a text were known beforehand. Scales with a multiplier above them (NVFP4) have that of the largest magnitude
over the calibration tokens. Queries may be rounded as well, where keys are: attention in FP8 does that.

References:
    Liu et al. 2024, KIVI, arXiv:2402.02750, section 3 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding
from qtool.engine.static_scales import extremes_of, needs_of_range
from qtool.engine.stored import input_scales
from qtool.errors import SchemeError
from qtool.model.graph import Dimensions
from qtool.model.statistics import SiteStatistics
from qtool.scheme import Format, ModelScheme, TensorScheme

KEYS, VALUES, QUERIES = "keys", "values", "queries"
"""The places inside a block where keys, values and queries are observed.

Their scales are stored as ``layers.<i>.keys.input_global_scale``, like multipliers of a linear's input, and their zero
points likewise; those of heads are ``[heads, 1, 1]``.
"""


def heads_at(place: str, dims: Dimensions) -> int:
    """Return how many heads there are at a place."""
    return dims.num_heads if place == QUERIES else dims.num_kv_heads


def scale_shape(scheme: TensorScheme, heads: int) -> tuple[int, ...]:
    """Return the shape of a block's static scale of keys, values or queries, which have so many heads."""
    return (heads, 1, 1) if scheme.strategy == "head" else ()


@dataclass(frozen=True)
class CacheRounding:
    """What keys and values are rounded to.

    Attributes:
        keys: Of keys; None leaves them as they are.
        values: The same, of values.
        tokens: How many neighbouring tokens share the scales of a key's channels; None where each has its own scales.
        queries: The same, of queries.
    """

    keys: Rounding | None
    values: Rounding | None
    tokens: int | None = None
    queries: Rounding | None = None

    @classmethod
    def of(cls, scheme: ModelScheme, lookup: Callable[[str], Format]) -> CacheRounding | None:
        """Return how the cache of a model's scheme is rounded, and what reads it, or None."""
        keys, tokens = scheme.keys, None
        if keys is not None and keys.strategy == "channel" and keys.group_size is not None:
            tokens, keys = keys.group_size, replace(keys, strategy="group")
        schemes = (keys, scheme.values, scheme.queries)
        if schemes == (None, None, None):
            return None
        rounding = [None if one is None else Rounding(Grid.of(one, lookup(one.format))) for one in schemes]
        return cls(rounding[0], rounding[1], tokens, rounding[2])

    @property
    def static(self) -> dict[str, Rounding]:
        """What has a scale that is found once, or a multiplier of its scales, by its place."""
        parts = {KEYS: self.keys, VALUES: self.values, QUERIES: self.queries}
        return {name: one for name, one in parts.items() if one is not None and one.grid.parts[0].has_global_scale}

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """The statistics that say the range, by the place where they are gathered."""
        return {name: needs_of_range(one.grid) for name, one in self.static.items()}

    def static_shapes(self, dims: Dimensions) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a block's static scales, and of their zero points, by place."""
        return {name: scale_shape(one.grid.parts[0].scheme, heads_at(name, dims)) for name, one in self.static.items()}

    def scales(self, layer: int, statistics: Mapping[str, SiteStatistics], *, dims: Dimensions) -> dict[str, Tensor]:
        """Return the static scales of a block, and their zero points, as they are stored.

        Args:
            layer: Block index.
            statistics: What was gathered of the block, by place.
            dims: Sizes of the model.
        """
        found: dict[str, Tensor] = {}
        for name, one in self.static.items():
            site, (part,) = f"layers.{layer}.{name}", one.grid.parts
            extremes = extremes_of(one.grid, statistics[name], site=site)
            of_heads = extremes.view(len(extremes), heads_at(name, dims), -1).transpose(0, 1)
            scale, zero_point = part.shared(of_heads)
            found |= input_scales(site, (scale,), (zero_point,))
        return found

    def calibrated(self, layer: int, find: Callable[[str], Tensor | None], device: torch.device) -> CacheRounding:
        """Return how a block's cache is rounded, and what reads it.

        Args:
            layer: Block index.
            find: Finds a stored tensor by name.
            device: Where scales are to be.
        """
        found = {name: one.calibrated(f"layers.{layer}.{name}", find, device) for name, one in self.static.items()}
        return replace(self, **found)  # type: ignore[arg-type]

    def by_token(
        self, key: Float[Tensor, "batch kv_heads past dim"], value: Float[Tensor, "batch kv_heads past value_dim"]
    ) -> tuple[Tensor, Tensor]:
        """Round what has scales of one token."""
        rounds_keys = self.keys is not None and self.tokens is None
        key = self.keys(key) if self.keys is not None and rounds_keys else key
        return key, value if self.values is None else self.values(value)

    def by_group(
        self,
        key: Float[Tensor, "batch kv_heads past dim"],
        value: Float[Tensor, "batch kv_heads past value_dim"],
        mask: Tensor | None,
        *,
        queries: int,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Round keys whose channels have scales over a group of tokens.

        Where several queries come at once, rounded keys stand in front of the others, and the mask lets each query see
        every token once.

        Args:
            key: Keys of all tokens from the first on.
            value: Values, rounded already.
            mask: True where a query sees a key, or what is added to the scores; None for all of the past.
            queries: How many queries there are: those of the last tokens.
            window: Tokens that a cache holds at most, of a layer that sees no more.

        Returns:
            Keys, values and mask as the attention sees them.

        Raises:
            SchemeError: A cache may have dropped tokens, so that nobody knows where a group begins.
        """
        past = key.shape[2]
        if self.keys is None or self.tokens is None or past < self.tokens:
            return key, value, mask
        if window is not None and queries < past >= window:
            raise SchemeError(
                "keys with scales over a group of tokens need a cache that holds all tokens",
                facts=(("tokens of the window", window), ("scheme", self.keys.grid.parts[0].scheme)),
                hint="--kv int4-asym-token-head",
            )
        full = past - past % self.tokens
        rounded = self.keys(key[:, :, :full].mT).mT
        if queries == 1:
            return torch.cat((rounded, key[:, :, full:]), dim=2), value, mask
        place = torch.arange(past, device=key.device)
        ends = (place[past - queries :] + 1) // self.tokens * self.tokens
        is_rounded = place < ends.unsqueeze(1)
        visible = torch.cat((is_rounded[:, :full], ~is_rounded), dim=1)
        if mask is None:
            mask = (place <= place[past - queries :].unsqueeze(1))[None, None]
        mask = torch.cat((mask[..., :full], mask), dim=-1)
        lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        key, value = torch.cat((rounded, key), dim=2), torch.cat((value[:, :, :full], value), dim=2)
        return key, value, mask.masked_fill(~visible, lowest)
