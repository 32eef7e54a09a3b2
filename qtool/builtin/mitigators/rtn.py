"""Round to nearest: each weight by itself, on a range that may be clipped.

The clip search is that of GPTQ's and QuaRot's released code: of 80 fractions of the range, the one with the least
``Σ |error|^2.4``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import NumericalError, ShapeError, UsageError
from qtool.numerics.clipping import ClippedFit, clip_grid, search_clip
from qtool.numerics.groups import to_groups
from qtool.numerics.losses import loss_ratio, output_energy
from qtool.scheme import GroupParameters


@dataclass(frozen=True)
class ClipOptions:
    """How the range of each group is chosen.

    Attributes:
        clip: ``none`` keeps the whole range, ``search`` the fraction with the least error.
        clip_norm: Exponent of the errors in the search.
        clip_grid: Number of fractions to try, evenly from 1.00 to 0.21.
        clip_metric: ``mse`` counts all columns alike, ``hessian`` by the diagonal of the Hessian.
    """

    clip: Literal["none", "search"] = "none"
    clip_norm: float = 2.4
    clip_grid: int = 80
    clip_metric: Literal["mse", "hessian"] = "mse"

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range, or an option would have no effect.
        """
        refuse_unknown("clip", self.clip, ("none", "search"))
        refuse_unknown("clip_metric", self.clip_metric, ("mse", "hessian"))
        if not 0 < self.clip_norm <= 16:
            raise UsageError(f"`clip_norm` is above 0 and up to 16, not {self.clip_norm}", hint="--set clip_norm=2.4")
        if not 1 <= self.clip_grid <= 99:
            raise UsageError(f"`clip_grid` is from 1 to 99 ratios, not {self.clip_grid}", hint="--set clip_grid=80")


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
    problem.scheme.groups_of(n_in, layer=problem.name)
    for what, tensor in (("weight", problem.weight), ("Hessian", problem.hessian)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NumericalError(
                f"the {what} of `{problem.name}` holds NaN or Inf",
                facts=(("values", f"{bad} of {tensor.numel()}"),),
                hint="look for layers whose activations overflow in the calibration dtype",
            )
    if problem.hessian is not None and problem.hessian.shape != (n_in, n_in):
        raise ShapeError(
            f"the Hessian of `{problem.name}` does not fit its weight",
            facts=(("weight", tuple(problem.weight.shape)), ("hessian", tuple(problem.hessian.shape))),
        )


def refuse_previous(problem: LayerProblem, method: str) -> None:
    """Refuse to throw away what a method to the left made.

    Raises:
        UsageError: There is such a result.
    """
    if problem.previous is not None:
        raise UsageError(f"`{method}` starts from the weight, so it has to come first", hint=f"--method {method}+…")


def tensor_multiplier(problem: LayerProblem) -> Float[Tensor, ""] | None:
    """Return the multiplier that the layer was given, or the one that its format makes of its weight."""
    if problem.global_scale is not None:
        return problem.global_scale
    return problem.format.global_scale(problem.weight.abs().amax(), problem.scheme)


def fit_groups(
    problem: LayerProblem,
    groups: Float[Tensor, "*rows group"],
    options: ClipOptions,
    *,
    global_scale: Float[Tensor, ""] | None,
    importance: Float[Tensor, "*rows group"] | None,
) -> ClippedFit:
    """Fit groups of weights as the clip options say.

    Args:
        problem: Names the format and the scheme.
        groups: Values; the last axis shares a scale.
        options: How to clip.
        global_scale: Tensor-level multiplier.
        importance: Weights of the values in the search, or None.

    Returns:
        Parameters and clip ratios.
    """

    def fit_round(part: Tensor, clip: float) -> tuple[GroupParameters, Tensor]:
        parameters = problem.format.fit(part, problem.scheme, global_scale=global_scale, clip=clip)
        return parameters, problem.format.round(part, parameters)

    if options.clip == "none":
        whole = problem.format.fit(groups, problem.scheme, global_scale=global_scale)
        return ClippedFit(whole, torch.ones_like(whole.scale))
    ratios = clip_grid(options.clip_grid)
    return search_clip(groups, fit_round, ratios=ratios, norm=options.clip_norm, weights=importance)


def round_nearest(problem: LayerProblem, options: ClipOptions | None = None) -> QuantizedLinear:
    """Round each weight to the nearest value of the grid.

    Args:
        problem: A checked problem.
        options: How to clip; None keeps the whole range.

    Returns:
        The codes; the report says which part of the groups was clipped.
    """
    options = options or ClipOptions()
    strategy, group_size = problem.scheme.strategy, problem.scheme.group_size
    groups = to_groups(problem.weight, strategy, group_size)
    importance = None
    if options.clip_metric == "hessian":
        diagonal = problem.need_hessian().diagonal().to(problem.weight.dtype)
        importance = to_groups(diagonal.expand_as(problem.weight), strategy, group_size)
    multiplier = tensor_multiplier(problem)
    fitted = fit_groups(problem, groups, options, global_scale=multiplier, importance=importance)
    codes = problem.format.encode(groups, fitted.parameters).reshape(problem.weight.shape)
    return QuantizedLinear(codes, fitted.parameters, report=clip_report([fitted.ratio]))


def clip_report(ratios: list[Tensor]) -> dict[str, float]:
    """Return the fraction of groups that were clipped, and the mean ratio."""
    joined = torch.cat([ratio.reshape(-1) for ratio in ratios])
    return {"clipped_fraction": float((joined < 1).float().mean()), "mean_clip": float(joined.double().mean())}


def loss_report(
    problem: LayerProblem, approximated: Float[Tensor, "out in"], nearest: Float[Tensor, "out in"] | None
) -> dict[str, float]:
    """Measure a result.

    Args:
        problem: Gives the weight, and the Hessian if there is one.
        approximated: What stands for the weight, low-rank correction included.
        nearest: The weight rounded to nearest without clipping, or None to leave that out.

    Returns:
        ``loss`` and ``loss_rtn``, ``tr(EHEᵀ) / tr(WHWᵀ)``; without a Hessian ``weight_error`` and
        ``weight_error_rtn``, the same with the identity.

    Raises:
        NumericalError: A loss is not finite.
    """
    key = "weight_error" if problem.hessian is None else "loss"
    signal = output_energy(problem.weight, problem.hessian)

    def loss(decoded: Tensor) -> float:
        return loss_ratio(output_energy(problem.weight - decoded, problem.hessian), signal)

    measured = {key: loss(approximated)}
    if nearest is not None:
        measured[f"{key}_rtn"] = measured[key] if nearest is approximated else loss(nearest)
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
        decoded = nearest.weight(problem.scheme, problem.format)
        unclipped = decoded if nearest is plain else plain.weight(problem.scheme, problem.format)
        report = {**loss_report(problem, decoded, unclipped), **nearest.report}
        return QuantizedLinear(nearest.codes, nearest.parameters, report=report)
