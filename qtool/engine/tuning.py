"""Gradient descent on what a block puts out: batches, the judged loss, the best step, and replay on a GPU.

On CUDA, where a pass always does the same operations, a step is recorded once and replayed: blocks of small models are
bound by the launch of kernels otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.block_problem import BlockProblem
from qtool.errors import NumericalError
from qtool.numerics.replay import Replayed
from qtool.numerics.token_weights import UNIFORM, TokenWeight

_JUDGED_AT_ONCE = 8


@runtime_checkable
class Tuned(Protocol):
    """What is learned of a block."""

    @property
    def leaves(self) -> Sequence[Tensor]:
        """The tensors that are learned; they require gradients and are changed in place."""

    def weights(self) -> Mapping[str, Tensor]:
        """Return the weight of each linear, by full name, differentiable in the leaves."""

    def update(self, gradients: Sequence[Tensor], left: Float[Tensor, ""]) -> None:
        """Take a step, in place.

        Args:
            gradients: Of the loss, one a leaf.
            left: Which part of the steps is still to come, from 1 to 0, on the device of the leaves.
        """


@dataclass(frozen=True)
class Schedule:
    """How long to learn, and from what.

    Attributes:
        steps: Number of steps.
        batch: Windows to a step.
        judged: Windows by which the best step is chosen.
        judgements: How often that is done, the start not counted.
        token_weight: How much the error of each token counts, by the norm of what the block puts out for it.
    """

    steps: int
    batch: int
    judged: int = 16
    judgements: int = 10
    token_weight: TokenWeight = UNIFORM


def windows_run(schedule: Schedule, windows: int) -> int:
    """Return how many windows run through a block, one with gradients counted three times."""
    judged = min(schedule.judged, windows) * (1 + min(schedule.judgements, schedule.steps))
    return 3 * schedule.steps * min(schedule.batch, windows) + judged


def tune(block: BlockProblem, tuned: Tuned, schedule: Schedule) -> dict[str, float]:
    """Learn, and leave the leaves as they were when the judged loss was lowest: at the start, if nothing was lower.

    Args:
        block: The block.
        tuned: What is learned; its leaves are modified.
        schedule: How long.

    Returns:
        ``block_loss_before``, ``block_loss`` (squared error of the judged outputs over their energy) and ``best_step``.

    Raises:
        NumericalError: The loss is not finite at the start.
    """
    leaves = tuned.leaves
    lowest = before = _judge(block, tuned, schedule)
    best, best_step = [leaf.detach().clone() for leaf in leaves], 0
    if schedule.steps:
        batch = min(schedule.batch, block.windows)
        step = _Step(block, tuned, schedule, batch)
        every = max(1, schedule.steps // max(1, schedule.judgements))
        for index, rows in zip(range(schedule.steps), _batches(block, batch), strict=False):
            step(rows, 1 - index / schedule.steps)
            if (index + 1) % every == 0 or index + 1 == schedule.steps:
                with suppress(NumericalError):  # a step that went too far is not the best one
                    loss = _judge(block, tuned, schedule)
                    if loss < lowest:
                        lowest, best_step = loss, index + 1
                        best = [leaf.detach().clone() for leaf in leaves]
    with torch.no_grad():
        for leaf, kept in zip(leaves, best, strict=True):
            leaf.copy_(kept)
    return {"block_loss_before": before, "block_loss": lowest, "best_step": float(best_step)}


def block_loss(
    block: BlockProblem, weights: Mapping[str, Tensor], rows: Sequence[int], rule: TokenWeight = UNIFORM
) -> float:
    """Return the squared error of the block's outputs over their energy, for some windows.

    Raises:
        NumericalError: It is not finite.
    """
    ratio = _loss(block, weights, rows, rule)
    if not ratio < float("inf"):
        raise NumericalError(
            f"the outputs of block {block.layer} are not finite",
            hint="run the model in float32: --dtype float32",
        )
    return ratio


def _loss(block: BlockProblem, weights: Mapping[str, Tensor], rows: Sequence[int], rule: TokenWeight) -> float:
    sums = torch.zeros(2, dtype=torch.float64, device=block.device)
    with torch.no_grad():
        for start in range(0, len(rows), _JUDGED_AT_ONCE):
            some = rows[start : start + _JUDGED_AT_ONCE]
            target = block.targets(some)
            lost = _squared_error(block.forward(weights, block.inputs(some)), target, rule)
            kept = _squared_error(torch.zeros_like(target), target, rule)
            sums += torch.stack([lost, kept]).double() * len(some)
    error, energy = sums.tolist()
    ratio: float = error / max(energy, torch.finfo(torch.float32).tiny)
    if not ratio < float("inf"):
        raise NumericalError(
            f"the outputs of block {block.layer} are not finite",
            hint="run the model in float32: --dtype float32",
        )
    return ratio


def _judge(block: BlockProblem, tuned: Tuned, schedule: Schedule) -> float:
    """Return the loss on windows spread over all of them."""
    with torch.no_grad():
        weights = tuned.weights()
    return block_loss(block, weights, judged_windows(block, schedule.judged), schedule.token_weight)


def judged_windows(block: BlockProblem, most: int) -> list[int]:
    """Return windows spread over all of them."""
    count = min(most, block.windows)
    return [index * block.windows // count for index in range(count)]


def _squared_error(outputs: Tensor, targets: Tensor, rule: TokenWeight) -> Float[Tensor, ""]:
    """Return the mean squared error, tokens weighed by the norms of the targets."""
    targets = targets.float()
    errors = (outputs.float() - targets).square().mean(-1)
    scales = rule.scales(targets.flatten(0, -2), window=targets.shape[-2])
    if scales is None:
        return errors.mean()
    weights = scales.square().view(errors.shape)
    return (errors * (weights / weights.mean())).mean()


def _batches(block: BlockProblem, size: int) -> Iterator[list[int]]:
    """Yield windows without end, each once before any comes again."""
    generator = torch.Generator().manual_seed(block.seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(block.windows, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


class _Step:
    """One step of descent, with buffers that stay where they are."""

    def __init__(self, block: BlockProblem, tuned: Tuned, schedule: Schedule, batch: int) -> None:
        self.block, self.tuned, self.rule = block, tuned, schedule.token_weight
        self.inputs, self.targets = block.inputs(range(batch)), block.targets(range(batch))
        self.left = torch.ones((), device=block.device)
        self.run = Replayed(self._descend, block.device, recorded=block.fixed)

    def __call__(self, rows: Sequence[int], left: float) -> None:
        self.inputs.copy_(self.block.inputs(rows))
        self.targets.copy_(self.block.targets(rows))
        self.left.fill_(left)
        self.run()

    def _descend(self) -> None:
        with torch.enable_grad():
            outputs = self.block.forward(self.tuned.weights(), self.inputs)
            loss = _squared_error(outputs, self.targets, self.rule)
            gradients = torch.autograd.grad(loss, self.tuned.leaves)
        with torch.no_grad():
            self.tuned.update(gradients, self.left)
