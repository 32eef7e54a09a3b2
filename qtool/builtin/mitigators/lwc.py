"""LWC, learnable weight clipping of OmniQuant, Shao et al. 2024, arXiv:2308.13137, section 3.1.

Each group keeps the fractions ``sigmoid(γ)`` and ``sigmoid(β)`` of the upper and the lower end of its range, and
weights are rounded to nearest in what is left; γ and β, 4 at first, are learned by Adam from the squared error of the
block's output. A symmetric group has one fraction. Where rounding on the whole range was better, that stays. Left of it
may stand ``rtn``, for what is in no block: a quantized head.

OmniQuant trains 20 epochs of single windows; here a step has several, and there are fewer. Its learnable transformation
is no part of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.builtin.mitigators.rtn import round_nearest
from qtool.builtin.mitigators.whole_blocks import LearningOptions, reported, starts_of
from qtool.engine.block_problem import BlockProblem, BlockResult
from qtool.engine.learned_block import LearnedBlock
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.engine.tuning import block_loss, judged_windows, tune, windows_run
from qtool.errors import UsageError

_FIRST_LOGIT = 4.0


@dataclass(frozen=True)
class LWCConfig(LearningOptions):
    """Options of LWC, beside those of whatever learns from blocks.

    Attributes:
        rate: Adam's step, of the logits.
    """

    steps: int = 320
    batch: int = 4
    rate: float = 1e-2

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range.
        """
        super().__post_init__()
        if not 0 < self.rate <= 1:
            raise UsageError(f"`rate` is above 0 and up to 1, not {self.rate:g}", hint="--set rate=0.01")


class LWC:
    """Learn which part of each group's range is kept."""

    version = 1
    needs: tuple[str, ...] = ("hessian",)
    starts_nearest = True
    Config = LWCConfig

    def windows_run(self, windows: int, config: LWCConfig) -> int:
        """Return how many windows run through a block, one with gradients counted three times."""
        return windows_run(config.schedule, windows) + min(config.judged, windows)

    def refine(self, block: BlockProblem, config: LWCConfig) -> BlockResult:
        """Learn one block, from rounding to nearest.

        Raises:
            NumericalError: A weight, a statistic or an output of the block is not finite.
            UsageError: A method that chose codes came first: clipping would choose them again.
        """
        starts = starts_of(block)
        if not all(_is_nearest(block.problems[name], start) for name, start in starts.items()):
            given = (
                "`lwc` rounds to nearest in the ranges that it learns, so it has to come first, or behind plain `rtn`"
            )
            raise UsageError(given, hint="--method lwc+…")
        if not config.steps:
            return BlockResult(reported(block.problems, starts, starts))
        schedule = config.schedule
        learned = _Clipping(LearnedBlock(block.problems, starts), config.rate)
        whole = {name: start.weight(block.problems[name].grid) for name, start in starts.items()}
        before = block_loss(block, whole, judged_windows(block, config.judged), schedule.token_weight)
        report = tune(block, learned, schedule)
        better = report["block_loss"] < before
        learned.weights()
        found = learned.block.quantized() if better else starts
        kept = report if better else {"block_loss": before, "best_step": 0.0}
        report = {**report, **kept, "block_loss_before": before}
        return BlockResult(reported(block.problems, found, starts), report=report)


def _is_nearest(problem: LayerProblem, start: QuantizedLinear) -> bool:
    """Say whether what clipping would start from is rounding to nearest on the whole range."""
    if problem.previous is None:
        return True
    same = torch.equal(start.weight(problem.grid), round_nearest(problem).weight(problem.grid))
    return same and start.adapter is None


class _Clipping:
    """The kept fractions of all groups, as logits, under Adam."""

    def __init__(self, block: LearnedBlock, rate: float) -> None:
        self.block = block
        self._ends: list[tuple[Tensor, Tensor]] = []
        for grid in block.grids.values():
            high = torch.full_like(grid.high, _FIRST_LOGIT).requires_grad_(True)
            apart = grid.low is not grid.high
            self._ends.append((high, torch.full_like(high, _FIRST_LOGIT).requires_grad_(True) if apart else high))
        capturable = self.leaves[0].is_cuda
        self._adam = torch.optim.Adam(self.leaves, lr=rate, capturable=capturable)

    @property
    def leaves(self) -> Sequence[Tensor]:
        """The logits, each once."""
        return list({id(end): end for ends in self._ends for end in ends}.values())

    def weights(self) -> Mapping[str, Float[Tensor, "out in"]]:
        """Return the weights rounded in the ranges as they are now."""
        for grid, (high, low) in zip(self.block.grids.values(), self._ends, strict=True):
            grid.high = torch.sigmoid(high)
            grid.low = grid.high if low is high else torch.sigmoid(low)
        weights = self.block.weights()
        for grid in self.block.grids.values():  # a graph that is kept would reach into the next step, on its stream
            high = grid.high.detach()
            grid.low = high if grid.low is grid.high else grid.low.detach()
            grid.high = high
        return weights

    def update(self, gradients: Sequence[Tensor], left: Float[Tensor, ""]) -> None:
        """Take a step of Adam; its size does not fall."""
        del left
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient
        self._adam.step()
