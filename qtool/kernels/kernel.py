"""What a kernel is: a fast implementation of one operation of ``qtool.numerics`` on some device."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Kernel(Protocol):
    """An operation on a device; gives what the pure function gives, to float32 rounding.

    Class attribute ``operation`` names what it implements. Known operations: ``sylvester``, the orthonormal
    Walsh-Hadamard transform of the last axis, whose size is any power of two.

    Class attribute ``preference`` decides between kernels that support the same device: the lowest runs, and of
    equals the one whose name comes first. qtool's own have 10 and 20.
    """

    operation: str
    preference: int

    def supports(self, device: torch.device) -> bool:
        """Say whether it can run on a device, without side effects."""
        ...

    def run(self, x: Tensor) -> Tensor:
        """Return the result for ``x``, in its shape and dtype: any layout, size, floating dtype; gradients pass."""
        ...
