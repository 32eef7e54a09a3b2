"""Experts that see few tokens: their statistics are completed by those that the layer's experts share.

An expert with fewer tokens than a share of what even routing would give it is *starved*. What it saw is shrunk toward
what all experts of its layer saw: the site that they read, or, where each has an input of its own, the mean over their
tokens. Where there is nothing to shrink to, its inputs count as white noise, for which every method rounds to nearest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from qtool.model.graph import LinearSite
from qtool.model.statistics import BLOCKS, HESSIAN, MOMENTS, SAMPLE, SiteStatistics
from qtool.numerics.shrinkage import shrink

DEFAULT_SHARE = 0.25
_MEANS = (HESSIAN, BLOCKS, "mean", "mean_abs")
_EXTREMES = {"absmax": torch.maximum, "max": torch.maximum, "min": torch.minimum}


@dataclass(frozen=True)
class Routing:
    """How many tokens of a pass each expert of a layer was sent.

    Attributes:
        tokens: The counts.
        share: Part of the tokens that even routing would give, below which an expert is starved.
    """

    tokens: Int64[Tensor, " experts"]
    share: float = DEFAULT_SHARE

    @property
    def expected(self) -> float:
        """Tokens that each expert would see if routing were even: tokens of the pass, times chosen, by experts."""
        return float(self.tokens.sum()) / len(self.tokens)

    @property
    def prior(self) -> float:
        """Tokens that the shared statistics count as: what it takes not to be starved."""
        return self.share * self.expected

    def starved(self, expert: int) -> bool:
        """Say whether an expert saw too little; one that saw nothing did, whatever the share."""
        seen = int(self.tokens[expert])
        return seen == 0 or seen < self.prior


@dataclass(frozen=True)
class Completed:
    """Statistics in which every expert has enough to go by.

    Attributes:
        statistics: By site name, all that were given, those of starved experts completed.
        shrunk: Experts whose statistics were shrunk toward shared ones.
        unknown: Experts of which nothing is known: their weights are rounded to nearest.
        routing: How many tokens each expert was sent, where there are any.
    """

    statistics: dict[str, SiteStatistics]
    shrunk: frozenset[int] = frozenset()
    unknown: frozenset[int] = frozenset()
    routing: Routing | None = None


def complete(statistics: Mapping[str, SiteStatistics], linears: Sequence[LinearSite], routing: Routing) -> Completed:
    """Complete the statistics of starved experts.

    Args:
        statistics: By site name, as gathered from the tokens that each expert was sent. Not modified.
        linears: Linears of one block; those of experts name the sites.
        routing: How many tokens each expert was sent.

    Returns:
        The statistics, and which experts were starved.
    """
    found = dict(statistics)
    shrunk, unknown = set[int](), set[int]()
    pooled: dict[str, SiteStatistics] = {}
    for linear in linears:
        expert, site = linear.expert, linear.observed
        if expert is None or found.get(site) is not statistics.get(site) or not routing.starved(expert):
            continue  # not an expert's, completed before by way of a sibling, or well fed
        if site == linear.spec.reads:
            kind = site.rpartition(".")[2]
            if kind not in pooled:
                pooled[kind] = pool(_same_kind(statistics, linears, kind, routing))
            shared = pooled[kind]
        else:
            shared = statistics[linear.spec.reads]
        seen = int(routing.tokens[expert])
        if seen + routing.prior <= 0:
            found[site] = white(shared)
            unknown.add(expert)
        else:
            own = statistics.get(site, SiteStatistics(0, {}))
            found[site] = shrunk_statistics(own, shared, tokens=seen, prior=routing.prior)
            shrunk.add(expert)
    return Completed(found, frozenset(shrunk - unknown), frozenset(unknown), routing)


def _same_kind(
    statistics: Mapping[str, SiteStatistics], linears: Iterable[LinearSite], kind: str, routing: Routing
) -> list[tuple[int, SiteStatistics]]:
    """Return what each expert saw at its own site of a kind, with the number of tokens."""
    sites = {one.observed: one.expert for one in linears if one.expert is not None}
    return [
        (int(routing.tokens[expert]), statistics[site])
        for site, expert in sites.items()
        if site.rpartition(".")[2] == kind and site in statistics and int(routing.tokens[expert])
    ]


def pool(members: Sequence[tuple[int, SiteStatistics]]) -> SiteStatistics:
    """Return the statistics of all tokens of several sites: means weighted by tokens, extremes of all.

    What is neither (a sample) is left out.

    Args:
        members: Tokens and statistics of each site. Not modified.
    """
    total = sum(tokens for tokens, _ in members)
    entries: dict[str, Tensor] = {}
    for tokens, statistics in members:
        for name, entry in statistics.entries.items():
            if name in _MEANS:
                entries.setdefault(name, torch.zeros_like(entry)).add_(entry, alpha=tokens / total)
            elif name in _EXTREMES:
                entries[name] = _EXTREMES[name](entries[name], entry) if name in entries else entry
    return SiteStatistics(total, entries)


def shrunk_statistics(own: SiteStatistics, shared: SiteStatistics, *, tokens: int, prior: float) -> SiteStatistics:
    """Return an expert's statistics, completed: means shrunk, extremes of both, the rest its own where it has any."""
    entries = dict(shared.entries)
    for name, entry in own.entries.items():
        other = entries.get(name)
        if name in _MEANS and other is not None:
            entries[name] = shrink(entry, other, tokens=tokens, prior=prior)
        elif name in _EXTREMES and other is not None:
            entries[name] = _EXTREMES[name](entry, other.to(entry))
        elif name != SAMPLE or len(entry) or other is None:
            entries[name] = entry
    return SiteStatistics(tokens, entries, own.estimated | shared.estimated)


def white(shared: SiteStatistics) -> SiteStatistics:
    """Return statistics of white noise of the shared size: the Hessian is a multiple of the identity."""
    entries = dict(shared.entries)
    for name in MOMENTS & entries.keys():
        diagonal = entries[name].diagonal(dim1=-2, dim2=-1)
        size = diagonal.mean()
        entries[name] = torch.diag_embed(torch.where(size > 0, size, torch.ones_like(size)).expand_as(diagonal))
    return SiteStatistics(0, entries, shared.estimated)


def expert_notes(seen: Sequence[Completed]) -> dict[str, Any]:
    """Return what is to be said of a block's experts as plain values; nothing where it has none.

    Args:
        seen: What each stage of solving the block went by; the last one that tokens reached gives the counts.

    Returns:
        ``tokens`` by expert, and the lists ``shrunk_experts`` and ``experts_rtn``.
    """
    counted = [one.routing for one in seen if one.routing is not None]
    if not counted:
        return {}
    unknown = frozenset[int]().union(*(one.unknown for one in seen))
    shrunk = frozenset[int]().union(*(one.shrunk for one in seen)) - unknown
    return {
        "tokens": counted[-1].tokens.tolist(),
        "shrunk_experts": sorted(shrunk),
        "experts_rtn": sorted(unknown),
    }
