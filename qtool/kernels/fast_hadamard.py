"""Walsh-Hadamard transforms on CUDA through the package fast-hadamard-transform (Dao), where it is importable."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.numerics.hadamard import hadamard_rotate

PACKAGE = "fast_hadamard_transform"

MAX_ORDER = 32768
"""The package has no transform above this order, and none in float64."""


class FastHadamard:
    """The kernel ``sylvester`` of fast-hadamard-transform; never required."""

    operation = "sylvester"
    preference = 10

    def supports(self, device: torch.device) -> bool:
        """Say whether the device is a GPU and the package is there."""
        return device.type == "cuda" and importlib.util.find_spec(PACKAGE) is not None

    @cached_property
    def _package(self) -> Any:  # noqa: ANN401 - a module without types
        return importlib.import_module(PACKAGE)

    def run(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return ``x @ H_n / sqrt(n)``, computed in float32; by the pure function where the package cannot."""
        if x.shape[-1] > MAX_ORDER or x.dtype == torch.float64 or x.numel() == 0:
            return hadamard_rotate(x)
        result: Tensor = self._package.hadamard_transform(x.float().contiguous(), scale=x.shape[-1] ** -0.5)
        return result.to(x.dtype)
