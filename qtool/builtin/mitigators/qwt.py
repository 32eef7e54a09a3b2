"""QwT, quantization without tears, Fu et al. 2025, arXiv:2411.13918: a linear layer behind each block makes up for it.

To the output of a quantized block is added ``M x + b`` of the block's input ``x``, with ``M`` and ``b`` the ridge
regression of what the output lacks, ``Y_f - Y_q``, on ``x``, block after block. ``form`` is ``full``; ``low-rank``, the
regression of least error at that rank; or ``affine``, a factor and a shift for each channel of the output as in QwT-v2,
Tang et al. 2025, arXiv:2505.20932. The paper's is ``full``; the default is ``low-rank``, which costs as little as an
adapter. Nothing is added where it would not lower the squared error on held-out windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from qtool.builtin.mitigators.rtn import refuse_unknown
from qtool.builtin.mitigators.whole_blocks import reported, starts_of
from qtool.engine.block_problem import BlockProblem, BlockResult, Compensation
from qtool.errors import NumericalError, UsageError
from qtool.numerics.regression import Moments, affine_fit, low_rank_fit

_HELD_OUT_SHARE = 8


@dataclass(frozen=True)
class QwTConfig:
    """Options of QwT.

    Attributes:
        form: What ``M`` is.
        rank: Of ``M``, for ``low-rank``.
        ridge: Added to the second moments of the input, as a fraction of their mean.
        batch: Windows that run at once.
    """

    form: Literal["full", "low-rank", "affine"] = "low-rank"
    rank: int = 32
    ridge: float = 0.01
    batch: int = 8

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range.
        """
        refuse_unknown("form", self.form, ("full", "low-rank", "affine"))
        if self.rank < 1:
            raise UsageError(f"`rank` is 1 or more, not {self.rank}", hint="--set rank=32")
        if not 0 <= self.ridge <= 10:
            raise UsageError(f"`ridge` is from 0 to 10, not {self.ridge:g}", hint="--set ridge=0.01")
        if self.batch < 1:
            raise UsageError(f"`batch` is a number of windows, not {self.batch}", hint="--set batch=8")


class QwT:
    """Add to a block's output what a linear function of its input knows to be missing."""

    version = 1
    needs: tuple[str, ...] = ("hessian",)
    Config = QwTConfig

    def windows_run(self, windows: int, config: QwTConfig) -> int:
        """Return how many windows run through a block: each once, to learn from or to judge by."""
        del config
        return windows

    def refine(self, block: BlockProblem, config: QwTConfig) -> BlockResult:
        """Compensate one block; the report has the error on held-out windows before and after.

        Raises:
            NumericalError: A weight, a statistic or an output of the block is not finite.
            UsageError: The rank is larger than the hidden size.
        """
        starts = starts_of(block)
        weights = {name: start.weight(block.problems[name].grid) for name, start in starts.items()}
        held = max(1, block.windows // _HELD_OUT_SHARE) if block.windows > 1 else 0
        learned, judged = range(block.windows - held), range(block.windows - held, block.windows)
        compensation = self._fitted(self._moments(block, weights, learned, config), config)
        moments = self._moments(block, weights, judged or learned, config)
        nothing = torch.zeros_like(moments.sum_inputs)
        before = moments.error(torch.zeros_like(moments.inputs), nothing)
        after = moments.error(compensation.matrix(), compensation.bias)
        kept = compensation if after < before else None
        report = {"block_loss_before": before, "block_loss": min(before, after)}
        return BlockResult(reported(block.problems, starts, starts), kept, report)

    def _moments(self, block: BlockProblem, weights: dict[str, Tensor], rows: range, config: QwTConfig) -> Moments:
        """Gather what the block reads, or for factors what it puts out, beside what the outputs lack."""
        moments: Moments | None = None
        of_output = config.form == "affine"
        with torch.no_grad():
            for start in range(0, len(rows), config.batch):
                some = rows[start : start + config.batch]
                inputs, targets = block.inputs(some), block.targets(some)
                outputs = block.forward(weights, inputs)
                lacking = (targets.float() - outputs.float()).flatten(0, -2)
                moments = moments or Moments.empty(inputs.shape[-1], inputs.device)
                known = outputs if of_output else inputs
                moments.add(known.float().flatten(0, -2), lacking, targets.float().flatten(0, -2))
        if moments is None:
            raise UsageError("`qwt` needs windows to learn from", hint="qtool calibrate MODEL --num-samples 128")
        if not isfinite(moments.lacking + moments.energy + float(moments.inputs.trace())):
            raise NumericalError(
                f"the outputs of block {block.layer} are not finite", hint="run the model in float32: --dtype float32"
            )
        return moments

    def _fitted(self, moments: Moments, config: QwTConfig) -> Compensation:
        if config.form == "affine":
            scale, bias = affine_fit(moments, config.ridge)
            return Compensation(bias.bfloat16(), scale=scale.bfloat16())
        width = len(moments.inputs)
        if config.form == "low-rank" and config.rank > width:
            raise UsageError(f"`rank` is {width} at most, the hidden size", hint=f"--set rank={width}")
        rank = config.rank if config.form == "low-rank" else width
        up, down, bias = low_rank_fit(moments, rank, config.ridge)
        if config.form == "full":
            return Compensation(bias.bfloat16(), down=(up @ down).bfloat16())
        return Compensation(bias.bfloat16(), down=down.bfloat16(), up=up.bfloat16())
