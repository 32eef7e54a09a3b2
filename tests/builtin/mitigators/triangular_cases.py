"""Layers for the relatives of GPTQ, whose full-precision stream is another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qtool.builtin.formats.fp4 import E2M1, MXFP4, NVFP4
from qtool.builtin.formats.fp8 import E4M3
from qtool.builtin.formats.integer import Int2, Int3, Int4, Int8
from qtool.builtin.mitigators.cd import frozen_columns
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.model.plan import Segment
from qtool.numerics.frozen_grid import column_rounders
from qtool.scheme import Format, TensorScheme, parse_tensor_scheme
from qtool.testing.mitigators import correlated_problem
from tests.oracles.triangular import Rounded

FORMATS: dict[str, Format] = {
    fmt.name: fmt for fmt in (Int2(), Int3(), Int4(), Int8(), E2M1(), MXFP4(), NVFP4(), E4M3())
}


def scheme_of(text: str) -> TensorScheme:
    return parse_tensor_scheme(text, FORMATS.__getitem__)


def problem(text: str, apart: str = "", *, dead: bool = False, wide: bool = True, **options: Any) -> LayerProblem:  # noqa: ANN401
    """A correlated layer with two streams, in float64 unless not `wide`; in the unit that the solver brings it to.

    `apart`: the format of its last 16 channels. `dead`: the quantized stream never has two of its inputs.
    """
    scheme = scheme_of(text)
    of = correlated_problem(FORMATS[scheme.format], scheme, **options)
    x = of.entries["sample"].double()
    n_in = x.shape[1]
    generator = torch.Generator().manual_seed(99)
    mixed = torch.eye(n_in).double() + 0.15 * torch.randn(n_in, n_in, generator=generator).double() / n_in**0.5
    other = x @ mixed + 0.1 * torch.randn(x.shape, generator=generator).double()
    if dead:
        x = x.clone()
        x[:, [0, 20]] = 0
    hessian, cross = x.T @ x / len(x), other.T @ x / len(x)
    unit = 2.0 ** -int(torch.frexp(hessian.diagonal()[hessian.diagonal() > 0].mean()).exponent)
    dtype = torch.float64 if wide else torch.float32
    entries = {"hessian": (hessian * unit).to(dtype), "cross": (cross * unit).to(dtype)}
    of = replace(of, weight=of.weight.to(dtype), hessian=entries["hessian"], entries={**of.entries, **entries})
    if apart:
        grid = Grid.segmented(scheme, [Segment(16, apart)], FORMATS.__getitem__)
        of = replace(of, grid=grid, global_scales=grid.global_scales(of.weight.abs().amax(0).float()))
    return of


def one_stream(of: LayerProblem) -> LayerProblem:
    return replace(of, entries={**of.entries, "cross": of.need_hessian().clone()}, memory={})


def rounded(of: LayerProblem, result: QuantizedLinear) -> Rounded:
    """Rounds as an oracle asks, to the scales that a method chose."""
    rounders = column_rounders(frozen_columns(of, result.parameters))
    return lambda col, current: rounders[col](current[:, col])


def cross_loss(of: LayerProblem, decoded: Tensor) -> float:
    """How far outputs are from the full-precision stream's, without what no code changes."""
    weight, hessian = of.weight.double(), of.need_hessian().double()
    change = decoded.double() - weight
    moved = change @ hessian - 2 * weight @ (of.entries["cross"].double() - hessian)
    return float((moved * change).sum() / (weight @ hessian * weight).sum())
