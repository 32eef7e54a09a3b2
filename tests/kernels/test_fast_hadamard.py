"""The kernel of fast-hadamard-transform: never required, and the same as the pure function where it runs."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qtool.engine.online import KernelHadamard, with_kernels
from qtool.kernels import fast_hadamard
from qtool.kernels.fast_hadamard import FastHadamard
from qtool.kernels.kernel import Kernel
from qtool.numerics.hadamard import hadamard_matrix, hadamard_rotate
from qtool.numerics.operators import Hadamard
from qtool.plugins import Plugins
from qtool.testing import check_kernel

POWERS = (2, 8, 64, 512)


def unnormalized(x: Tensor, scale: float) -> Tensor:
    """What the package computes: float32, contiguous, times a scale of the caller's."""
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    return x @ hadamard_matrix(x.shape[-1]).float() * scale


@pytest.fixture
def kernel() -> FastHadamard:
    """The kernel with a stand-in for its package."""
    made = FastHadamard()
    made.__dict__["_package"] = SimpleNamespace(hadamard_transform=unnormalized)
    return made


def inputs(device: str = "cpu") -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(3, 5, n, generator=generator).to(device)} for n in POWERS]


def test_it_gives_what_the_pure_function_gives(kernel: FastHadamard) -> None:
    check_kernel(kernel.run, hadamard_rotate, inputs())
    check_kernel(kernel.run, hadamard_rotate, [{"x": one["x"].transpose(0, 1)} for one in inputs()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_keep_their_dtype(kernel: FastHadamard, dtype: torch.dtype) -> None:
    x = torch.randn(4, 64).to(dtype)
    received = kernel.run(x)
    assert received.dtype == dtype
    torch.testing.assert_close(received.float(), hadamard_rotate(x).float(), rtol=1e-2, atol=1e-2)


def test_it_is_a_kernel_that_is_offered_and_never_needed() -> None:
    plugins = Plugins.discover()
    assert isinstance(plugins.load("kernels", "fast-hadamard"), Kernel)
    assert not FastHadamard().supports(torch.device("cpu"))
    operators = (Hadamard(64), Hadamard(12))
    assert with_kernels(operators, plugins, torch.device("cpu")) == operators


@pytest.mark.parametrize("there", [True, False])
def test_it_runs_on_a_gpu_where_its_package_is_there(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    found = importlib.util.find_spec("torch") if there else None
    monkeypatch.setattr(fast_hadamard.importlib.util, "find_spec", lambda _: found)
    assert FastHadamard().supports(torch.device("cuda")) == there
    assert not FastHadamard().supports(torch.device("cpu"))


@pytest.mark.parametrize("n", [40, 64, 96])
def test_behind_an_operator(kernel: FastHadamard, n: int) -> None:
    operator = Hadamard(n, 1 - 2 * torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(n)))
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(1))
    behind = KernelHadamard(operator, kernel)
    torch.testing.assert_close(behind.act(x), operator.act(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(behind.weight_in(x), operator.weight_in(x), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    pytest.importorskip("fast_hadamard_transform")
    check_kernel(FastHadamard().run, hadamard_rotate, inputs("cuda"), rtol=1e-5)
