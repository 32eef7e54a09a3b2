"""Search for the fraction of its range that each group should keep.

A smaller range has finer steps and saturates what lies outside; the best fraction depends on the group's tails. Where
steps are not uniform, as E2M1's, a scale above that of the whole range may be better still: it puts other values on the
coarse part of the grid (ScaleSweep 2026, arXiv:2606.07618, for NVFP4). The objective is that of the stored scale: what
a candidate is judged by is what the decoder will see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.numerics.groups import combine_parameters
from qtool.scheme import GroupParameters

FitRound: TypeAlias = Callable[[Tensor, float], tuple[GroupParameters, Tensor]]

# Values to a piece. The search passes over them again and again: on a CPU they should stay in its cache, elsewhere they
# should be worth a kernel's launch.
_PIECE = 1 << 16
_ACCELERATOR_PIECE = 1 << 26
# Where errors are multiplied with a matrix, a piece has to be worth reading that matrix.
_PRODUCT_PIECE = 1 << 22


@dataclass(frozen=True)
class ClippedFit:
    """Parameters of groups, and the clip ratio of each that they were fitted with."""

    parameters: GroupParameters
    ratio: Float[Tensor, "*rows"]


def clip_grid(count: int, floor: float = 0.21, ceiling: float = 1.0) -> tuple[float, ...]:
    """Return ``count`` ratios evenly from ``ceiling`` to ``floor``.

    80 from 1 to 0.21 are the hundredths of GPTQ's released code. From another ceiling 1 need not be among them;
    ``search_clip`` tries it all the same.
    """
    return tuple(ceiling - (ceiling - floor) * i / max(count - 1, 1) for i in range(count))


def quadratic_energy(
    errors: Float[Tensor, "*rows group"], moments: Float[Tensor, "blocks n n"]
) -> Float[Tensor, "*rows"]:
    """Return ``e H eᵀ`` of each group: the energy that its errors alone put out.

    Args:
        errors: Errors; the last axis shares a scale. It is ``n`` columns of a block, and the axis before it the blocks
            where there are several; or rows of ``n`` one after the other, whose energies add up. Not modified.
        moments: Second moments ``H`` of the columns of each block.

    References:
        Lin et al. 2024, AWQ, arXiv:2306.00978 (the objective of their search for clips).
    """
    blocks, n, _ = moments.shape
    by_block = errors.reshape(-1, blocks, n).transpose(0, 1)
    energy = ((by_block @ moments) * by_block).sum(-1).T
    return energy.reshape(*errors.shape[:-1], -1).sum(-1)


def search_clip(
    groups: Float[Tensor, "*rows group"],
    fit_round: FitRound,
    *,
    ratios: Sequence[float],
    norm: float = 2.4,
    weights: Float[Tensor, "*rows group"] | None = None,
    moments: Float[Tensor, "blocks n n"] | None = None,
) -> ClippedFit:
    """Choose for each group the clip ratio that minimizes ``sum_i h_i |Q(w_i) - w_i|^p``, or ``e H eᵀ``.

    1.0 is always a candidate and wins ties, so no group gets worse by its own measure. Errors are taken relative to
    the group's largest magnitude: scaling a group by a power of two scales the result, bit for bit.

    Args:
        groups: Values; the last axis shares a scale. Not modified.
        fit_round: ``fit_round(groups, ratio)`` fits parameters, as they are stored, to that fraction of the range, and
            returns them and the rounded values. It must treat each group by itself.
        ratios: Candidates, above 0; beyond 1 the range is wider than the values.
        norm: Exponent ``p``; above 2, large errors count for more.
        weights: ``h``, for example the diagonal of a Hessian, in the shape of ``groups``; None for equal weights.
        moments: ``H`` as ``quadratic_energy`` takes it; then ``norm`` and ``weights`` have no meaning.

    Returns:
        The best parameters of each group, and its ratio.

    References:
        Frantar et al. 2023, GPTQ, arXiv:2210.17323 (their released grid search, ``p = 2.4``).
    """
    piece = _PIECE if groups.device.type == "cpu" else _ACCELERATOR_PIECE
    piece = piece if moments is None else _PRODUCT_PIECE
    rows = max(1, piece * len(groups) // max(1, groups.numel()))

    found = []
    for start in range(0, len(groups), rows):
        own = None if weights is None else weights[start : start + rows]
        energy = partial(_energy, norm=norm, weights=own, moments=moments)
        found.append(_search_piece(groups[start : start + rows], fit_round, ratios, energy))
    return found[0] if len(found) == 1 else _join(found)


def _energy(errors: Tensor, *, norm: float, weights: Tensor | None, moments: Tensor | None) -> Tensor:
    """Return what ``search_clip`` minimizes, of each group; may write to the errors."""
    if moments is not None:
        return quadratic_energy(errors, moments)
    powers = errors.square_() if norm == 2 else errors.abs_().pow_(norm)
    return (powers if weights is None else powers.mul_(weights)).sum(-1)


def _search_piece(
    groups: Tensor, fit_round: FitRound, ratios: Sequence[float], energy: Callable[[Tensor], Tensor]
) -> ClippedFit:
    """Search the ratios for groups that fit in the cache; ``energy`` may write to the errors that it is given."""
    amax = groups.abs().amax(-1, keepdim=True)
    unit = amax.masked_fill(amax == 0, 1.0)
    parameters, rounded = fit_round(groups, 1.0)
    best, ratio = energy(rounded.sub(groups).div_(unit)), torch.ones_like(amax[..., 0])
    for candidate in ratios:
        if candidate == 1.0:
            continue
        tried, rounded = fit_round(groups, candidate)
        loss = energy(rounded.sub(groups).div_(unit))
        better = loss < best
        best = torch.where(better, loss, best)
        ratio = ratio.masked_fill(better, candidate)
        parameters = _choose(better, tried, parameters)
    return ClippedFit(parameters, ratio)


def _choose(where: Tensor, chosen: GroupParameters, otherwise: GroupParameters) -> GroupParameters:
    """Take a group's parameters from ``chosen`` or from ``otherwise``."""
    return combine_parameters([chosen, otherwise], lambda both: torch.where(where, both[0], both[1]))


def _join(found: Sequence[ClippedFit]) -> ClippedFit:
    """Put the pieces' results together again."""
    parameters = combine_parameters([piece.parameters for piece in found], torch.cat)
    return ClippedFit(parameters, torch.cat([piece.ratio for piece in found]))
