"""AutoRound, Cheng et al. 2023, SignRound, arXiv:2309.05516: rounding learned from the output of each block.

Each weight has an offset that decides between the levels beside it, and each group a factor for both ends of its
range. Signed gradient descent on the squared error of the block's output, with a step that falls to 0, moves both.
Inputs are those of the model quantized so far, targets those in full precision, and what the block rounds when it is
executed it rounds here.

Left of it may stand a method that made codes (``gptq+autoround``): then offsets are counted from those. Without one it
starts from rounding to nearest. Added: the best step is chosen by windows that are the same every time, not by the loss
of the batch that a step happened to have; errors may be weighed by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from qtool.builtin.mitigators.whole_blocks import LearningOptions, reported, starts_of
from qtool.engine.block_problem import BlockProblem, BlockResult
from qtool.engine.learned_block import LearnedBlock
from qtool.engine.tuning import tune, windows_run
from qtool.errors import UsageError
from qtool.numerics.learned_grid import LearnedGrid

_LEAST_RANGE = 0.01


@dataclass(frozen=True)
class AutoRoundConfig(LearningOptions):
    """Options of AutoRound, beside those of whatever learns from blocks.

    Attributes:
        rate: First step of an offset, in levels; 0 stands for ``2 reach / steps``, with which offsets just get there.
        range_rate: First step of a range's factor; 0 stands for ``1 / steps``.
        learn_ranges: Whether ranges are learned beside the rounding.
        widest: Largest factor of a range.
        reach: Largest offset, in levels: beyond 1/2, weights may go further than to the two levels beside them. 0
            stands for 1/2 where levels are evenly spaced, and for 1 where they are not (measured in
            ``recipes/README.md``).
    """

    rate: float = 0.0
    range_rate: float = 0.0
    learn_ranges: bool = True
    widest: float = 1.0
    reach: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range.
        """
        super().__post_init__()
        for name, rate in (("rate", self.rate), ("range_rate", self.range_rate)):
            if not 0 <= rate <= 1:
                raise UsageError(f"`{name}` is from 0 to 1, not {rate:g}", hint=f"leave `{name}` out")
        if not 1 <= self.widest <= 4:
            raise UsageError(f"`widest` is from 1 to 4, not {self.widest:g}", hint="--set widest=1")
        if not 0 <= self.reach <= 2:
            raise UsageError(f"`reach` is from 0 to 2 levels, not {self.reach:g}", hint="leave `reach` out")


class AutoRound:
    """Learn rounding and ranges by signed gradient descent on a block's output."""

    version = 1
    needs: tuple[str, ...] = ("hessian",)
    Config = AutoRoundConfig

    def windows_run(self, windows: int, config: AutoRoundConfig) -> int:
        """Return how many windows run through a block, one with gradients counted three times."""
        return windows_run(config.schedule, windows)

    def refine(self, block: BlockProblem, config: AutoRoundConfig) -> BlockResult:
        """Learn one block.

        Raises:
            NumericalError: A weight, a statistic or an output of the block is not finite.
            SchemeError: Rows share scales, or scales are codes, which are not learned.
        """
        starts = starts_of(block)
        learned = _Rounding(LearnedBlock(block.problems, starts), config)
        report = tune(block, learned, config.schedule)
        found = learned.block.quantized() if report["best_step"] else starts
        return BlockResult(reported(block.problems, found, starts), report=report)


class _Rounding:
    """Offsets and ranges under signed gradient descent."""

    def __init__(self, block: LearnedBlock, config: AutoRoundConfig) -> None:
        self.block, self.steps = block, [step for grid in block.grids.values() for step in _steps(grid, config)]
        for leaf in self.leaves:
            leaf.requires_grad_(True)

    @property
    def leaves(self) -> list[Tensor]:
        """Offsets and factors of all grids, in the order in which ``update`` takes their gradients."""
        return [step.leaf for step in self.steps]

    def weights(self) -> Mapping[str, Tensor]:
        """Return what stands for each weight."""
        return self.block.weights()

    def update(self, gradients: Sequence[Tensor], left: Float[Tensor, ""]) -> None:
        """Move everything against the sign of its gradient."""
        for step, gradient in zip(self.steps, gradients, strict=True):
            step.leaf.sub_(gradient.sign() * (left * step.rate)).clamp_(step.least, step.most)


@dataclass(frozen=True)
class _Step:
    """A tensor that is learned, its first step, and its limits."""

    leaf: Tensor
    rate: float
    least: float
    most: float


def _steps(grid: LearnedGrid, config: AutoRoundConfig) -> Iterator[_Step]:
    """Yield what is learned of a grid: offsets, then the factors of each end of the ranges."""
    gaps, steps = grid.groups.levels.values.diff(), max(config.steps, 1)
    reach = config.reach or (0.5 if bool((gaps == gaps[0]).all()) else 1.0)
    yield _Step(grid.offset, config.rate or 2 * reach / steps, -reach, reach)
    if config.learn_ranges:
        for end in (grid.high,) if grid.low is grid.high else (grid.high, grid.low):
            yield _Step(end, config.range_rate or 1 / steps, _LEAST_RANGE, config.widest)
