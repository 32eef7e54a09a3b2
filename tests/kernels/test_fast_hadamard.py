"""The kernel of fast-hadamard-transform: never required, and the same as the pure function where it runs."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qtool.kernels import fast_hadamard
from qtool.kernels.fast_hadamard import FastHadamard
from qtool.kernels.kernel import Kernel
from qtool.numerics.hadamard import hadamard_factors, hadamard_rotate
from qtool.testing import check_kernel


def unnormalized(x: Tensor, scale: float) -> Tensor:
    """What the package computes: float32, contiguous, powers of two up to 32768, times a scale of the caller's."""
    n = x.shape[-1]
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert n <= 32768
    assert hadamard_factors(n) == (1, n)
    return (hadamard_rotate(x.double()) * (n**0.5 * scale)).float()


@pytest.fixture
def kernel() -> FastHadamard:
    """The kernel with a stand-in for its package."""
    made = FastHadamard()
    made.__dict__["_package"] = SimpleNamespace(hadamard_transform=unnormalized)
    return made


def test_it_gives_what_the_pure_function_gives(kernel: FastHadamard) -> None:
    check_kernel(kernel, torch.device("cpu"))


@pytest.mark.parametrize("x", [torch.ones(2, 65536), torch.ones(2, 64).double(), torch.ones(0, 64)])
def test_what_the_package_cannot_do_goes_to_the_pure_function(x: Tensor) -> None:
    received = FastHadamard().run(x)  # the package is not there: it would raise
    assert received.dtype == x.dtype
    assert torch.equal(received, hadamard_rotate(x))


@pytest.mark.parametrize("there", [True, False])
def test_it_runs_on_a_gpu_where_its_package_is_there(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    found = importlib.util.find_spec("torch") if there else None
    monkeypatch.setattr(fast_hadamard.importlib.util, "find_spec", lambda _: found)
    assert FastHadamard().supports(torch.device("cuda")) == there
    assert not FastHadamard().supports(torch.device("cpu"))


def test_it_is_a_kernel_that_comes_first() -> None:
    assert isinstance(FastHadamard(), Kernel)
    assert FastHadamard.preference == 10


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    pytest.importorskip("fast_hadamard_transform")
    check_kernel(FastHadamard(), torch.device("cuda"))
