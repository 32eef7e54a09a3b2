"""Online operators as a device runs them fastest: through a kernel where one supports the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.kernels.kernel import Kernel
from qtool.numerics.hadamard import hadamard_core, hadamard_factors
from qtool.numerics.operators import Hadamard, Operator
from qtool.plugins import Plugins


@runtime_checkable
class Acts(Protocol):
    """Anything that transforms activations."""

    def act(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return ``x T``."""
        ...


@runtime_checkable
class Turns(Acts, Protocol):
    """Anything that transforms keys, and queries so that their products stay what they were."""

    def weight_in(self, w: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return ``w T^-T``."""
        ...


@dataclass(frozen=True)
class KernelHadamard:
    """A Hadamard operator whose power-of-two factor runs in a kernel."""

    operator: Hadamard
    kernel: Kernel

    def act(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return what ``operator.act`` returns."""
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.operator.signs is not None:
            y = y * self.operator.signs.to(y)
        power = hadamard_factors(self.operator.n)[1]
        y = self.kernel.run(y.reshape(*y.shape[:-1], -1, power)).flatten(-2)
        return hadamard_core(y).to(x.dtype)

    def weight_in(self, w: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return what ``operator.weight_in`` returns: a rotation is its own inverse transpose."""
        return self.act(w)


def with_kernels(operators: Sequence[Operator], plugins: Plugins, device: torch.device) -> tuple[Turns, ...]:
    """Return the operators, those replaced that a kernel on offer runs on this device."""
    kernels = [plugins.load("kernels", name) for name in plugins.offers["kernels"]] if device.type != "cpu" else []
    usable = [kernel for kernel in kernels if kernel.operation == "sylvester" and kernel.supports(device)]
    return tuple(KernelHadamard(o, usable[0]) if usable and _plain(o) else o for o in operators)  # type: ignore[arg-type]


def _plain(operator: Operator) -> bool:
    """Say whether an operator is an untransposed Hadamard over its whole axis."""
    return isinstance(operator, Hadamard) and operator.block_size == operator.n and not operator.transposed
