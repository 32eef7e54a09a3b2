"""Scales of activations that are found once: the search of LLM-FP4 (Liu et al. 2023, arXiv:2310.16836).

A float with a real exponent bias is one with a real scale, and the bias of a layer's input is the candidate at which
the layer's outputs have the least error::

    min over s of sum_i |(Q_s(x_i) - x_i) W^T|^2

summed over the linears that read the input, whose weights are those before rounding. A linear's own error is all that
is looked at, as in the paper. Its 100 biases go from 0.01 to 1.2 of that of the range, which depends on the unit of the
values; here they go from a quarter below it to six above, so a scale from 1.19 to 1/64 of that of the range, evenly,
whatever the unit. Formats other than floats have scales as well, and the same search. Asymmetric integers have a range
from the least to the largest value of all tokens, widened to hold 0, of which both ends are multiplied alike; what is
found has a zero point of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.grid import GlobalScales, Grid, GridPart, ZeroPoints
from qtool.model.statistics import SiteStatistics
from qtool.numerics.clipping import search_clip
from qtool.numerics.groups import to_groups
from qtool.scheme import GroupParameters

_CANDIDATES = 100
_BELOW, _ABOVE = 0.25, 6.0


def biases_tried() -> tuple[float, ...]:
    """Return by how much each candidate exceeds the exponent bias of the whole range."""
    return tuple(-_BELOW + (_BELOW + _ABOVE) * step / (_CANDIDATES - 1) for step in range(_CANDIDATES))


def needs_of_range(grid: Grid) -> tuple[str, ...]:
    """Return the statistics that say the range of an input: both ends where a static scale has a zero point."""
    asymmetric = any(part.scheme.static and not part.scheme.symmetric for part in grid.parts)
    return ("min", "max") if asymmetric else ("absmax",)


def extremes_of(grid: Grid, known: SiteStatistics, *, site: str) -> Float[Tensor, "ends n"]:
    """Return the range of each column of an input that is rounded to a grid, over all calibration tokens."""
    return torch.stack([known.need(name, site=site).float() for name in needs_of_range(grid)])


def calibrated_scales(
    grid: Grid, extremes: Float[Tensor, "*ends n"], sample: Float[Tensor, "tokens n"], weights: Sequence[Tensor]
) -> tuple[GlobalScales, ZeroPoints]:
    """Return the multiplier of each part: what its range says, but of static scales the one that is found.

    Args:
        grid: What an input is rounded to.
        extremes: Largest magnitude of each column over all calibration tokens, or the least and the largest value.
        sample: Some tokens of the input. Not modified.
        weights: Of the linears that read it, ``[out, n]``. Not modified.

    Returns:
        The multipliers, and the zero points of static scales.
    """
    found: list[tuple[Tensor | None, Tensor | None]] = []
    for columns, part in grid.places(extremes.shape[-1]):
        own = extremes[..., columns]
        if part.scheme.static:
            moments = sum_of_squares([weight[:, columns].float() for weight in weights])
            found.append(_searched(part, part.ends(own), sample[:, columns].float(), moments))
        else:
            found.append(part.shared(own))
    return tuple(scale for scale, _ in found), tuple(zero for _, zero in found)


def sum_of_squares(weights: Sequence[Float[Tensor, "_ n"]]) -> Float[Tensor, "n n"]:
    """Return ``sum W^T W``: what an error of the input puts out is ``e (sum W^T W) e^T``."""
    first, *others = weights
    total = first.T @ first
    for weight in others:
        total.addmm_(weight.T, weight)
    return total


def _searched(
    part: GridPart, ends: Float[Tensor, " ends"], sample: Float[Tensor, "tokens n"], moments: Float[Tensor, "n n"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""] | None]:
    """Return scale and zero point, as stored, with the least error in the output; of equal ones those of the range."""

    def fit_round(groups: Tensor, ratio: float) -> tuple[GroupParameters, Tensor]:
        tried = part.static(ends * ratio)
        parameters = part.fit(groups, global_scale=tried.scale, zero_point=tried.zero_point)
        return parameters, part.format.round(groups, parameters)

    ratios = [2.0**-bias for bias in biases_tried()]
    found = search_clip(to_groups(sample, "tensor"), fit_round, ratios=ratios, moments=moments.unsqueeze(0))
    zero = found.parameters.zero_point
    return found.parameters.scale.reshape(()).clone(), None if zero is None else zero.reshape(()).clone()
