"""Outlier Suppression+: shifts and scales of input channels, one searched number a site (Wei et al., arXiv:2304.09145).

For each input of a block, with the smallest and largest value of each channel over calibration tokens::

    z_j    = (max_j + min_j) / 2                                shift, where a bias in front can absorb it
    s_j(t) = max(1, max(max_j - z_j, z_j - min_j) / t)          only channels that exceed the threshold t are scaled
    t*     = argmin_t || f(X; W) - f(Q((X - z) / s); Q(W diag(s))) ||^2

``f`` is the whole block, with all but the linears that read the site in full precision. Shifted and scaled are the
inputs that a norm produces, scaled also those of down projections whose gate lets a scale pass. A layer norm's bias
absorbs the shift; a norm that has only a weight absorbs none. The routed experts of a block share one threshold and
have their own extremes; an expert of which nothing was gathered keeps its inputs as they are.

The paper sweeps t linearly from the largest magnitude down, in ``max(100, amax / 0.5)`` steps (``search=linear``). By
default a geometric grid of a third of the steps is tried first, since good thresholds lie anywhere in three orders of
magnitude, and then a tenth of them linearly between the neighbours of the best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.builtin.transforms.awq import SearchOptions, scaled_kinds, searched_together, trials_of
from qtool.errors import UsageError
from qtool.model.graph import EXPERTS, Site
from qtool.model.plan import BlockTrial, Proposal, TransformContext
from qtool.numerics.operators import Diag, Operator, Shift

STEP = 0.5
"""Largest distance between two thresholds of the paper's linear sweep."""


@dataclass(frozen=True)
class OutlierSuppressionPlusConfig(SearchOptions):
    """Options of Outlier Suppression+.

    Attributes:
        shift: ``auto`` shifts where a bias in front absorbs it; ``on`` refuses a model with norms that cannot.
        steps: About how many thresholds are tried a site.
        lowest: The smallest threshold, in units of the activations. The paper uses 1, for Llama 0.1.
        search: ``coarse`` to fine, or the paper's ``linear`` sweep.
    """

    shift: Literal["auto", "on", "off"] = "auto"
    steps: int = 100
    lowest: float = 0.1
    search: Literal["coarse", "linear"] = "coarse"

    def __post_init__(self) -> None:
        """Refuse a search without thresholds."""
        super().__post_init__()
        if self.steps < 1:
            raise UsageError("`steps` must be 1 or more", facts=(("received", self.steps),), hint="--set steps=100")
        if not self.lowest > 0:
            raise UsageError("`lowest` must be above 0", facts=(("received", self.lowest),), hint="--set lowest=0.1")


@dataclass(frozen=True)
class Extremes:
    """What is known of a site's channels.

    Attributes:
        shift: ``z``; None where it is not shifted.
        reach: Largest magnitude of each channel behind the shift.
    """

    shift: Float[Tensor, " n"] | None
    reach: Float[Tensor, " n"]

    def operators(self, threshold: float) -> list[Operator]:
        """Return the shift, if any, and the scale with a threshold."""
        scale = Diag(1 / threshold_scale(self.reach, threshold))
        return [scale] if self.shift is None else [Shift(self.shift), scale]


class OutlierSuppressionPlus:
    """Proposes a diagonal, behind a shift where one folds, at every input that something in front can absorb."""

    version = 1
    needs = ("min", "max")
    Config = OutlierSuppressionPlusConfig

    def plan(self, context: TransformContext, config: OutlierSuppressionPlusConfig) -> Proposal:
        """Return ``T = diag(1/s)`` behind ``z`` for each site, with the threshold that gives the block the least error.

        Raises:
            UsageError: A shift was asked for that nothing can absorb, the scheme does not say how weights are rounded,
                or the model has no sites of a kind.
            ArtifactError: The statistics lack the extremes.
        """
        kinds = scaled_kinds(context, config.sites, heads=False)
        found: dict[str, Sequence[Operator]] = {}
        for trial in trials_of(context, config.tokens):
            for sites in searched_together(context, trial.layer, kinds):
                known = {site.id: one for site in sites if (one := extremes(context, site, config)) is not None}
                if known:
                    found |= _searched(trial, known, config)
        return Proposal(found)


