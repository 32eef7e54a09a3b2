"""Round to nearest: each weight by itself, on a range that may be clipped.

The clip search is that of GPTQ's and QuaRot's released code: of 80 fractions of the range, the one with the least
``Σ |error|^2.4``. AWQ's (Lin et al. 2024, arXiv:2306.00978), which looks at the layer's output, is
``clip_metric=output clip_grid=10 clip_floor=0.55``; its code leaves q and k as they are, this one does not. For NVFP4
``clip_ceiling=1.75`` sweeps scales above that of the range as well (ScaleSweep 2026, arXiv:2606.07618).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from qtool.engine.grid import GlobalScales, GridPart
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import NumericalError, ShapeError, UsageError
from qtool.model.statistics import BLOCKS
from qtool.numerics.clipping import ClippedFit, clip_grid, search_clip
from qtool.numerics.groups import from_groups
from qtool.numerics.losses import loss_ratio, output_energy
from qtool.scheme import GroupParameters


@dataclass(frozen=True)
class ClipOptions:
    """How the range of each group is chosen.

    Attributes:
        clip: ``none`` keeps the range that the scheme keeps, ``search`` the fraction of it with the least error.
        clip_norm: Exponent of the errors in the search, except by the metric ``output``, which is of squares.
        clip_grid: Number of fractions to try, evenly from ``clip_ceiling`` to ``clip_floor``.
        clip_metric: ``mse`` counts all columns alike, ``hessian`` by the diagonal of the Hessian, ``output`` the errors
            of a group together, by their part of the Hessian: what they alone change in the layer's output.
        clip_floor: The least fraction to try.
        clip_ceiling: The largest: above 1, scales that are larger than the range asks for, which suits FP4. The whole
            range itself is always tried.
    """

    clip: Literal["none", "search"] = "none"
    clip_norm: float = 2.4
    clip_grid: int = 80
    clip_metric: Literal["mse", "hessian", "output"] = "mse"
    clip_floor: float = 0.21
    clip_ceiling: float = 1.0

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that the options ask for: of the Hessian no more than what lies in one group."""
        return ("hessian_blocks",) if self.clip == "search" and self.clip_metric != "mse" else ()

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or an option would have no effect.
        """
        refuse_unknown("clip", self.clip, ("none", "search"))
        refuse_unknown("clip_metric", self.clip_metric, ("mse", "hessian", "output"))
        if not 0 < self.clip_norm <= 16:
            raise UsageError(f"`clip_norm` is above 0 and up to 16, not {self.clip_norm}", hint="--set clip_norm=2.4")
        if not 1 <= self.clip_grid <= 99:
            raise UsageError(f"`clip_grid` is from 1 to 99 ratios, not {self.clip_grid}", hint="--set clip_grid=80")
        if not 0.01 <= self.clip_floor <= 1:
            raise UsageError(f"`clip_floor` is from 0.01 to 1, not {self.clip_floor}", hint="--set clip_floor=0.5")
        if not 1 <= self.clip_ceiling <= 4:
            raise UsageError(f"`clip_ceiling` is from 1 to 4, not {self.clip_ceiling}", hint="--set clip_ceiling=1.75")
        if self.clip_metric == "output" and self.clip_norm not in (2.0, type(self).clip_norm):
            raise UsageError("`clip_norm` has no effect on the metric `output`", hint="leave `clip_norm` out")


def refuse_unknown(option: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that an option does not have.

    Raises:
        UsageError: The value is not known.
    """
    if value not in known:
        raise UsageError(
            f"`{option}` has no value `{value}`",
            facts=(("known", ", ".join(known)),),
            hint=f"--set {option}={known[0]}",
        )


