"""The check of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qtool.engine.online import KernelHadamard
from qtool.kernels.kernel import Kernel
from qtool.numerics.hadamard import hadamard_rotate, random_signs
from qtool.numerics.operators import Hadamard, HeadMix
from qtool.testing.promise import CheckError

ORDERS = tuple(1 << bit for bit in range(17))
"""Every power of two that an online rotation may have, and one beyond."""


def check_kernel(kernel: Kernel, device: torch.device, *, orders: Sequence[int] = ORDERS, rtol: float = 1e-6) -> None:
    """Check that a kernel gives what the pure function gives, alone and behind the operators that it serves.

    Alone: every order, dtype, number of rows and layout, and the gradient. Behind ``Hadamard`` and ``HeadMix``:
    blocks, signs, the transpose, heads side by side and orders that are no power of two.

    Args:
        kernel: A kernel of the operation ``sylvester``.
        device: Where to run it.
        orders: Sizes of the last axis.
        rtol: Largest difference relative to the largest exact value, beside the rounding of the dtype itself.

    Raises:
        CheckError: They differ.
    """
    if not isinstance(kernel, Kernel) or kernel.operation != "sylvester":
        raise CheckError("the kernel implements no operation that qtool knows; expected `operation = 'sylvester'`")
    for name, x in _values(orders, device):
        _compare(name, kernel.run, hadamard_rotate, x, rtol)
    _check_gradient(kernel, device, rtol)
    generator = torch.Generator().manual_seed(1)
    for operator in _operators():
        x = torch.randn(3, 5, 2 * operator.dim, generator=generator).to(device)
        behind = KernelHadamard(operator, kernel)
        for part in (x[..., : operator.dim], x, x.bfloat16()):
            for side in ("act", "weight_in"):
                name = f"`{side}` of {_described(operator)} on {_shown(part)}"
                _compare(name, getattr(behind, side), getattr(operator, side), part, rtol)


def _values(orders: Sequence[int], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Inputs with their names: one row, many rows, none, every dtype, and layouts that are not contiguous."""
    generator = torch.Generator().manual_seed(0)
    for n in orders:
        x = torch.randn(3, 5 + 4096 // n, n, generator=generator).to(device)
        yield _shown(x), x
        yield f"{_shown(x)} whose rows are transposed", x.transpose(0, 1)
        yield f"{_shown(x)} whose entries lie apart", x.mT.contiguous().mT
        yield f"{_shown(x)} whose rows are one in memory", x[:1].expand_as(x)
        for other in (x[0, 0], x[:0], *(x.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64))):
            yield _shown(other), other


def _operators() -> Iterator[Hadamard | HeadMix]:
    """Operators that put one kernel to every use."""
    for n, block_size in ((64, 64), (64, 16), (96, 96), (96, 24), (184, 184), (576, 576), (1408, 128)):
        for signs in (None, random_signs(n, torch.Generator().manual_seed(n))):
            operator = Hadamard(n, signs, block_size)
            yield from (operator, operator.inverse())
    for num_heads, head_dim in ((8, 16), (12, 8), (28, 4)):
        yield from (HeadMix(num_heads, head_dim), HeadMix(num_heads, head_dim).inverse())


def _compare(
    name: str, run: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], x: Tensor, rtol: float
) -> None:
    before = x.clone()
    exact, received = reference(x.double()), run(x)
    if (received.shape, received.dtype) != (x.shape, x.dtype):
        raise CheckError(f"the kernel gives {_shown(received)} for {name}")
    if not torch.equal(x, before):
        raise CheckError(f"the kernel changes its input: {name}")
    if x.numel() == 0:
        return
    allowed = rtol + torch.finfo(x.dtype).eps / 2
    difference = float((exact - received.double()).abs().max() / exact.abs().max().clamp_min(1e-30))
    if not difference <= allowed:
        raise CheckError(f"the kernel differs from the reference in {name}: {difference:.2e}, allowed {allowed:.2e}")


def _check_gradient(kernel: Kernel, device: torch.device, rtol: float) -> None:
    """The transform is symmetric: the gradient of ``<run(x), w>`` is the transform of ``w``."""
    x, w = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(2)).to(device)
    x.requires_grad_()
    result = kernel.run(x)
    if not result.requires_grad:
        raise CheckError("the kernel lets no gradient pass")
    _compare("a gradient", lambda v: torch.autograd.grad(result, x, v)[0], hadamard_rotate, w, rtol)


def _shown(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _described(operator: Hadamard | HeadMix) -> str:
    tensors, params = operator.state()
    return ", ".join([f"`{operator.kind}`", *tensors, *(f"{name}={value}" for name, value in params.items())])
