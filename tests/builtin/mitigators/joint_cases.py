"""Layers with explicit inputs in two streams, and what the tests of joint methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qtool.builtin.formats.integer import Int3
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem, QuantizedLinear

N_OUT, N_IN, TOKENS = 20, 32, 256


def streams(seed: int, size: float = 0.2, *, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Inputs before and after rounding, a column a token: the second is smaller, with noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(N_IN, N_IN, generator=generator, dtype=torch.float64) / N_IN**0.5
    full = mixing @ mixing @ torch.randn(N_IN, tokens, generator=generator, dtype=torch.float64)
    full += 0.1 * torch.randn(N_IN, tokens, generator=generator, dtype=torch.float64)
    noise = torch.randn(N_IN, tokens, generator=generator, dtype=torch.float64)
    return full, full * (1 - size / 4) + size * noise if size else full


def problem_of(full: Tensor, rounded: Tensor, seed: int = 0) -> LayerProblem:
    """A layer in float64 that reads these inputs."""
    weight = torch.randn(N_OUT, N_IN, generator=torch.Generator().manual_seed(seed + 90), dtype=torch.float64)
    tokens = full.shape[1]
    hessian, cross = rounded @ rounded.T / tokens, full @ rounded.T / tokens
    entries = {"hessian": hessian, "cross": cross, "full_hessian": full @ full.T / tokens}
    return LayerProblem("layer", weight, Grid.of(Int3().defaults, Int3()), hessian, entries)


def gptq_as_oracle(of: LayerProblem, options: GPTQConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """GPTQ as a function of a target and a Hessian, which remembers nothing."""

    def quantize(target: Tensor, hessian: Tensor) -> Tensor:
        plain = GPTQConfig(dampening_frac=options.dampening_frac)
        solved = GPTQ().quantize(replace(of, weight=target, hessian=hessian, memory={}), plain)
        return solved.weight(of.grid).double()

    return quantize


def parts(result: QuantizedLinear, of: LayerProblem) -> tuple[Tensor, Tensor]:
    """The decoded weight, and what the correction adds to it, in float64."""
    assert result.adapter is not None
    return result.weight(of.grid).double(), result.adapter.product(torch.float64)


def same_as_seen(ours: Tensor, theirs: Tensor, inputs: Tensor, tolerance: float) -> bool:
    """Whether two weights give the same outputs, relative to those of the second."""
    return float(((ours - theirs) @ inputs).norm()) <= tolerance * float((theirs @ inputs).norm())
