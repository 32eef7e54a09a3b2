"""LoRC, Yao et al. 2023, ZeroQuant-V2, arXiv:2303.08302: a low-rank correction beside the quantized weight.

The correction is the truncated SVD of the weight's error, blind to the inputs. It takes what the method to the left
made; first in line, it starts from rounding to nearest.

LQER (Zhang et al. 2024, arXiv:2402.02446) without its scales is the same correction, which is why it has no file: that
paper gives all singular values to one factor, and stores both in 8-bit MXINT. With its scales it is ``l2qer``.

LREC, low-rank error calibration of FP4 weights (JCC 2024), has no file either. Its paper could not be read; what is
told of it is this correction, or ``qera``, behind a scheme with FP4 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.builtin.mitigators.rtn import RTN, ClipOptions, check_problem, loss_report, refuse_unknown
from qtool.engine.problem import Adapter, LayerProblem, QuantizedLinear, Reads
from qtool.errors import NumericalError, UsageError
from qtool.numerics.losses import lasting
from qtool.numerics.lowrank import quantize_components, truncated_svd

_DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

Factors = tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]


@dataclass(frozen=True)
class LoRCConfig:
    """Options of LoRC, and of every other low-rank correction.

    Attributes:
        rank: Rank of the correction.
        dtype: How its two factors are stored; ``int8`` has one FP16 scale a component of each.
        reads: What the correction multiplies: the layer's ``quantized`` input, as the weight does, or the ``full`` one
            before activations are rounded. Without such rounding both are the same.
        experts: Whether linears of routed experts get one too, which costs them most bits.
    """

    rank: int = 32
    dtype: Literal["bf16", "fp16", "int8"] = "bf16"
    reads: Reads = "quantized"
    experts: bool = False

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range.
        """
        refuse_unknown("dtype", self.dtype, (*_DTYPES, "int8"))
        refuse_unknown("reads", self.reads, ("quantized", "full"))
        if self.rank < 1:
            raise UsageError(f"`rank` is 1 or more, not {self.rank}", hint="--set rank=32")

    def bytes_beside(self, rows: int, columns: int, *, expert: bool) -> int:
        """Return the bytes of the factors that the correction of a weight is stored as."""
        if expert and not self.experts:
            return 0
        if self.dtype == "int8":
            return self.rank * (rows + columns + 2 * torch.float16.itemsize)
        return self.rank * (rows + columns) * _DTYPES[self.dtype].itemsize


class LoRC:
    """Add the rank-k part of the error to the output, from factors in 16 or 8 bits."""

    version = 4
    needs: tuple[str, ...] = ()
    Config = LoRCConfig

    def quantize(self, problem: LayerProblem, config: LoRCConfig) -> QuantizedLinear:
        """Correct one layer.

        Raises:
            NumericalError: The weight is not finite, or a factor overflows its storage format.
            UsageError: The rank is larger than the weight, or there is a correction already.
        """
        return add_correction(problem, config, lambda error: truncated_svd(error, config.rank, seed=problem.seed))


def add_correction(
    problem: LayerProblem, config: LoRCConfig, factorize: Callable[[Float[Tensor, "out in"]], Factors]
) -> QuantizedLinear:
    """Put a low-rank correction beside what the method to the left made, or beside the weight rounded to nearest.

    Args:
        problem: One layer.
        config: Rank and storage of the correction.
        factorize: Returns the factors ``up`` and ``down`` for the error ``W - Ŵ``, with ``config.rank`` components.

    Returns:
        The codes as they were, with the correction. The report says the ``loss`` with it and ``loss_before`` without
        it (``weight_error`` and ``weight_error_before`` where there is no Hessian). An expert that is to have none
        stays as it was.

    Raises:
        NumericalError: The weight is not finite, or a factor overflows its storage format.
        UsageError: The rank is larger than the weight, or there is a correction already.
    """
    if is_left_out(problem, config):
        return problem.previous or RTN().quantize(problem, ClipOptions())
    check_correction(problem, config)
    start = problem.previous or RTN().quantize(problem, ClipOptions())
    if start.adapter is not None:
        raise UsageError(
            f"`{problem.name}` already has a low-rank correction", hint="one correction alone: --method gptq+qera"
        )
    decoded = start.weight(problem.grid)
    adapter = stored_adapter(problem, config, factorize(problem.weight - decoded))
    return with_adapter(problem, start, adapter, before=decoded)


def is_left_out(problem: LayerProblem, config: LoRCConfig) -> bool:
    """Say whether a layer gets no correction, as it belongs to a routed expert."""
    return problem.expert and not config.experts


def check_correction(problem: LayerProblem, config: LoRCConfig) -> None:
    """Refuse a problem that no correction can be of.

    Raises:
        NumericalError: The weight or the Hessian is not finite.
        UsageError: The rank is larger than the weight.
    """
    check_problem(problem)
    if config.rank > min(problem.weight.shape):
        raise UsageError(
            f"`{problem.name}` has no part of rank {config.rank}",
            facts=(("weight", tuple(problem.weight.shape)),),
            hint=f"--set rank={min(problem.weight.shape)}",
        )


def stored_adapter(problem: LayerProblem, config: LoRCConfig, factors: Factors) -> Adapter:
    """Return ``up`` and ``down`` as they are stored.

    Raises:
        NumericalError: A factor overflows its storage format.
    """
    return checked_adapter(problem, config, rounded_adapter(config, factors))


def rounded_adapter(config: LoRCConfig, factors: Factors) -> Adapter:
    """Return ``up`` and ``down`` rounded as they are stored; what overflows is infinite."""
    up, down = factors
    if config.dtype != "int8":
        return Adapter(down.to(_DTYPES[config.dtype]), up.to(_DTYPES[config.dtype]), reads=config.reads)
    (down, down_scale), (rows, up_scale) = quantize_components(down), quantize_components(up.T)
    return Adapter(down, rows.T.contiguous(), down_scale, up_scale, reads=config.reads)


def checked_adapter(problem: LayerProblem, config: LoRCConfig, adapter: Adapter) -> Adapter:
    """Return a correction whose values are all finite.

    Raises:
        NumericalError: A factor overflows its storage format.
    """
    values = [one for one in (adapter.down_scale, adapter.up_scale) if one is not None] or [adapter.down, adapter.up]
    if not bool(torch.stack([torch.isfinite(one).all() for one in values]).all()):
        message = f"the low-rank correction of `{problem.name}` overflows {config.dtype}"
        raise NumericalError(message, hint="--set dtype=bf16")
    return adapter


def with_adapter(
    problem: LayerProblem, solved: QuantizedLinear, adapter: Adapter, *, before: Float[Tensor, "out in"]
) -> QuantizedLinear:
    """Put a correction beside codes, and report what both lose, and what stood for the weight ``before`` lost."""
    corrected = loss_report(problem, solved.weight(problem.grid) + adapter.product(), None)
    started = {f"{key}_before": loss for key, loss in loss_report(problem, before, None).items()}
    report = {**lasting(solved.report), **corrected, **started, "rank": float(len(adapter.down))}
    return replace(solved, adapter=adapter, report=report)
