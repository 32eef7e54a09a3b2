"""What a metric measures, on what, and what it returns: values for each window or item, never only their mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int64
from torch import Tensor, nn


@runtime_checkable
class Executable(Protocol):
    """A model that can be run: block by block, or a checkpoint loaded whole by its consumer."""

    def forward_windows(
        self, windows: Int64[Tensor, "windows tokens"]
    ) -> Iterator[tuple[slice, Float[Tensor, "batch tokens vocab"]]]:
        """Yield the rows of each batch of windows and their logits in float32."""

    def whole(self) -> nn.Module:
        """Return the whole model as a transformers module, with everything that is executed in it."""


@dataclass(frozen=True)
class Evaluation:
    """What a metric may use.

    Attributes:
        subject: What is measured.
        reference: Makes the full-precision model that it is compared with, when a metric wants one.
        windows: Reads evaluation windows of a text: name or file to token ids.
        tokenizer: The model's tokenizer.
        options: What the user asked of this metric.
    """

    subject: Executable
    reference: Callable[[], Executable]
    windows: Callable[[str], Int64[Tensor, "windows tokens"]]
    tokenizer: Any
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """The result of one metric.

    Attributes:
        values: Name to headline value, e.g. ``perplexity/wikitext2``.
        tensors: Per-window or per-item values from which the headlines can be computed again.
        details: Protocol and other facts as JSON.
    """

    values: Mapping[str, float]
    tensors: Mapping[str, Tensor]
    details: Mapping[str, Any]


@runtime_checkable
class Metric(Protocol):
    """Measures something of an executable model."""

    version: int

    def measure(self, evaluation: Evaluation) -> Measured:
        """Measure it."""
