"""What a check raises, and how exact exact is."""

from __future__ import annotations

EXACT = 1e-9
"""Largest difference of logits, relative to the largest logit, that still counts as none in float64."""


class CheckError(AssertionError):
    """A promise of the contract is broken; the message says which and how."""
