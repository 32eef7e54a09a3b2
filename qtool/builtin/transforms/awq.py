"""AWQ: scales of input channels, searched for the least error of the block (Lin et al. 2023, arXiv:2306.00978).

A channel that carries large activations gets a larger weight, whose rounding then costs less. With the mean magnitude
of each input channel over calibration tokens, for each input of a block::

    s_j(r) = max(mean|X_j|**r, 1e-4),   s <- s / sqrt(max_j s_j * min_j s_j),   r in {0, 1/20, ..., 19/20}
    r* = argmin_r || f(X; W) - f(X; Q(W diag(s))) ||^2,   f: the whole block, all but these linears in full precision

Activations become ``X / s``, which the norm, the values or the up projection in front absorb. Scaled are the inputs
that a norm produces, value heads (with grouped queries ``mean|X|`` is the mean over the query heads of a value head,
since they share its rows), and inputs of down projections whose gate lets a scale pass. Every routed expert has scales
from its own statistics, but those of a block share one ``r``: a search for each would run the block that many times.
An expert of which nothing was gathered, and a channel that is never active, keep the scale 1.

Inputs are rounded in the search as well if the scheme rounds them; the paper's setting is a scheme of weights only,
such as ``--scheme W4A16``. What the paper does besides, a search for the range of weights, belongs to the rounding.
A mean over tokens is moved less than a maximum by the few tokens with massive activations, so they stay in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.errors import UsageError
from qtool.model.graph import EXPERTS, Site
from qtool.model.plan import BlockTrial, Proposal, TransformContext
from qtool.numerics.operators import Diag, Operator

SMALLEST = 1e-4
HEADS = "vo"


@dataclass(frozen=True)
class SearchOptions:
    """What every search over scales of a block's inputs can be told.

    Attributes:
        tokens: About how many calibration tokens the block runs on for each candidate.
        sites: Kinds of sites joined by commas, such as ``attn_in,mlp_in``; ``all`` for every one whose scales the
            modules in front absorb.
    """

    tokens: int = 2048
    sites: str = "all"

    def __post_init__(self) -> None:
        """Refuse a search without tokens."""
        if self.tokens < 1:
            raise UsageError("`tokens` must be 1 or more", facts=(("received", self.tokens),), hint="--set tokens=2048")


@dataclass(frozen=True)
class AWQConfig(SearchOptions):
    """Options of AWQ.

    Attributes:
        grid: How many exponents are tried: ``0, 1/grid, ..., 1 - 1/grid``.
    """

    grid: int = 20

    def __post_init__(self) -> None:
        """Refuse an empty grid."""
        super().__post_init__()
        if self.grid < 1:
            raise UsageError("`grid` must be 1 or more", facts=(("received", self.grid),), hint="--set grid=20")


class AWQ:
    """Proposes a diagonal at every input that something in front can absorb."""

    version = 1
    needs = ("mean_abs",)
    Config = AWQConfig

    def plan(self, context: TransformContext, config: AWQConfig) -> Proposal:
        """Return ``T = diag(1/s)`` for each site, with the exponent that gives the block the least error.

        Raises:
            UsageError: The scheme does not say how weights are rounded, or the model has no sites of a kind.
            ArtifactError: The statistics lack the mean magnitude.
        """
        kinds = scaled_kinds(context, config.sites, heads=True)
        found: dict[str, Sequence[Operator]] = {}
        for trial in trials_of(context, config.tokens):
            for sites in searched_together(context, trial.layer, kinds):
                means = {site.id: mean for site in sites if (mean := mean_magnitude(context, site)) is not None}
                if means:
                    found |= _searched(trial, means, config.grid)
        return Proposal(found)


def _searched(trial: BlockTrial, means: Mapping[str, Tensor], grid: int) -> dict[str, Sequence[Operator]]:
    """Return the scales of some sites with the exponent that they share and that gives the block the least error."""

    def scaled(ratio: float) -> dict[str, Sequence[Operator]]:
        return {site_id: [divided_by(awq_scale(mean, ratio))] for site_id, mean in means.items()}

    return scaled(min((step / grid for step in range(grid)), key=lambda ratio: trial.error(scaled(ratio))))


def awq_scale(magnitude: Float[Tensor, "*heads in"], ratio: float) -> Float[Tensor, "*heads in"]:
    """Return ``s = magnitude**ratio / sqrt(max s * min s)``; 1 where a channel is never active.

    Args:
        magnitude: Mean magnitude of each input channel. Not modified.
        ratio: Share of the salience that moves into the weights, in [0, 1).
    """
    active = magnitude > 0
    if not bool(active.any()):
        return torch.ones_like(magnitude)
    scale = magnitude.pow(ratio).clamp_min(SMALLEST)
    center = (scale[active].max() * scale[active].min()).sqrt()
    return torch.where(active, scale / center, torch.ones_like(scale))


def mean_magnitude(context: TransformContext, site: Site) -> Float[Tensor, "*heads n"] | None:
    """Return ``mean|X|`` of each channel of a site; None for an expert of which nothing was gathered.

    Value heads are read where they come out of attention: of each, the mean over the query heads that share it.

    Raises:
        ArtifactError: The statistics lack the mean magnitude.
    """
    if site.name != HEADS:
        statistics = context.statistics[site.id]
        if site.name.startswith(EXPERTS) and not statistics.entries:
            return None
        return statistics.need("mean_abs", site=site.id)
    mean = by_value_head(context.statistics[site.id].need("mean_abs", site=site.id), site).mean(1)
    return mean if site.heads > 1 else mean[0]


def by_value_head(x: Float[Tensor, " n"], site: Site) -> Float[Tensor, "heads repeat dim"]:
    """Return values of each channel behind attention, those of the query heads that share a value head together."""
    return x.reshape(site.heads, -1, site.dim)


def divided_by(scale: Float[Tensor, "*heads n"]) -> Diag:
    """Return the operator that divides by a scale."""
    return Diag(1 / scale, heads=len(scale) if scale.ndim > 1 else 1)


def trials_of(context: TransformContext, tokens: int) -> Iterator[BlockTrial]:
    """Return the blocks one after the other, to try operators in.

    Raises:
        UsageError: There are no calibration tokens to run, or the scheme does not say how weights are rounded.
    """
    if context.trials is None:
        raise UsageError(
            "a search over a block's error needs calibration tokens and was given none",
            hint="give statistics: qtool calibrate MODEL",
        )
    return context.trials(tokens)


def scaled_kinds(context: TransformContext, wanted: str, *, heads: bool) -> tuple[str, ...]:
    """Return the kinds of sites that linears read and whose scales are absorbed in front.

    Args:
        context: Knows the sites.
        wanted: Kinds joined by commas, or ``all``.
        heads: Whether value heads are among them.

    Raises:
        UsageError: The model has none of a kind.
    """
    graph = context.graph
    first = {site.kind: site for site in reversed(graph.sites.values()) if "diag" in site.foldable}
    kinds = [kind for kind in reversed(first) if graph.consumers(first[kind]) and (heads or kind != HEADS)]
    asked = kinds if wanted == "all" else wanted.split(",")
    if unknown := sorted(set(asked) - set(kinds)):
        raise UsageError(
            f"nothing absorbs scales at `{', '.join(unknown)}` in this model",
            facts=(("absorbed at", ", ".join(kinds)),),
            hint=f"--set sites={','.join(kinds)}",
        )
    return tuple(asked)


def searched_together(context: TransformContext, layer: int, kinds: Sequence[str]) -> Iterator[tuple[Site, ...]]:
    """Yield the sites of some kinds of a block whose scales are absorbed in front; routed experts' come all at once."""
    for kind in kinds:
        here = [site for site in context.graph.of_kind(kind, layer) if "diag" in site.foldable]
        yield from ((site,) for site in here if not site.name.startswith(EXPERTS))
        if routed := tuple(site for site in here if site.name.startswith(EXPERTS)):
            yield routed
