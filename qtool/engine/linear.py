"""A linear layer as it is executed: online operators, activation rounding, weight, adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qtool.engine.online import Acts
from qtool.engine.problem import Adapter
from qtool.numerics.groups import from_groups, to_groups
from qtool.scheme import Format, TensorScheme

Observer = Callable[[Float[Tensor, "tokens n"]], None]


@dataclass(frozen=True)
class Rounding:
    """How a site's activations are quantized: dynamic scales, and a calibrated tensor-level multiplier if any."""

    scheme: TensorScheme
    format: Format
    global_scale: Float[Tensor, ""] | None = None

    def __call__(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return the values that the codes of ``x`` stand for, in the dtype of ``x``."""
        groups = to_groups(x, self.scheme.strategy, self.scheme.group_size)
        scale = self.global_scale
        if scale is None:
            scale = self.format.global_scale(x.abs().amax().float(), self.scheme)
        parameters = self.format.fit(groups.float(), self.scheme, global_scale=scale)
        return from_groups(self.format.round(groups, parameters), x.shape)


class SiteInput(nn.Module):
    """The input of a site, shared by the linears that read it: operators, then an observer, then rounding.

    The three projections of an attention are given one tensor; the work is done for the first and remembered until the
    last of its readers has had it, or another tensor comes, or that one is written to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: tuple[Acts, ...] = ()
        self.rounding: Rounding | None = None
        self.observer: Observer | None = None
        self.readers = 0
        self._seen: tuple[Tensor, int, Tensor] | None = None
        self._left = 0

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return what the linears multiply with their weights."""
        # A reference is held, so that no other tensor can pass for `x`; writes do not count in inference mode.
        version = None if x.is_inference() else x._version
        if self._seen is not None and self._seen[0] is x and self._seen[1] == version:
            result = self._seen[2]
            self._left -= 1
        else:
            result = self._work(x)
            self._left = self.readers - 1
        self._seen = (x, version, result) if self._left > 0 and version is not None else None
        return result

    def _work(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        result = x
        for operator in self.operators:
            result = operator.act(result)
        if self.observer is not None:
            self.observer(result.reshape(-1, result.shape[-1]))
        if self.rounding is not None:
            result = self.rounding(result)
        return result

    def forget(self) -> None:
        """Let go of the remembered tensors."""
        self._seen = None


class ExecutedLinear(nn.Module):
    """A linear in place of ``nn.Linear``, with the same parameter names.

    Args:
        original: The layer that it replaces; only its shapes, dtype and device are used.
        site: The input that it shares with its siblings.
    """

    def __init__(self, original: nn.Linear, site: SiteInput) -> None:
        super().__init__()
        self.weight = nn.Parameter(original.weight, requires_grad=False)
        bias = nn.Parameter(original.bias, requires_grad=False) if original.bias is not None else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)  # also where there is none: a shift gives it one when it is folded
        self.in_features, self.out_features = original.in_features, original.out_features
        self.site = site
        site.readers += 1
        self.adapter: Adapter | None = None

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return ``Ŵ x̂ + b``, and ``up (down x̂)`` with an adapter."""
        x = self.site(x)
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        if self.adapter is not None:
            down, up = self.adapter.down.to(x), self.adapter.up.to(x)
            y = y + torch.nn.functional.linear(torch.nn.functional.linear(x, down), up)
        return y
