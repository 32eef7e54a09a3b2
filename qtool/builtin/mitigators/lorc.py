"""LoRC, Yao et al. 2023, ZeroQuant-V2, arXiv:2303.08302: a low-rank correction beside the quantized weight.

The correction is the truncated SVD of the weight's error, blind to the inputs. It takes what the method to the left
made; first in line, it starts from rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from qtool.builtin.mitigators.rtn import check_problem, loss_report, refuse_unknown, round_nearest
from qtool.engine.problem import Adapter, LayerProblem, QuantizedLinear
from qtool.errors import NumericalError, UsageError
from qtool.numerics.lowrank import truncated_svd

_DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LoRCConfig:
    """Options of LoRC.

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
        up, down = (
            factor.to(_DTYPES[config.dtype])
            for factor in truncated_svd(problem.weight - decoded, config.rank, seed=problem.seed)
        )
        if not bool(torch.isfinite(up).all() and torch.isfinite(down).all()):
            message = f"the low-rank correction of `{problem.name}` overflows {config.dtype}"
            raise NumericalError(message, hint="--set dtype=bf16")
        corrected = decoded + up.float() @ down.float()
        measured = loss_report(problem, corrected, decoded if problem.previous is None else None)
        report = {**start.report, **measured, "rank": float(config.rank)}
        return replace(start, adapter=Adapter(down, up), report=report)
