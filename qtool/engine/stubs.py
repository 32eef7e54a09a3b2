"""Stubs in place of a model's blocks: what comes before the blocks and after them runs as the model has it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

CACHES = ("past_key_values", "past_key_value", "layer_past", "use_cache")
"""Arguments of blocks that are about caches."""


class UnpackedError(Exception):
    """The model unpacks what its blocks return: it expects tuples."""


class Stub(nn.Module):
    """Stands in for a block, remembers what it was called with, and passes the states on, or others.

    Args:
        block: The block; a model may ask for its attributes.
        before: The stub in front.
        tuples: Whether the model expects tuples of its blocks.

    Attributes:
        hidden: The states that it was given.
        arguments: The other arguments by name, wherever they stood in the call, without those about caches.
        result: What it passes on instead of the states, if anything.
    """

    def __init__(self, block: nn.Module, before: Stub | None, *, tuples: bool) -> None:
        super().__init__()
        self._others = (block, before)  # a tuple, so that they do not become children
        self.tuples = tuples
        self.hidden: Tensor = torch.empty(0)
        self.arguments: dict[str, Any] = {}
        self.result: Tensor | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever models ask of their blocks
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._others[0], name)

    def forward(self, *given: Any, **named: Any) -> Tensor | tuple[Tensor]:  # noqa: ANN401 - whatever the model passes
        """Remember the arguments and pass the states on.

        Raises:
            UnpackedError: The states are not those that the stub in front has passed on.
        """
        block, before = self._others
        bound = inspect.signature(block.forward).bind(*given, **named)
        arguments = dict(bound.arguments)
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        self.hidden = arguments.pop(next(iter(bound.signature.parameters)))
        if before is not None and self.hidden.shape != before.hidden.shape:
            raise UnpackedError
        self.arguments = {name: value for name, value in arguments.items() if name not in CACHES}
        result = self.hidden if self.result is None else self.result
        return (result,) if self.tuples else result


def stubs_for(blocks: Iterable[nn.Module], *, tuples: bool) -> list[Stub]:
    """Return a stub for each block, in a row."""
    stubs: list[Stub] = []
    for block in blocks:
        stubs.append(Stub(block, stubs[-1] if stubs else None, tuples=tuples))
    return stubs
