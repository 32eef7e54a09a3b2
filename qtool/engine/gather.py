"""Gathering statistics: what a statistic is, and the observers that feed it while a block runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.cache import KEYS, QUERIES, VALUES
from qtool.engine.experts import Mode
from qtool.engine.linear import SiteInput
from qtool.engine.saliency import Saliencies
from qtool.errors import NumericalError
from qtool.model.graph import HEAD_IN, OUTPUT, LinearSite
from qtool.model.statistics import SiteStatistics
from qtool.numerics.token_weights import TokenWeight


@dataclass(frozen=True)
class Gathering:
    """What every accumulator of a pass is told.

    Attributes:
        tokens: Number of tokens that the pass will show.
        token_weight: How much each token counts where that matters.
        seed: Seeds what is drawn at random.
        sample_size: Token rows that a sample keeps.
        window: Tokens to a window; accumulators are shown whole windows. 0 where that does not matter.
        saliencies: What errors cost at the outputs of linears, where that was gathered before.
        saliency: What they cost at the outputs of those that read the site, where tokens are weighed by it.
    """

    tokens: int
    token_weight: TokenWeight
    seed: int = 0
    sample_size: int = 2048
    window: int = 0
    saliencies: Saliencies | None = None
    saliency: Float[Tensor, " tokens"] | None = None

    def at(self, layer: int, site: str) -> Gathering:
        """Return what the accumulators of one site are told."""
        ungraded = site == HEAD_IN and self.token_weight.at(site).rule == "gradient"  # known of linears in blocks only
        plain = site in (KEYS, VALUES, QUERIES) or site.startswith(f"{OUTPUT}.") or ungraded
        weight = TokenWeight() if plain else self.token_weight.at(site)
        if weight.rule != "gradient" or self.saliencies is None:
            return replace(self, token_weight=weight)
        return replace(self, token_weight=weight, saliency=self.saliencies.at(layer, site))

    def scales(self, x: Float[Tensor, "tokens n"], first: int) -> Float[Tensor, " tokens"] | None:
        """Return the factor that multiplies each token before its outer product, or None for 1.

        Args:
            x: Tokens, whole windows one after the other.
            first: How many tokens of the site came before them.
        """
        saliency = None if self.saliency is None else self.saliency[first : first + len(x)]
        return self.token_weight.scales(x, window=self.window, saliency=saliency)


@runtime_checkable
class Accumulator(Protocol):
    """A statistic of one site while it is being gathered."""

    def update(self, x: Float[Tensor, "tokens n"]) -> None:
        """Take in the site's input for some tokens, in float32."""

    def result(self) -> Tensor:
        """Return the statistic of all tokens seen."""


@runtime_checkable
class Statistic(Protocol):
    """A statistic of a site's input that calibrate can gather."""

    version: int

    def start(self, n: int, gathering: Gathering, device: torch.device) -> Accumulator:
        """Return an accumulator for a site whose input has ``n`` channels."""


@runtime_checkable
class GradientStatistic(Protocol):
    """A statistic of the loss's gradient at the outputs of a linear that calibrate can gather, by a backward pass."""

    version: int

    def start_gradient(self, n: int, gathering: Gathering, device: torch.device) -> Accumulator:
        """Return an accumulator for a linear with ``n`` outputs, which is shown their gradients, tokens in order."""


@runtime_checkable
class GuidedStatistic(Protocol):
    """A statistic of what one linear multiplies, whose tokens count by the saliency of its outputs.

    Only ``mitigate`` can gather it, for methods that need ``saliency`` as well. Each linear has its own.
    """

    version: int

    def start_guided(self, n: int, saliency: Float[Tensor, "tokens groups"]) -> Accumulator:
        """Return an accumulator for a linear with ``n`` inputs, on the device of what its groups of rows cost."""


@runtime_checkable
class PairedAccumulator(Protocol):
    """A statistic that compares what a site reads with what it would read in full precision."""

    def update_pair(self, x: Float[Tensor, "tokens n"], exact: Float[Tensor, "tokens n"]) -> None:
        """Take in the site's input for some tokens, and what it is in full precision, both in float32."""

    def result(self) -> Tensor:
        """Return the statistic of all tokens seen."""


@runtime_checkable
class PairedStatistic(Protocol):
    """A statistic that only ``mitigate`` can gather, where quantized activations run beside those in full precision."""

    version: int

    def start_pair(self, n: int, gathering: Gathering, device: torch.device) -> PairedAccumulator:
        """Return an accumulator for a site whose input has ``n`` channels."""


@runtime_checkable
class ProductStatistic(Protocol):
    """A statistic of what linears multiply with their weights: of inputs as they are rounded, where they are."""

    of_products: Literal[True]


