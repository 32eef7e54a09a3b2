"""Walsh-Hadamard transforms on CUDA in Triton: qtool's own kernel, for machines without fast-hadamard-transform."""

from __future__ import annotations

import importlib.util

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.numerics.hadamard import hadamard_rotate


class TritonHadamard:
    """The kernel ``sylvester`` in Triton, with float32 sums; Triton is imported when it first runs."""

    operation = "sylvester"
    preference = 20

    def supports(self, device: torch.device) -> bool:
        """Say whether the device is a GPU and Triton is there."""
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None

    def run(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return ``x @ H_n / sqrt(n)``, computed in float32; float64 and gradients go to the pure function."""
        if x.dtype == torch.float64 or x.numel() == 0 or (x.requires_grad and torch.is_grad_enabled()):
            return hadamard_rotate(x)
        from qtool.kernels.triton_sylvester import sylvester

        return sylvester(x)