def threshold_scale(reach: Float[Tensor, " n"], threshold: float) -> Float[Tensor, " n"]:
    """Return ``s = max(1, reach / t)``: channels that exceed a threshold are brought down to it.

    Args:
        reach: Largest magnitude of each channel. Not modified.
        threshold: ``t``, above zero, in units of ``reach``.
    """
    return (reach / threshold).clamp_min(1.0)


def middle(low: Float[Tensor, " n"], high: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return ``z = (max + min) / 2``, which makes the extremes of each channel opposite."""
    return (high + low) / 2


def extremes(context: TransformContext, site: Site, config: OutlierSuppressionPlusConfig) -> Extremes | None:
    """Return what is known of a site's channels; None for an expert of which nothing was gathered.

    Raises:
        UsageError: A shift was asked for that nothing can absorb.
        ArtifactError: The statistics lack the extremes.
    """
    statistics = context.statistics[site.id]
    if site.name.startswith(EXPERTS) and not statistics.entries:
        return None
    low, high = (statistics.need(name, site=site.id) for name in ("min", "max"))
    if not _shifts(context, site, config):
        return Extremes(None, torch.maximum(high, -low))
    z = middle(low, high)
    return Extremes(z, torch.maximum(high - z, z - low))


def _shifts(context: TransformContext, site: Site, config: OutlierSuppressionPlusConfig) -> bool:
    """Say whether a site is shifted."""
    if config.shift == "off" or context.graph.norm_of(site.name) is None:
        return False
    folds = "shift" in site.foldable
    if config.shift == "on" and not folds:
        raise UsageError(
            f"no bias absorbs a shift at `{site.id}`",
            facts=(("because", site.refused.get("shift") or site.why),),
            hint="--set shift=auto",
        )
    return folds


def _searched(
    trial: BlockTrial, known: Mapping[str, Extremes], config: OutlierSuppressionPlusConfig
) -> dict[str, Sequence[Operator]]:
    """Return the operators of some sites with the threshold that they share and that gives the block least error."""

    def operators(threshold: float) -> dict[str, Sequence[Operator]]:
        return {site_id: one.operators(threshold) for site_id, one in known.items()}

    amax = max(float(one.reach.max()) for one in known.values())
    return operators(best_threshold(amax, lambda threshold: trial.error(operators(threshold)), config))


def best_threshold(amax: float, error: Callable[[float], float], config: OutlierSuppressionPlusConfig) -> float:
    """Return the threshold with the least error; ``amax``, which scales nothing, if it is the lowest to be tried.

    Args:
        amax: Where the search starts: the largest magnitude.
        error: What a threshold costs; it is asked once for each.
        config: How many thresholds are tried, down to which, in which order.
    """
    if amax <= config.lowest:
        return max(amax, config.lowest)
    if config.search == "linear":
        return min(_linear(amax, config.lowest, max(config.steps, ceil(amax / STEP))), key=error)
    coarse = _geometric(amax, config.lowest, max(2, config.steps // 3))
    errors = [error(threshold) for threshold in coarse]
    place = errors.index(min(errors))
    above, below = coarse[max(place - 1, 0)], coarse[min(place + 1, len(coarse) - 1)]
    fine = _linear(above, below, max(1, config.steps // 10) + 2)[1:-1]
    return min([(errors[place], coarse[place]), *((error(threshold), threshold) for threshold in fine)])[1]


def _linear(start: float, stop: float, count: int) -> list[float]:
    """Return evenly spaced numbers, both ends included; a single one is the start."""
    return [start + (stop - start) * place / max(1, count - 1) for place in range(count)]


def _geometric(start: float, stop: float, count: int) -> list[float]:
    """Return numbers in even ratios, both ends included; a single one is the start."""
    ratio = (stop / start) ** (1 / max(1, count - 1))
    return [start * ratio**place for place in range(count)]
