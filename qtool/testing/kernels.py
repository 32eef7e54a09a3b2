"""The check of kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from qtool.testing.promise import CheckError


def check_kernel(
    run: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Mapping[str, Any]],
    *,
    rtol: float = 1e-5,
) -> None:
    """Check that a kernel gives what the pure function gives.

    Args:
        run: The kernel.
        reference: The pure function of ``qtool.numerics``.
        inputs: Keyword arguments of several calls.
        rtol: Largest difference relative to the largest reference value.

    Raises:
        CheckError: They differ.
    """
    for index, arguments in enumerate(inputs):
        expected, received = reference(**arguments), run(**arguments)
        if expected.shape != received.shape:
            shapes = f"{tuple(received.shape)} in call {index}, the reference {tuple(expected.shape)}"
            raise CheckError(f"the kernel gives the shape {shapes}")
        difference = float((expected - received.to(expected)).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not difference <= rtol:
            raise CheckError(
                f"the kernel differs from the reference in call {index}: {difference:.2e}, allowed {rtol:.0e}"
            )
