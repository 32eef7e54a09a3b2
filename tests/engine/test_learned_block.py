"""Linears as learned grids: in every format they start as what a method made of them, and are stored as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.builtin.formats.fp4 import E2M1, MXFP4, NVFP4
from qtool.builtin.formats.fp8 import E4M3
from qtool.builtin.formats.integer import Int2, Int3, Int4, Int8
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.engine.grid import Grid
from qtool.engine.learned_block import LearnedBlock
from qtool.engine.problem import Adapter, LayerProblem, QuantizedLinear
from qtool.engine.stored import linear_tensors, read_linear
from qtool.model.plan import Segment
from qtool.numerics.outliers import Outliers
from qtool.scheme import Format, parse_tensor_scheme
from qtool.testing.mitigators import correlated_problem

FORMATS: dict[str, Format] = {
    fmt.name: fmt for fmt in (Int2(), Int3(), Int4(), Int8(), E2M1(), MXFP4(), NVFP4(), E4M3())
}
SCHEMES = [
    *("int2", "int3", "int4", "int8", "int4-half", "int4-full-c0.85", "int4-tensor", "int4-asym-tensor"),
    *("int2-asym-g16", "int3-asym-g16", "int4-asym-g16", "int8-asym-g16", "int4-asym", "int3-asym-g16-sfp32"),
    *("int4-asym-g16-offset", "int3-asym-offset-sfp16"),
    *("int4-g16-se8m0", "int4-g16-sfp16", "fp4-g16", "fp4-asym-g16", "fp4-asym-g16-sfp32", "fp4-sym-g16-se4m3"),
    *("mxfp4", "nvfp4", "fp8", "fp8-tensor"),
]
MIXED = [("int3-g16", "int8"), ("nvfp4", "int4"), ("int4-asym-g16", "fp8"), ("int4-tensor", "int8")]


def problem(text: str, apart: str = "", seed: int = 0) -> LayerProblem:
    """A correlated layer, with its last 16 channels in the format `apart` if there is one."""
    scheme = parse_tensor_scheme(text, FORMATS.__getitem__)
    of = correlated_problem(FORMATS[scheme.format], scheme, seed=seed, n_in=32, n_out=16 + 8 * seed)
    if not apart:
        return of
    grid = Grid.segmented(scheme, [Segment(16, apart)], FORMATS.__getitem__)
    return replace(of, grid=grid, global_scales=grid.global_scales(of.weight.abs().amax(0)))


def starts_of(problems: dict[str, LayerProblem], first: str) -> dict[str, QuantizedLinear]:
    made = {
        "rtn": lambda one: RTN().quantize(one, ClipOptions()),
        "clipped": lambda one: RTN().quantize(one, ClipOptions(clip="search")),
        "gptq": lambda one: GPTQ().quantize(one, GPTQConfig()),
    }[first]
    return {name: made(one) for name, one in problems.items()}


def moved(block: LearnedBlock) -> None:
    """Put everything that is learned somewhere."""
    generator = torch.Generator().manual_seed(3)
    for grid in block.grids.values():
        together = grid.low is grid.high
        grid.offset = torch.rand(grid.offset.shape, generator=generator) - 0.5
        grid.high = 0.5 + torch.rand(grid.high.shape, generator=generator) * 0.6
        grid.low = grid.high if together else 0.5 + torch.rand(grid.high.shape, generator=generator) * 0.6


def same_parameters(one: QuantizedLinear, other: QuantizedLinear) -> bool:
    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b if a is None or b is None else torch.equal(a, b)

    return all(
        same(getattr(a, leaf), getattr(b, leaf))
        for a, b in zip(one.parameters, other.parameters, strict=True)
        for leaf in ("scale", "zero_point", "global_scale", "offset")
    )


@pytest.mark.parametrize("first", ["rtn", "clipped", "gptq"])
@pytest.mark.parametrize(("text", "apart"), [*((text, "") for text in SCHEMES), *MIXED])
def test_starts_as_what_the_method_made_and_is_stored_as_it_is(text: str, apart: str, first: str) -> None:
    problems = {"a": problem(text, apart), "b": problem(text, apart, seed=1)}
    starts = starts_of(problems, first)
    block = LearnedBlock(problems, starts)
    weights, found = block.weights(), block.quantized()
    for name, start in starts.items():
        assert torch.equal(weights[name], start.weight(problems[name].grid))
        assert torch.equal(found[name].codes, start.codes)
        assert same_parameters(found[name], start)
    moved(block)
    weights, found = block.weights(), block.quantized()
    for name, of in problems.items():
        assert not same_parameters(found[name], starts[name])
        assert torch.equal(found[name].weight(of.grid), weights[name])
        stored = linear_tensors(name, found[name], of.grid)
        again = read_linear(name, 32, stored, of.grid)
        assert torch.equal(again.codes, found[name].codes)
        assert same_parameters(again, found[name])
        for before, after in zip(starts[name].parameters, found[name].parameters, strict=True):
            assert before.global_scale is after.global_scale
            assert before.scale.shape == after.scale.shape


def test_nearest_rounding_leaves_nothing_to_hold_in_place() -> None:
    for text in SCHEMES:
        problems = {"a": problem(text)}
        for first in ("rtn", "clipped"):
            block = LearnedBlock(problems, starts_of(problems, first))
            held = sum(int((grid.anchor != 0).sum()) for grid in block.grids.values())
            assert held <= 16, (text, first)  # ties that go to even
            assert all(bool((grid.anchor.abs() < 0.011).all()) for grid in block.grids.values())


def test_what_stands_beside_the_codes_stays() -> None:
    of = problem("int3-g16")
    start = starts_of({"a": of}, "gptq")["a"]
    places = of.weight.abs() > 2.5
    assert 0 < places.sum() < 20
    adapter = Adapter(torch.zeros(2, 32), torch.zeros(16, 2))
    start = replace(start, outliers=Outliers.of(of.weight, places), adapter=adapter, counters={"dead_columns": 1})
    block = LearnedBlock({"a": of}, {"a": start})
    assert torch.equal(block.weights()["a"], start.weight(of.grid))
    moved(block)
    for grid in block.grids.values():
        grid.offset.requires_grad_(True)
    weight = block.weights()["a"]
    assert torch.equal(weight[places], of.weight[places].half().float())
    (grid,) = block.grids.values()
    (gradient,) = torch.autograd.grad(weight.sum(), grid.offset)
    assert not gradient.reshape(16, 32)[places].any()
    assert gradient.any()
    found = block.quantized()["a"]
    assert torch.equal(found.weight(of.grid), weight)
    assert found.adapter is adapter
    assert found.counters == {"dead_columns": 1}
