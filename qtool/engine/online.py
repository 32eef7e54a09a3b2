"""Online operators as a device runs them fastest: through a kernel where one supports the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.kernels.kernel import Kernel
from qtool.numerics.hadamard import hadamard_core, hadamard_factors
from qtool.numerics.operators import Hadamard, HeadMix, Operator
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

    operator: Hadamard | HeadMix
    kernel: Kernel

    def act(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return what ``operator.act`` returns."""
        return self.operator.act_by(self._rotate, x)

    def weight_in(self, w: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return what ``operator.weight_in`` returns: a rotation is its own inverse transpose."""
        return self.act(w)

    def _rotate(self, x: Float[Tensor, "*batch n"], *, transpose: bool) -> Float[Tensor, "*batch n"]:
        """Return ``hadamard_rotate(x)``: the factors ``H_K`` and ``H_P`` commute, and ``H_P`` is symmetric."""
        core, power = hadamard_factors(x.shape[-1])
        y = x if core == 1 else x.reshape(*x.shape[:-1], core, power)
        if power > 1:
            y = _Rotated.apply(y, self.kernel)  # type: ignore[no-untyped-call]
        return hadamard_core(y.reshape(x.shape), transpose=transpose)


class _Rotated(torch.autograd.Function):
    """A kernel's product with a Sylvester matrix: symmetric, so gradients go through the same kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Kernel) -> Tensor:  # noqa: ANN401 - torch's own
        ctx.kernel = kernel
        return kernel.run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - torch's own
        return ctx.kernel.run(gradients[0].contiguous()), None


def with_kernels(operators: Sequence[Operator], plugins: Plugins, device: torch.device) -> tuple[Turns, ...]:
    """Return the operators with their tensors on a device, those replaced that a kernel on offer runs there.

    Of several kernels that support the device the one with the lowest ``preference`` runs, then by name.
    """
    names = sorted(plugins.offers["kernels"]) if device.type != "cpu" else []
    kernels: list[Kernel] = [plugins.load("kernels", name) for name in names]
    usable = [kernel for kernel in kernels if kernel.operation == "sylvester" and kernel.supports(device)]
    best = min(usable, key=lambda kernel: kernel.preference, default=None)
    placed = [_on(operator, device) for operator in operators]
    if best is None:
        return tuple(placed)
    return tuple(KernelHadamard(o, best) if isinstance(o, Hadamard | HeadMix) else o for o in placed)


def _on(operator: Operator, device: torch.device) -> Operator:
    """Return an operator whose tensors are on a device."""
    tensors, params = operator.state()
    if all(tensor.device == device for tensor in tensors.values()):
        return operator
    return type(operator).from_state({name: tensor.to(device) for name, tensor in tensors.items()}, params)