def check_problem(problem: LayerProblem) -> None:
    """Refuse a problem that no method can solve.

    Raises:
        NumericalError: The weight or the Hessian holds NaN or Inf.
        ShapeError: The Hessian does not fit the weight.
        SchemeError: The group size does not divide the input axis.
    """
    n_in = problem.weight.shape[1]
    problem.grid.check(n_in, layer=problem.name)
    blocks = problem.entries.get(BLOCKS)
    for what, tensor in (("weight", problem.weight), ("Hessian", problem.hessian), ("Hessian", blocks)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NumericalError(
                f"the {what} of `{problem.name}` holds NaN or Inf",
                facts=(("values", f"{bad} of {tensor.numel()}"),),
                hint="look for layers whose activations overflow in the calibration dtype",
            )
    for name, moments in (("hessian", problem.hessian), (BLOCKS, blocks)):
        if moments is None:
            continue
        *count, rows, columns = moments.shape
        if rows != columns or math.prod(count) * rows != n_in:
            raise ShapeError(
                f"the Hessian of `{problem.name}` does not fit its weight",
                facts=(("weight", tuple(problem.weight.shape)), (name, tuple(moments.shape))),
            )


def refuse_previous(problem: LayerProblem, method: str) -> None:
    """Refuse to throw away what a method to the left made.

    Raises:
        UsageError: There is such a result.
    """
    if problem.previous is not None:
        hint = f"--method {method}+…, {method} once"
        raise UsageError(f"`{method}` starts from the weight, so it has to come first", hint=hint)


def tensor_multipliers(problem: LayerProblem) -> GlobalScales:
    """Return the multipliers that the layer was given, or those that the formats of its parts make of its weight.

    They leave no headroom for what updates add before scales are chosen anew: a tenth more lowers the layer loss of
    NVFP4 by 2 % without a clip search, and raises it by 2 % with one (20 random layers of 32 x 64,
    ``parameters=fresh``).
    """
    return problem.global_scales or problem.grid.global_scales(problem.weight.abs().amax(0))


def fit_groups(
    part: GridPart,
    groups: Float[Tensor, "*rows group"],
    options: ClipOptions,
    *,
    global_scale: Float[Tensor, ""] | None,
    moments: Float[Tensor, "blocks size size"] | None,
) -> ClippedFit:
    """Fit groups of weights as the clip options say.

    The search looks at scales before they become codes, which depend on the ranges of other rows.

    Args:
        part: What the groups are of.
        groups: Values; the last axis shares a scale.
        options: How to clip.
        global_scale: Tensor-level multiplier.
        moments: What ``clip_moments`` returns of the columns that the groups are made of.

    Returns:
        Parameters and clip ratios.
    """
    if options.clip == "none":
        whole = part.fit(groups, global_scale=global_scale)
        return ClippedFit(whole, torch.ones_like(whole.scale))
    fit_round, together = partial(_fit_round, part.each_group, global_scale), part.together
    weights = None
    if moments is not None and options.clip_metric == "hessian":
        diagonal = moments.flatten().to(groups.dtype)
        n_in = len(diagonal)
        if part.block_rows > 1:  # the last group may be filled up
            n_in = groups[0].numel()
            diagonal = pad(diagonal, (0, n_in - len(diagonal)))
        weights = together(diagonal.expand(groups.numel() // n_in, n_in).reshape(groups.shape))
        moments = None
    elif moments is not None:
        moments = moments.to(groups.dtype)
    ratios = clip_grid(options.clip_grid, options.clip_floor, options.clip_ceiling)
    found = search_clip(
        together(groups), fit_round, ratios=ratios, norm=options.clip_norm, weights=weights, moments=moments
    )
    parameters = part.stored(groups, part.a_row_each(found.parameters, len(groups)))
    return ClippedFit(parameters, part.repeated(found.ratio, len(groups)))


def clip_moments(
    part: GridPart, columns: slice, options: ClipOptions, blocks: Callable[[slice, int], Float[Tensor, "groups n n"]]
) -> Float[Tensor, "groups n n"] | None:
    """Return the part of a Hessian that the clip options look at: each channel by itself, or each group.

    Args:
        part: What the columns belong to.
        columns: Whose groups are fitted.
        options: How to clip.
        blocks: Returns diagonal blocks of a size, of columns.

    Raises:
        UsageError: The metric `output`, for blocks of several rows.
    """
    if not options.needs:
        return None
    if options.clip_metric == "hessian":
        return blocks(columns, 1)
    if part.block_rows > 1:
        raise UsageError(
            "the metric `output` is for groups of single rows, and these scales are of blocks",
            facts=(("scheme", part.scheme),),
            hint="--set clip_metric=hessian",
        )
    return blocks(columns, part.scheme.group_size or columns.stop - columns.start)


def round_nearest(problem: LayerProblem, options: ClipOptions | None = None) -> QuantizedLinear:
    """Round each weight to the nearest value of the grid.

    Args:
        problem: A checked problem.
        options: How to clip; None keeps the range that the scheme keeps.

    Returns:
        The codes; the report says which part of the groups was clipped.
    """
    options = options or ClipOptions()
    codes, found = [], []
    places = problem.grid.places(problem.weight.shape[1])
    for (columns, part), multiplier in zip(places, tensor_multipliers(problem), strict=True):
        values = problem.weight[:, columns]
        groups = part.groups(values)
        moments = clip_moments(part, columns, options, problem.need_blocks)
        found.append(fit_groups(part, groups, options, global_scale=multiplier, moments=moments))
        codes.append(from_groups(part.format.encode(groups, found[-1].parameters), values.shape))
    joined = codes[0] if len(codes) == 1 else torch.cat(codes, dim=1)
    parameters = tuple(one.parameters for one in found)
    return QuantizedLinear(joined, parameters, report=clip_report([one.ratio for one in found]))


def clip_report(ratios: list[Tensor]) -> dict[str, float]:
    """Return the fraction of groups that were clipped, and the mean ratio."""
    joined = torch.cat([ratio.reshape(-1) for ratio in ratios])
    return {"clipped_fraction": float((joined < 1).float().mean()), "mean_clip": float(joined.double().mean())}


def _fit_round(
    part: GridPart, global_scale: Tensor | None, values: Tensor, clip: float
) -> tuple[GroupParameters, Tensor]:
    """Fit each group to a fraction of its range; return its parameters and the rounded values."""
    parameters = part.fit_each(values, global_scale=global_scale, clip=clip)
    return parameters, part.format.round(values, parameters)


def loss_report(
    problem: LayerProblem, approximated: Float[Tensor, "out in"], nearest: Float[Tensor, "out in"] | None
) -> dict[str, float]:
    """Measure a result.

    Args:
        problem: Gives the weight, and the Hessian if there is one.
        approximated: What stands for the weight, low-rank correction included.
        nearest: The weight rounded to nearest on the range that the scheme keeps, or None to leave that out.

    Returns:
        ``loss`` and ``loss_rtn``, ``tr(EHEᵀ) / tr(WHWᵀ)``; without a Hessian ``weight_error`` and
        ``weight_error_rtn``, the same with the identity.

    Raises:
        NumericalError: A loss is not finite.
    """
    key = "weight_error" if problem.hessian is None else "loss"
    signal = output_energy(problem.weight, problem.hessian)

    measured = {key: loss_ratio(output_energy(problem.weight - approximated, problem.hessian), signal)}
    if nearest is approximated:
        measured[f"{key}_rtn"] = measured[key]
    elif nearest is not None:
        measured[f"{key}_rtn"] = loss_ratio(output_energy(problem.weight - nearest, problem.hessian), signal)
    if not all(math.isfinite(value) for value in measured.values()):
        raise NumericalError(
            f"the loss of `{problem.name}` is not finite",
            facts=tuple(measured.items()),
            hint="look for weights and activations so large that their squares overflow",
        )
    return measured


class RTN:
    """Round to nearest."""

    version = 1
    needs: tuple[str, ...] = ()
    Config = ClipOptions

    def quantize(self, problem: LayerProblem, config: ClipOptions) -> QuantizedLinear:
        """Round one layer's weight.

        Raises:
            NumericalError: The weight or the Hessian is not finite.
            UsageError: Another method came first, or the search needs a Hessian that was not gathered.
        """
        refuse_previous(problem, "rtn")
        check_problem(problem)
        nearest = plain = round_nearest(problem)
        if config.clip == "search":
            nearest = round_nearest(problem, config)
        decoded = nearest.weight(problem.grid)
        unclipped = decoded if nearest is plain else plain.weight(problem.grid)
        report = {**loss_report(problem, decoded, unclipped), **nearest.report}
        return QuantizedLinear(nearest.codes, nearest.parameters, report=report)
