"""Rounding with offsets is AutoRound's formula for integers, the format's own rounding at 0, and never goes further."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.builtin.formats.fp4 import E2M1, NVFP4
from qtool.builtin.formats.fp8 import E4M3
from qtool.builtin.formats.integer import Int2, Int3, Int4, Int8
from qtool.numerics.levels import level_codes
from qtool.numerics.soft_levels import cells, levels_of, positions, soft_round
from qtool.scheme import Format, GroupParameters
from tests.oracles.learned_rounding import interpolated, symmetric_oracle

CPU = torch.device("cpu")
FORMATS: list[Format] = [Int2(), Int3(), Int4(), Int8(), E2M1(), NVFP4(), E4M3()]
E2M1_LEVELS = torch.tensor([-6.0, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def named(fmt: Format) -> str:
    return fmt.name


def values_between(levels: Tensor, count: int = 400) -> Tensor:
    """Random values a little beyond both ends, in the dtype of the levels, none of them half way between two."""
    generator = torch.Generator().manual_seed(len(levels))
    place = torch.rand(count, generator=generator, dtype=levels.dtype) * (len(levels) + 1) - 1
    return interpolated(levels, place)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_are_rounded_as_the_paper_says(bits: int) -> None:
    fmt: Format = {2: Int2(), 3: Int3(), 4: Int4(), 8: Int8()}[bits]
    levels = levels_of(fmt, zero_points=False, device=CPU).values.double()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 24, generator=generator, dtype=torch.float64)
    scale = weight.abs().amax(-1) / 2 ** (bits - 1) * 0.8
    offset = torch.rand(16, 24, generator=generator, dtype=torch.float64) * 3 - 1.5
    expected = symmetric_oracle(weight, scale, offset, bits=bits)
    found = soft_round(weight / scale.unsqueeze(-1), offset, levels) * scale.unsqueeze(-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zero_point", [None, 0.0, 1.0, -0.75])
@pytest.mark.parametrize("fmt", FORMATS, ids=named)
def test_without_an_offset_it_is_the_rounding_of_the_format(fmt: Format, zero_point: float | None) -> None:
    if zero_point is not None and (fmt.name == "fp8" or (zero_point < 0 and fmt.name.startswith("int"))):
        return  # no such zero points
    step, zero = torch.tensor([0.37]), None if zero_point is None else torch.tensor([zero_point])
    levels = levels_of(fmt, zero_points=zero is not None, device=CPU).values
    x = values_between(levels)
    weight = (x - (zero_point or 0.0)) * step
    in_steps = weight / step + (zero_point or 0.0)
    found = (soft_round(in_steps, torch.zeros_like(x), levels) - (zero_point or 0.0)) * step
    expected = fmt.round(weight.unsqueeze(0), GroupParameters(step, zero))[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fmt", FORMATS, ids=named)
@pytest.mark.parametrize("zero_points", [False, True])
def test_levels_are_what_codes_decode_to(fmt: Format, zero_points: bool) -> None:
    if zero_points and fmt.name == "fp8":
        return
    found = levels_of(fmt, zero_points=zero_points, device=CPU)
    one = torch.ones(1)
    parameters = GroupParameters(one, torch.zeros(1) if zero_points else None)
    assert (found.values.diff() > 0).all()
    assert torch.equal(fmt.decode(found.codes.unsqueeze(0), parameters)[0], found.values)
    every = torch.arange(2**fmt.bits).to(torch.uint8)
    decoded = fmt.decode(every.unsqueeze(0), parameters)[0]
    numbers = decoded.isfinite()
    assert torch.equal(found.values[found.places[numbers]], decoded[numbers] + 0.0)
    assert torch.equal(found.codes, level_codes(fmt))
    if zero_points and fmt.name.startswith("int"):
        assert torch.equal(found.values, torch.arange(2.0**fmt.bits))


@pytest.mark.parametrize("fmt", FORMATS, ids=named)
def test_a_half_reaches_both_neighbours_and_nothing_beyond(fmt: Format) -> None:
    levels = levels_of(fmt, zero_points=False, device=CPU).values.double()
    place = torch.rand(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * (len(levels) - 1)
    place = place[(place.frac() > 1e-6) & (place.frac() < 1 - 1e-6)]
    x = interpolated(levels, place)
    down, up = (soft_round(x, torch.full_like(x, offset), levels) for offset in (-0.5, 0.5))
    assert torch.equal(down, levels[place.floor().long()])
    assert torch.equal(up, levels[place.ceil().long()])
    beyond = torch.tensor([levels[0] - 1e3, levels[-1] + 1e3])
    for offset in (-0.5, 0.0, 0.5):
        found = soft_round(beyond, torch.full_like(beyond, offset), levels)
        assert torch.equal(found, levels[[0, -1]])


def test_positions_are_indices_with_what_lies_between_as_a_fraction() -> None:
    x = torch.tensor([-6.0, -5.0, 0.0, 0.125, 2.25, 6.0, 7.0, -8.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.5, 7.0, 7.25, 11.25, 14.0, 14.5, -1.0], dtype=torch.float64)
    assert torch.equal(positions(x, E2M1_LEVELS), expected)
    assert torch.equal(interpolated(E2M1_LEVELS, expected), x)
    assert cells(x, E2M1_LEVELS).tolist() == [0, 0, 7, 7, 11, 13, 13, 0]


@pytest.mark.parametrize("fmt", [Int3(), E2M1(), E4M3()], ids=named)
def test_gradients_are_those_of_the_straight_line_between_neighbours(fmt: Format) -> None:
    levels = levels_of(fmt, zero_points=False, device=CPU).values.double()
    x = torch.cat(
        [values_between(levels, 180), levels[0] * torch.linspace(1.1, 2, 10), levels[-1] * torch.ones(10) * 3]
    )
    x.requires_grad_(True)
    generator = torch.Generator().manual_seed(2)
    offset = (torch.rand(200, generator=generator, dtype=torch.float64) - 0.5).requires_grad_(True)
    sent = torch.randn(200, generator=generator, dtype=torch.float64)
    of_x, of_offset = torch.autograd.grad(soft_round(x, offset, levels), (x, offset), sent)
    place, small = positions(x.detach(), levels), 1e-6
    target = (place + offset.detach()).round()
    inside = (target >= 0) & (target <= len(levels) - 1)
    assert 0 < (~inside).sum() < 100
    # In the middle of the cell, which the difference then does not leave.
    middle = place.floor().clamp(0, len(levels) - 2) + 0.5
    slope = (interpolated(levels, middle + small) - interpolated(levels, middle - small)) / (2 * small)
    torch.testing.assert_close(of_offset, sent * slope * inside, rtol=1e-6, atol=1e-9)
    assert torch.equal(of_x, sent * inside)


def test_nothing_is_learned_where_there_is_no_level() -> None:
    levels = torch.arange(-2.0, 2.0)
    x = torch.tensor([-2.6, -2.4, 1.4, 1.6, 1.4], requires_grad=True)
    offset = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.2], requires_grad=True)
    soft_round(x, offset, levels).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0, 0]
    assert offset.grad is not None
    assert offset.grad.tolist() == [0, 1, 1, 0, 0]
