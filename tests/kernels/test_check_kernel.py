"""The check of kernels passes what is right by another way, and finds every kind of fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtool.numerics.hadamard import hadamard_matrix, hadamard_rotate
from qtool.testing import CheckError, check_kernel

CPU = torch.device("cpu")
FEW = (1, 2, 16, 128)


class Made:
    """A kernel made of a function."""

    operation = "sylvester"
    preference = 0

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self.run = run

    def supports(self, device: torch.device) -> bool:
        return True


def fails(run: Callable[[Tensor], Tensor], match: str) -> None:
    with pytest.raises(CheckError, match=match):
        check_kernel(Made(run), CPU, orders=FEW)


def dense(x: Tensor) -> Tensor:
    n = x.shape[-1]
    return (x.double() @ hadamard_matrix(n).double() / n**0.5).to(x.dtype)


def test_the_same_by_another_way_passes() -> None:
    check_kernel(Made(dense), CPU, orders=FEW)


def test_off_by_a_little() -> None:
    fails(lambda x: hadamard_rotate(x) * (1 + 3e-6), r"in float32 \[3, 4101, 1\]: 2\.96e-06, allowed 1\.06e-06")
    check_kernel(Made(lambda x: hadamard_rotate(x) * (1 + 3e-6)), CPU, orders=FEW, rtol=4e-6)


def test_wrong_only_where_it_is_large() -> None:
    fails(lambda x: hadamard_rotate(x).roll(int(x.shape[-1] > 16), -1), r"in float32 \[3, 37, 128\]")


def test_not_a_number() -> None:
    fails(lambda x: x * torch.nan, "nan, allowed")


def test_another_shape_or_dtype() -> None:
    fails(lambda x: hadamard_rotate(x)[:1], r"gives float32 \[1, 4101, 1\] for float32 \[3, 4101, 1\]")
    fails(lambda x: hadamard_rotate(x).float(), r"gives float32 .* for float16")


def test_an_input_that_is_overwritten() -> None:
    fails(lambda x: x.copy_(hadamard_rotate(x)) if x.is_contiguous() and x.shape[-1] > 1 else dense(x), "its input")


def test_strides_that_are_ignored() -> None:
    def ignoring(x: Tensor) -> Tensor:
        return dense(x.as_strided(x.shape, torch.empty(x.shape).stride()) if x.dtype == torch.float32 else x)

    fails(ignoring, "whose rows are transposed")


def test_narrow_types_that_are_summed_in_themselves() -> None:
    def narrow(x: Tensor) -> Tensor:
        return x @ hadamard_matrix(x.shape[-1]).to(x.dtype) if x.dtype == torch.bfloat16 else dense(x)

    fails(narrow, "bfloat16")


def test_a_gradient_that_is_lost_or_wrong() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(_: object, x: Tensor) -> Tensor:
            return dense(x)

        @staticmethod
        def backward(_: object, *gradients: Tensor) -> Tensor:
            return gradients[0]

    fails(lambda x: dense(x.detach()), "no gradient")
    fails(lambda x: Wrong.apply(x), "a gradient")


def test_an_operation_that_nobody_calls() -> None:
    other = Made(dense)
    other.operation = "softmax"
    with pytest.raises(CheckError, match="`operation = 'sylvester'`"):
        check_kernel(other, CPU)
