"""Statistics that are a linear's own, because the saliency of its outputs weighs them.

They are gathered beside the statistics of the site that it reads, and go by the name of the linear among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.gather import Accumulator, AnyStatistic, Gathering, GradientStatistic, GuidedStatistic, SiteStatistic
from qtool.errors import UsageError
from qtool.model.graph import LinearSite


class _OfLinear:
    """A guided statistic as a site gathers it.

    Args:
        statistic: What is gathered.
        saliency: Of the outputs of the linear, tokens in the order of the windows.
    """

    of_products: Literal[True] = True

    def __init__(self, statistic: GuidedStatistic, saliency: Float[Tensor, "tokens groups"]) -> None:
        self.statistic, self.saliency, self.version = statistic, saliency, statistic.version

    def start(self, n: int, gathering: Gathering, device: torch.device) -> Accumulator:
        """Return an accumulator for the input of the linear."""
        del gathering
        return self.statistic.start_guided(n, self.saliency.to(device))


def statistics_at(
    layer: int, site: str, linears: Iterable[LinearSite], statistics: Mapping[str, AnyStatistic], gathering: Gathering
) -> dict[str, SiteStatistic]:
    """Return what to gather at a site: guided statistics once for each linear, and nothing of gradients.

    Args:
        layer: Block index.
        site: Name of the site.
        linears: Those of the block that are to be solved.
        statistics: What their methods need.
        gathering: Knows the saliency of their outputs.

    Raises:
        UsageError: No saliency is known.
    """
    readers = [one for one in linears if one.spec.reads == site and one.layer == layer]
    found: dict[str, SiteStatistic] = {}
    for name, one in statistics.items():
        if isinstance(one, GuidedStatistic):
            if gathering.saliencies is None:
                raise UsageError(
                    f"`{name}` weighs tokens by saliency, and none is known",
                    hint="qtool calibrate MODEL --gather hessian,saliency",
                )
            found |= {own_name(reader, name): _OfLinear(one, gathering.saliencies.of(reader)) for reader in readers}
        elif not isinstance(one, GradientStatistic):
            found[name] = one
    return found


def own_name(linear: LinearSite, entry: str) -> str:
    """Return how an entry that is one linear's own is called among those of the site that it reads."""
    return f"{linear.spec.module}.{entry}"


def own_entries(linear: LinearSite, known: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return what is known of a site as one of its readers sees it: its own entries by their plain name too."""
    prefix = own_name(linear, "")
    own = {name.removeprefix(prefix): entry for name, entry in known.items() if name.startswith(prefix)}
    return {**known, **own} if own else known
