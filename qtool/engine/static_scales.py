"""Scales of activations that are found once: the search of LLM-FP4 (Liu et al. 2023, arXiv:2310.16836).

A float with a real exponent bias is one with a real scale, and the bias of a layer's input is the candidate at which
the layer's outputs have the least error::

    min over s of sum_i |(Q_s(x_i) - x_i) W^T|^2

summed over the linears that read the input, whose weights are those before rounding. A linear's own error is all that
is looked at, as in the paper. Its 100 biases go from 0.01 to 1.2 of that of the range, which depends on the unit of the
values; here they go from a quarter below it to six above, so a scale from 1.19 to 1/64 of that of the range, evenly,
whatever the unit. Formats other than floats have scales as well, and the same search.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from qtool.engine.grid import GlobalScales, Grid, GridPart
from qtool.numerics.clipping import search_clip
from qtool.numerics.groups import to_groups
from qtool.scheme import GroupParameters

_CANDIDATES = 100
_BELOW, _ABOVE = 0.25, 6.0


def biases_tried() -> tuple[float, ...]:
    """Return by how much each candidate exceeds the exponent bias of the whole range."""
    return tuple(-_BELOW + (_BELOW + _ABOVE) * step / (_CANDIDATES - 1) for step in range(_CANDIDATES))


def calibrated_scales(
    grid: Grid, absmax: Float[Tensor, " n"], sample: Float[Tensor, "tokens n"], weights: Sequence[Tensor]
) -> GlobalScales:
    """Return the multiplier of each part: what its range says, but of static scales the one that is found.

    Args:
        grid: What an input is rounded to.
        absmax: Largest magnitude of each column over all calibration tokens.
        sample: Some tokens of the input. Not modified.
        weights: Of the linears that read it, ``[out, n]``. Not modified.
    """
    found: list[Tensor | None] = []
    for columns, part in grid.places(len(absmax)):
        amax = absmax[columns].amax()
        if part.scheme.static:
            own = [weight[:, columns].float() for weight in weights]
            found.append(_searched(part, amax, sample[:, columns].float(), sum_of_squares(own)))
        else:
            found.append(part.global_scale(amax))
    return tuple(found)


def sum_of_squares(weights: Sequence[Float[Tensor, "_ n"]]) -> Float[Tensor, "n n"]:
    """Return ``sum W^T W``: what an error of the input puts out is ``e (sum W^T W) e^T``."""
    first, *others = weights
    total = first.T @ first
    for weight in others:
        total.addmm_(weight.T, weight)
    return total


def _searched(
    part: GridPart, amax: Float[Tensor, ""], sample: Float[Tensor, "tokens n"], moments: Float[Tensor, "n n"]
) -> Float[Tensor, ""]:
    """Return the scale, as it is stored, with the least error in the output; of equal ones that of the range."""

    def fit_round(groups: Tensor, ratio: float) -> tuple[GroupParameters, Tensor]:
        parameters = part.fit(groups, global_scale=part.global_scale(amax * ratio))
        return parameters, part.format.round(groups, parameters)

    ratios = [2.0**-bias for bias in biases_tried()]
    found = search_clip(to_groups(sample, "tensor"), fit_round, ratios=ratios, moments=moments.unsqueeze(0))
    return found.parameters.scale.reshape(()).clone()
