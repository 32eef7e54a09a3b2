"""What a check raises, and how exact exact is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EXACT = 1e-9
"""Largest difference of logits, relative to the largest logit, that still counts as none in float64."""


class CheckError(AssertionError):
    """A promise of the contract is broken; the message says which and how."""


def refuse_changes(name: str, kept: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse a method that writes to what it is given.

    Args:
        name: Of the method.
        kept: Copies from before it ran, by label.
        given: What it was given, under the same labels.

    Raises:
        CheckError: A tensor is not what it was.
    """
    for label, tensor in given.items():
        if not torch.equal(kept[label], tensor):
            raise CheckError(f"{name} modifies the {label} that it is given")
