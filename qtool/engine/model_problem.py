"""A quantized model as a method sees it that learns from the model's output, and the contract of such a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Values = Mapping[str, Float[Tensor, "..."]]
"""Gains of norms and scales of linears by name, in float32."""


@dataclass(frozen=True)
class ModelProblem:
    """Everything that a method may know that learns from a model's output; codes stay as they are.

    Attributes:
        norms: Gains of the norms by full name of their weights: what multiplies a channel, so also where the stored
            weight is that less 1. None of them is modified.
        scales: Scales of linears by full name as they are stored, where they are stored in 16 bits or more: those of
            fewer are too far apart to be moved.
        loss: Returns for some windows the mean over tokens of KL(full precision ‖ quantized), in nats, of the model as
            it is going to be executed, with these values in place of its own.
        descend: Returns the same and the gradients of these values by name.
        windows: How many windows there are.
        device: Where the mathematics runs.
        seed: Seeds whatever is random.
    """

    norms: Values
    scales: Values
    loss: Callable[[Sequence[int], Values], float]
    descend: Callable[[Sequence[int], Values], tuple[float, dict[str, Tensor]]]
    windows: int
    device: torch.device
    seed: int = 0


@dataclass(frozen=True)
class ModelResult:
    """What a method makes of a model.

    Attributes:
        values: Gains and scales that are others now, by name; scales become what their format stores.
        report: What happened, as numbers: ``kl`` and ``kl_before``, the loss of some windows at the end and at the
            start, ….
    """

    values: Values
    report: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class ModelMitigator(Protocol):
    """Improves a quantized model by looking at what the whole of it puts out. It comes last.

    Class attributes as those of ``Mitigator``.
    """

    version: int
    needs: tuple[str, ...]
    Config: type

    def windows_run(self, windows: int, config: Any) -> int:  # noqa: ANN401 - each method has its Config
        """Return how many windows run through the model, one with gradients counted four times: for estimates.

        Args:
            windows: How many there are.
            config: Options.
        """

    def tune(self, model: ModelProblem, config: Any) -> ModelResult:  # noqa: ANN401 - each method has its Config
        """Improve the model that the methods to the left made.

        Raises:
            NumericalError: The model's output is not finite.
        """
