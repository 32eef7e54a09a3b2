"""AutoRound, Cheng et al. 2023, SignRound, arXiv:2309.05516: rounding learned from the output of each block.

Each weight has an offset in [-1/2, 1/2] that decides between the two levels beside it, and each group a factor for
both ends of its range. Signed gradient descent on the squared error of the block's output, with a step that falls to 0,
moves both. Inputs are those of the model quantized so far, targets those in full precision, and what the block rounds
when it is executed it rounds here.

Left of it may stand a method that made codes (``gptq+autoround``): then offsets are counted from those. Without one it
starts from rounding to nearest. Added: the best step is chosen by windows that are the same every time, not by the loss
of the batch that a step happened to have; errors may be weighed by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from jaxtyping import Float
from torch import Tensor

from qtool.builtin.mitigators.rtn import check_problem, loss_report, round_nearest
from qtool.engine.block_problem import BlockProblem, BlockResult
from qtool.engine.learned_block import LearnedBlock
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.engine.tuning import Schedule, tune
from qtool.errors import UsageError
from qtool.numerics.learned_grid import LearnedGrid
from qtool.numerics.token_weights import parse_token_weight

_LEAST_RANGE = 0.01


@dataclass(frozen=True)
class AutoRoundConfig:
    """Options of AutoRound.

    Attributes:
        steps: Steps of descent a block; 0 leaves everything as it was.
        batch: Windows to a step.
        rate: First step of an offset, in levels; 0 stands for ``1 / steps``.
        range_rate: First step of a range's factor; 0 stands for ``rate``.
        learn_ranges: Whether ranges are learned beside the rounding.
        widest: Largest factor of a range.
        judged: Windows by which the best step is chosen.
        loss_weight: How much the error of a token counts, by the norm of the block's output for it: as
            ``--token-weight``.
    """

    steps: int = 200
    batch: int = 8
    rate: float = 0.0
    range_rate: float = 0.0
    learn_ranges: bool = True
    widest: float = 1.0
    judged: int = 16
    loss_weight: str = "uniform"

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range.
        """
        if self.steps < 0:
            raise UsageError(f"`steps` is 0 or more, not {self.steps}", hint="--set steps=200")
        for name, value, default in (("batch", self.batch, 8), ("judged", self.judged, 16)):
            if value < 1:
                raise UsageError(f"`{name}` is a number of windows, not {value}", hint=f"--set {name}={default}")
        for name, rate in (("rate", self.rate), ("range_rate", self.range_rate)):
            if not 0 <= rate <= 1:
                raise UsageError(f"`{name}` is from 0 to 1, not {rate:g}", hint=f"leave `{name}` out")
        if not 1 <= self.widest <= 4:
            raise UsageError(f"`widest` is from 1 to 4, not {self.widest:g}", hint="--set widest=1")
        parse_token_weight(self.loss_weight)


class AutoRound:
    """Learn rounding and ranges by signed gradient descent on a block's output."""

    version = 1
    needs: tuple[str, ...] = ("hessian",)
    Config = AutoRoundConfig

    def refine(self, block: BlockProblem, config: AutoRoundConfig) -> BlockResult:
        """Learn one block.

        Raises:
            NumericalError: A weight, a statistic or an output of the block is not finite.
        """
        starts = starts_of(block)
        learned = _Rounding(LearnedBlock(block.problems, starts), config)
        schedule = Schedule(
            config.steps, config.batch, config.judged, token_weight=parse_token_weight(config.loss_weight)
        )
        report = tune(block, learned, schedule)
        found = learned.block.quantized() if report["best_step"] else starts
        return BlockResult(reported(block.problems, found, starts), report=report)


def starts_of(block: BlockProblem) -> dict[str, QuantizedLinear]:
    """Return what the method to the left made of each linear, or its weight rounded to nearest."""
    starts = {}
    for name, problem in block.problems.items():
        check_problem(problem)
        starts[name] = problem.previous or round_nearest(problem)
    return starts


def reported(
    problems: Mapping[str, LayerProblem], found: Mapping[str, QuantizedLinear], starts: Mapping[str, QuantizedLinear]
) -> dict[str, QuantizedLinear]:
    """Return quantized linears with their losses, and those that they had at the start."""
    results = {}
    for name, problem in problems.items():
        told = "loss_rtn" in starts[name].report
        nearest = None if told else round_nearest(problem).weight(problem.grid)
        losses = loss_report(problem, _stands(found[name], problem), nearest)
        before = loss_report(problem, _stands(starts[name], problem), None)
        changed = float((found[name].codes != starts[name].codes).double().mean())
        report = {
            **starts[name].report,
            **losses,
            **{f"{key}_before": value for key, value in before.items()},
            "changed_fraction": changed,
        }
        results[name] = replace(found[name], report=report)
    return results


def _stands(linear: QuantizedLinear, problem: LayerProblem) -> Float[Tensor, "out in"]:
    """Return what stands for a weight, low-rank correction included."""
    decoded = linear.weight(problem.grid)
    return decoded if linear.adapter is None else decoded + linear.adapter.product()


class _Rounding:
    """Offsets and ranges under signed gradient descent."""

    def __init__(self, block: LearnedBlock, config: AutoRoundConfig) -> None:
        self.block, self.widest = block, config.widest
        self.rate = config.rate or 1 / max(config.steps, 1)
        self.range_rate = config.range_rate or self.rate
        self.with_ranges = config.learn_ranges
        for leaf in self.leaves:
            leaf.requires_grad_(True)

    @property
    def leaves(self) -> list[Tensor]:
        """Offsets and factors of all grids, in the order in which ``update`` takes their gradients."""
        return list(chain.from_iterable(self._of(grid) for grid in self.block.grids.values()))

    def _of(self, grid: LearnedGrid) -> Iterator[Tensor]:
        yield grid.offset
        if self.with_ranges:
            yield grid.high
            if grid.low is not grid.high:
                yield grid.low

    def weights(self) -> Mapping[str, Tensor]:
        """Return what stands for each weight."""
        return self.block.weights()

    def update(self, gradients: Sequence[Tensor], left: Float[Tensor, ""]) -> None:
        """Move everything against the sign of its gradient."""
        offsets = {id(grid.offset) for grid in self.block.grids.values()}
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            if id(leaf) in offsets:
                leaf.sub_(gradient.sign() * (left * self.rate)).clamp_(-0.5, 0.5)
            else:
                leaf.sub_(gradient.sign() * (left * self.range_rate)).clamp_(_LEAST_RANGE, self.widest)
