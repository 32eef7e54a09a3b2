"""One decoder block as a method sees it that learns from the block's output, and the contract of such a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.problem import LayerProblem, QuantizedLinear

Forward = Callable[[Mapping[str, Tensor], Float[Tensor, "batch tokens hidden"]], Float[Tensor, "batch tokens hidden"]]
"""Runs the block on hidden states with other weights, by full name of the linear; differentiable in them."""


@dataclass(frozen=True)
class Compensation:
    """What is added to a block's output ``y``: ``y ∘ scale + up (down x) + bias``, ``x`` being the block's input.

    Attributes:
        bias: Added to every token.
        scale: One factor a channel, or None.
        down: Right factor of a matrix, or the whole of it where there is no ``up``; or None.
        up: Left factor of a matrix, or None.
    """

    bias: Float[Tensor, " hidden"]
    scale: Float[Tensor, " hidden"] | None = None
    down: Float[Tensor, "rank hidden"] | None = None
    up: Float[Tensor, "hidden rank"] | None = None

    def matrix(self) -> Float[Tensor, "hidden hidden"]:
        """Return the matrix that multiplies the input, or the output where there are factors, in float32."""
        matrix = torch.zeros(len(self.bias), len(self.bias), device=self.bias.device)
        if self.scale is not None:
            matrix.diagonal().copy_(self.scale.float())
        if self.down is not None:
            matrix += self.down.float() if self.up is None else self.up.float() @ self.down.float()
        return matrix

    def added(
        self, x: Float[Tensor, "*batch hidden"], y: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        """Return the output of a block whose input is ``x``, in the dtype of ``y``."""
        missing = self.bias.to(y)
        if self.scale is not None:
            missing = missing + y * self.scale.to(y)
        if self.down is not None:
            inner = torch.nn.functional.linear(x, self.down.to(x))
            missing = missing + (inner if self.up is None else torch.nn.functional.linear(inner, self.up.to(x)))
        return y + missing


@dataclass(frozen=True)
class BlockProblem:
    """Everything that a block-wise method may know.

    Attributes:
        layer: Block index.
        problems: Of each linear, by full name; ``previous`` is what the methods to the left made of it, or None.
        inputs: Returns the block's inputs for some windows, in the model as it is quantized so far.
        targets: Returns what the block's outputs are in full precision for some windows.
        forward: Runs the block as it is going to be executed: inputs of linears and the KV cache are rounded, with
            gradients passed straight through.
        windows: How many windows there are.
        fixed: Whether a pass does the same operations whatever its values, so that it can be recorded and replayed.
        device: Where the mathematics runs.
        seed: Seeds whatever is random.
    """

    layer: int
    problems: Mapping[str, LayerProblem]
    inputs: Callable[[Sequence[int]], Float[Tensor, "batch tokens hidden"]]
    targets: Callable[[Sequence[int]], Float[Tensor, "batch tokens hidden"]]
    forward: Forward
    windows: int
    fixed: bool
    device: torch.device
    seed: int = 0


@dataclass(frozen=True)
class BlockResult:
    """What a block-wise method makes of a block.

    Attributes:
        linears: Quantized linears by full name, all of them.
        compensation: What is added to the block's output, if anything.
        report: What happened, as numbers: ``block_loss`` and ``block_loss_before``, squared error of the output over
            its energy, ….
    """

    linears: Mapping[str, QuantizedLinear]
    compensation: Compensation | None = None
    report: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class BlockMitigator(Protocol):
    """Improves the linears of a block by looking at what the block puts out.

    Class attributes as those of ``Mitigator``. One that starts from rounding to nearest, and takes no other codes, also
    has ``starts_nearest = True``.
    """

    version: int
    needs: tuple[str, ...]
    Config: type

    def windows_run(self, windows: int, config: Any) -> int:  # noqa: ANN401 - each method has its Config
        """Return how many windows run through each block, one with gradients counted three times: for estimates.

        Args:
            windows: How many there are.
            config: Options.
        """

    def refine(self, block: BlockProblem, config: Any) -> BlockResult:  # noqa: ANN401 - each method has its Config
        """Solve one block, from what the methods to the left made or from rounding to nearest.

        Raises:
            NumericalError: The block's outputs are not finite.
        """
