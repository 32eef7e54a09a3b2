"""qtool's own kernel: right on a GPU, right when Triton interprets it, and never required."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qtool.kernels import triton_hadamard
from qtool.kernels.kernel import Kernel
from qtool.kernels.triton_hadamard import TritonHadamard
from qtool.numerics.hadamard import hadamard_rotate
from qtool.testing import check_kernel

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

INTERPRETED = """
import torch
from qtool.kernels.triton_hadamard import TritonHadamard
from qtool.testing.kernels import check_kernel

class Interpreted(TritonHadamard):
    def run(self, x):  # the interpreter cuts bfloat16 off where a GPU rounds it
        return super().run(x.float()).bfloat16() if x.dtype == torch.bfloat16 else super().run(x)

check_kernel(Interpreted(), torch.device("cpu"), orders=(1, 2, 128, 16384))
"""


def test_it_is_a_kernel_that_comes_second() -> None:
    kernel = TritonHadamard()
    assert isinstance(kernel, Kernel)
    assert (kernel.operation, kernel.preference) == ("sylvester", 20)


@pytest.mark.parametrize("there", [True, False])
def test_it_runs_on_a_gpu_where_triton_is_there(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    found = importlib.util.find_spec("torch") if there else None
    monkeypatch.setattr(triton_hadamard.importlib.util, "find_spec", lambda _: found)
    assert TritonHadamard().supports(torch.device("cuda")) == there
    assert not TritonHadamard().supports(torch.device("cpu"))


def test_triton_is_imported_only_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "qtool.kernels.triton_sylvester", raising=False)
    spec = importlib.util.find_spec("qtool.kernels.triton_hadamard")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = module.TritonHadamard()
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kernel.run(x.double()), hadamard_rotate(x.double()))
    assert kernel.run(x[:0]).shape == (0, 8)
    with pytest.raises(ImportError, match="triton"):
        kernel.run(x)


@needs_triton
@pytest.mark.parametrize(("size", "inner"), [(64, 1), (8192, 1), (4, 8192)])
def test_it_compiles_for_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int, inner: int
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from qtool.kernels.triton_sylvester import _sylvester

    constants = {"SIZE": size, "BITS": size.bit_length() - 1, "VECTORS": max(1, 4096 // size)}
    constants |= {"inner": 1} if inner == 1 else {}
    kinds = {"values": "*bf16", "result": "*fp32", "vectors": "i32", "inner": "i32"}
    signature = {name: "constexpr" if name in constants else kinds[name] for name in _sylvester.arg_names}
    compiled = compile(ASTSource(_sylvester, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert compiled.metadata.shared <= 48 * 1024
    assert "tf32" not in compiled.asm["ptx"]


@pytest.mark.slow
@needs_triton
def test_interpreted_it_gives_what_the_pure_function_gives() -> None:
    interpreted = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=interpreted, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@needs_triton
def test_on_a_gpu() -> None:
    check_kernel(TritonHadamard(), torch.device("cuda"))


@pytest.mark.gpu
@needs_triton
def test_half_the_range_of_float32_survives_on_a_gpu() -> None:
    x = torch.zeros(4, 4096, device="cuda")
    x[:, :4] = 1e38
    torch.testing.assert_close(TritonHadamard().run(x), hadamard_rotate(x), rtol=1e-5, atol=1e30)
