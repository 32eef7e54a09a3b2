"""LoRC, Yao et al. 2023, ZeroQuant-V2, arXiv:2303.08302: a low-rank correction beside the quantized weight.

The correction is the truncated SVD of the weight's error, blind to the inputs. It takes what the method to the left
made; first in line, it starts from rounding to nearest.

LQER (Zhang et al. 2024, arXiv:2402.02446) without its scales is the same correction, which is why it has no file: that
paper gives all singular values to one factor, and stores both in 8-bit MXINT. With its scales it is ``l2qer``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.builtin.mitigators.rtn import check_problem, loss_report, refuse_unknown, round_nearest
from qtool.engine.problem import Adapter, LayerProblem, QuantizedLinear
from qtool.errors import NumericalError, UsageError
from qtool.numerics.lowrank import truncated_svd

_DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

Factors = tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]


@dataclass(frozen=True)
class LoRCConfig:
    """Options of LoRC, and of every other correction in closed form.

    Attributes:
        rank: Rank of the correction.
        dtype: How its two factors are stored.
    """

    rank: int = 32
    dtype: Literal["bf16", "fp16"] = "bf16"

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range.
        """
        refuse_unknown("dtype", self.dtype, tuple(_DTYPES))
        if self.rank < 1:
            raise UsageError(f"`rank` is 1 or more, not {self.rank}", hint="--set rank=32")


class LoRC:
    """Add the rank-k part of the error to the output, from factors in 16 bits."""

    version = 1
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
        it (``weight_error`` and ``weight_error_before`` where there is no Hessian).

    Raises:
        NumericalError: The weight is not finite, or a factor overflows its storage format.
        UsageError: The rank is larger than the weight, or there is a correction already.
    """
    check_problem(problem)
    if config.rank > min(problem.weight.shape):
        raise UsageError(
            f"`{problem.name}` has no part of rank {config.rank}",
            facts=(("weight", tuple(problem.weight.shape)),),
            hint=f"--set rank={min(problem.weight.shape)}",
        )
    start = problem.previous or round_nearest(problem)
    if start.adapter is not None:
        raise UsageError(f"`{problem.name}` already has a low-rank correction", hint="--method gptq+lorc")
    decoded = start.weight(problem.grid)
    up, down = (factor.to(_DTYPES[config.dtype]) for factor in factorize(problem.weight - decoded))
    if not bool(torch.isfinite(up).all() and torch.isfinite(down).all()):
        message = f"the low-rank correction of `{problem.name}` overflows {config.dtype}"
        raise NumericalError(message, hint="--set dtype=bf16")
    measured = loss_report(problem, decoded + up.float() @ down.float(), decoded)
    key = "weight_error" if problem.hessian is None else "loss"
    before = measured[f"{key}_rtn"]
    nearest = {f"{key}_rtn": before} if problem.previous is None else {}
    losses = {key: measured[key], f"{key}_before": before, **nearest}
    report = {**start.report, **losses, "rank": float(config.rank)}
    return replace(start, adapter=Adapter(down, up), report=report)