SiteStatistic = Statistic | PairedStatistic
AnyStatistic = SiteStatistic | GradientStatistic | GuidedStatistic


@runtime_checkable
class SizedStatistic(Protocol):
    """A statistic that knows beforehand how large it gets, so that a dry run can say so; no statistic has to."""

    def nbytes(self, n: int, gathering: Gathering) -> int:
        """Return the bytes of the result for a site whose input has ``n`` channels, and all tokens come by."""


def sites_to_observe(linears: Iterable[LinearSite], mode: Mode) -> tuple[str, ...]:
    """Return the names of the sites that the statistics of some linears of a block come from.

    Args:
        linears: The linears.
        mode: ``all``: what all experts read is observed once; ``routed``: each expert's share of it as well.
    """
    names: dict[str, None] = {}
    for linear in linears:
        names[linear.spec.reads] = None
        if mode == "routed":
            names[linear.observed] = None
    return tuple(names)


class SiteObserver:
    """Feeds one site's input to its accumulators.

    Args:
        site: Id of the site, for messages.
        statistics: What to gather, by name.
        gathering: What the accumulators are told.
        source: Says what the input is rounded to; None where it is not.
    """

    def __init__(
        self,
        site: str,
        statistics: Mapping[str, SiteStatistic],
        gathering: Gathering,
        source: SiteInput | None = None,
    ) -> None:
        self.site, self.statistics, self.gathering, self.source = site, statistics, gathering, source
        self.accumulators: dict[str, Accumulator | PairedAccumulator] = {}
        self.exact: deque[Tensor] = deque()
        self.tokens = 0

    def __call__(self, x: Float[Tensor, "tokens n"]) -> None:
        """Take in the input of some tokens; an expert may get none."""
        if not len(x):
            return
        x = x.float()
        if not self.accumulators:
            self.accumulators = {
                name: _started(statistic, x.shape[-1], self.gathering, x.device)
                for name, statistic in self.statistics.items()
            }
        exact = self.exact.popleft().float() if self.exact else None
        multiplied = self._multiplied(x)
        for name, accumulator in self.accumulators.items():
            shown = multiplied if isinstance(self.statistics[name], ProductStatistic) else x
            if not isinstance(accumulator, PairedAccumulator):
                accumulator.update(shown)
            elif exact is not None:
                accumulator.update_pair(shown, exact)
        self.tokens += x.shape[0]

    def _multiplied(self, x: Float[Tensor, "tokens n"]) -> Float[Tensor, "tokens n"]:
        """Return what linears multiply with their weights."""
        source = self.source
        return x if source is None or source.rounding is None else source.multiplied().float()

    def remember(self, exact: Float[Tensor, "tokens n"]) -> None:
        """Take in what the next tokens are in full precision."""
        if len(exact):
            self.exact.append(exact)

    def result(self) -> SiteStatistics:
        """Return what was gathered, on the host, and let go of it: of an expert without tokens, nothing.

        Raises:
            NumericalError: A value is NaN or infinite; names the site.
        """
        entries: dict[str, Tensor] = {}
        for name in tuple(self.accumulators):  # one at a time: with many experts there is no room for both
            entry = self.accumulators.pop(name).result()
            if not torch.isfinite(entry).all():
                raise NumericalError(
                    f"`{name}` of the activations at `{self.site}` holds NaN or Inf",
                    hint="run the model in float32: --dtype float32",
                )
            entries[name] = entry.cpu()
        return SiteStatistics(self.tokens, entries)


def _started(
    statistic: SiteStatistic, n: int, gathering: Gathering, device: torch.device
) -> Accumulator | PairedAccumulator:
    if isinstance(statistic, PairedStatistic):
        return statistic.start_pair(n, gathering, device)
    return statistic.start(n, gathering, device)


@contextmanager
def observing(
    sites: Mapping[str, SiteInput],
    layer: int,
    wanted: Mapping[str, Mapping[str, SiteStatistic]],
    gathering: Gathering,
) -> Iterator[dict[str, SiteObserver]]:
    """Attach observers to sites of a block for as long as the context lasts.

    Args:
        sites: The block's sites by name.
        layer: Block index.
        wanted: Site name to the statistics that it needs.
        gathering: What the accumulators are told.

    Yields:
        The observers by site name.
    """
    observers = {
        name: SiteObserver(f"layers.{layer}.{name}", wanted[name], gathering.at(layer, name), sites[name])
        for name in wanted
    }
    try:
        for name, observer in observers.items():
            sites[name].observer = observer
        yield observers
    finally:
        for name in observers:
            sites[name].observer = None
            sites[name].forget()
