"""Hessians weighed by saliency, one a group of rows: what ``saliency`` becomes where a method needs it.

A method that needs ``saliency`` gets ``guided_hessians`` among the entries of its problem. They are gathered beside the
statistics of the site, and go by the name of the linear, since each has its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.gather import AnyStatistic, Gathering, GradientStatistic, SiteStatistic
from qtool.errors import UsageError
from qtool.model.graph import LinearSite
from qtool.numerics.moments import add_second_moment

GUIDED = "guided_hessians"


class GuidedHessians:
    """The statistic of one linear: for each group of its rows the mean of x xᵀ, tokens weighed by their saliency.

    Args:
        saliency: Of each token in the order of the windows, by groups of rows.
    """

    version = 1
    of_products: Literal[True] = True

    def __init__(self, saliency: Float[Tensor, "tokens groups"]) -> None:
        self.saliency = saliency

    def start(self, n: int, gathering: Gathering, device: torch.device) -> GuidedAccumulator:
        """Return an accumulator for the input of the linear."""
        del gathering
        return GuidedAccumulator(n, self.saliency.to(device))


class GuidedAccumulator:
    """Sums s x xᵀ and s of each group in float32."""

    def __init__(self, n: int, saliency: Float[Tensor, "tokens groups"]) -> None:
        self.saliency, self.seen = saliency, 0
        self.sums = torch.zeros(saliency.shape[1], n, n, device=saliency.device)

    def update(self, x: Float[Tensor, "tokens n"]) -> None:
        """Add some tokens."""
        scales = self.saliency[self.seen : self.seen + len(x)].sqrt()
        for total, scale in zip(self.sums, scales.T, strict=True):
            add_second_moment(total, x * scale[:, None])
        self.seen += len(x)

    def result(self) -> Float[Tensor, "groups n n"]:
        """Return the weighted means, symmetric; zero for a group whose errors cost nothing."""
        weights = self.saliency[: self.seen].double().sum(0).clamp_min(torch.finfo(torch.float32).tiny).float()
        for total, weight in zip(self.sums, weights, strict=True):  # one at a time: there may be no room for all twice
            total /= weight
            total.copy_(torch.tril(total) + torch.tril(total, -1).T)
        return self.sums


def statistics_at(
    layer: int, site: str, linears: Iterable[LinearSite], statistics: Mapping[str, AnyStatistic], gathering: Gathering
) -> dict[str, SiteStatistic]:
    """Return what to gather at a site: in place of what was gathered of gradients, what it is needed for.

    Args:
        layer: Block index.
        site: Name of the site.
        linears: Those of the block that are to be solved.
        statistics: What their methods need.
        gathering: Knows the saliency of their outputs.

    Raises:
        UsageError: No saliency is known.
    """
    found: dict[str, SiteStatistic] = {
        name: one for name, one in statistics.items() if not isinstance(one, GradientStatistic)
    }
    if len(found) == len(statistics):
        return found
    if gathering.saliencies is None:
        raise UsageError("no saliency is known", hint="qtool calibrate MODEL --gather hessian,saliency")
    readers = [one for one in linears if one.spec.reads == site and one.layer == layer]
    return found | {own_name(one, GUIDED): GuidedHessians(gathering.saliencies.of(one)) for one in readers}


def own_name(linear: LinearSite, entry: str) -> str:
    """Return how an entry that is one linear's own is called among those of the site that it reads."""
    return f"{linear.spec.module}.{entry}"


def own_entries(linear: LinearSite, known: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return what is known of a site as one of its readers sees it: its own entries by their plain name."""
    name = own_name(linear, GUIDED)
    return known if name not in known else {**known, GUIDED: known[name]}
