"""What is learned of groups: where it starts, what stays storable, and gradients of ranges against a hand-made one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qtool.builtin.formats.fp4 import E2M1, NVFP4
from qtool.builtin.formats.integer import Int3, Int4
from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding
from qtool.numerics.learned_grid import Groups, LearnedGrid
from qtool.numerics.scales import decode_scale, encode_scale
from qtool.numerics.soft_levels import levels_of
from qtool.plugins import Plugins
from qtool.scheme import Format, ScaleFormat, parse_tensor_scheme
from tests.oracles.learned_rounding import as_stored, asymmetric_oracle, symmetric_oracle

CPU = torch.device("cpu")
COUNT, SIZE = 12, 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def groups_of(
    fmt: Format, scale: Tensor, zero_point: Tensor | None = None, stored: ScaleFormat = "fp32", multiplier: float = 1.0
) -> Groups:
    levels = levels_of(fmt, zero_points=zero_point is not None, device=CPU)
    return Groups(random(COUNT, SIZE), scale, zero_point, torch.full((COUNT,), multiplier), levels, stored)


def symmetric(stored: ScaleFormat = "bf16", part: float = 0.7) -> Groups:
    """Groups of INT3 whose ends are cut off."""
    scale = random(COUNT, SIZE).abs().amax(-1) * part / 4
    return groups_of(Int3(), decode_scale(encode_scale(scale, stored), stored), None, stored)


def asymmetric(part: float = 0.7) -> Groups:
    """Groups of INT4 whose ends are cut off."""
    weight = random(COUNT, SIZE)
    low, high = weight.amin(-1) * part, weight.amax(-1) * part
    scale = ((high - low) / 15).bfloat16().float()
    return groups_of(Int4(), scale, (-low / scale).round(), "bf16")


def shifted() -> Groups:
    """Groups of E2M1 around the middle of their range."""
    weight = random(COUNT, SIZE)
    low, high = weight.amin(-1), weight.amax(-1)
    scale = ((high - low) / 12).bfloat16().float()
    return groups_of(E2M1(), scale, -(high + low) / 2 / scale, "bf16")


def block_scaled() -> Groups:
    """NVFP4 with a multiplier that is no power of two."""
    scale = (random(COUNT, SIZE).abs().amax(-1) / 6 / 0.013).to(torch.float8_e4m3fn).float()
    return groups_of(NVFP4(), scale, None, "e4m3", 0.013)


EVERY = [symmetric, asymmetric, shifted, block_scaled]


def moved(grid: LearnedGrid, seed: int, most: float = 1.2) -> None:
    """Put everything that is learned somewhere."""
    generator = torch.Generator().manual_seed(seed)
    grid.offset = torch.rand(COUNT, SIZE, generator=generator) - 0.5
    grid.high = torch.rand(COUNT, generator=generator) * (most - 0.01) + 0.01
    grid.low = torch.rand(COUNT, generator=generator) * (most - 0.01) + 0.01 if grid.low is not grid.high else grid.high


class OnTheDevice(TorchDispatchMode):
    """Refuses what reads a tensor on the host or makes one of the host's numbers: a GPU could not record it."""

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        assert function is not torch.ops.aten._local_scalar_dense.default, "a tensor is read on the host"
        assert function is not torch.ops.aten.lift_fresh.default, "a tensor is made of the host's numbers"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("made", EVERY)
def test_a_step_of_descent_leaves_the_host_alone_but_for_the_first(made: Callable[[], Groups]) -> None:
    grid = LearnedGrid(made())
    leaves = list({id(leaf): leaf.requires_grad_(True) for leaf in (grid.offset, grid.high, grid.low)}.values())
    grid.values()
    with OnTheDevice():
        gradients = torch.autograd.grad(grid.values().square().sum(), leaves)
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients)


ACTIVATIONS = [
    "amxfp4",
    "fp4-token-sue5m3",
    "fp8-token",
    "int4-asym-token",
    "mxfp4",
    "mxfp6_e2m3",
    "nf4-token",
    "nvfp4",
]


@pytest.mark.parametrize("text", ACTIVATIONS)
def test_rounding_activations_leaves_the_host_alone_but_for_the_first_time(text: str) -> None:
    lookup, x = Plugins.discover().format, random(3, 64)
    scheme = parse_tensor_scheme(text, lookup, vector="token")
    rounding = Rounding(Grid.of(scheme, lookup(scheme.format)))
    expected = rounding(x)
    with OnTheDevice():
        assert torch.equal(rounding(x), expected)


@pytest.mark.parametrize("made", EVERY)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_is_learned_is_what_is_stored(made: object, seed: int) -> None:
    groups: Groups = made()  # type: ignore[operator]
    start = groups.levels.codes[torch.randint(0, len(groups.levels.codes), (COUNT, SIZE))]
    for grid in (LearnedGrid(groups), LearnedGrid(groups, start)):
        moved(grid, seed)
        codes, scale, zero_point = grid.chosen()
        levels = groups.levels.values[groups.levels.places[codes.long()]]
        centered = levels if zero_point is None else levels - zero_point.unsqueeze(-1)
        expected = centered * (scale * groups.multiplier).unsqueeze(-1)
        assert torch.equal(grid.values(), expected)
        assert torch.equal(decode_scale(encode_scale(scale, groups.scale_format), groups.scale_format), scale)
        assert (scale > 0).all()
        assert (scale != groups.scale).any()
        if zero_point is not None and groups.has_integer_zeros:
            assert (zero_point == zero_point.round()).all()
            assert zero_point.min() >= 0
            assert zero_point.max() <= groups.levels.values[-1]
            assert (zero_point != groups.zero_point).any()


def test_a_shifted_group_keeps_its_middle() -> None:
    groups = shifted()
    assert not groups.has_integer_zeros
    grid = LearnedGrid(groups)
    assert grid.low is grid.high
    moved(grid, 4)
    _, scale, zero_point = grid.chosen()
    assert groups.zero_point is not None
    assert zero_point is not None
    torch.testing.assert_close(zero_point * scale, groups.zero_point * groups.scale, rtol=1e-6, atol=1e-7)


def test_shifts_of_zero_are_no_codes() -> None:
    groups = groups_of(E2M1(), torch.ones(COUNT), torch.zeros(COUNT))
    assert not groups.has_integer_zeros


@pytest.mark.parametrize("made", EVERY)
def test_starts_at_the_nearest_or_at_any_level_that_it_is_told(made: object) -> None:
    groups: Groups = made()  # type: ignore[operator]
    nearest = LearnedGrid(groups)
    values = nearest.values()
    step = (groups.scale * groups.multiplier).unsqueeze(-1)
    zero = 0.0 if groups.zero_point is None else groups.zero_point.unsqueeze(-1)
    table = (groups.levels.values - zero) * step
    best = (groups.weight.unsqueeze(-1) - table.unsqueeze(1)).abs().amin(-1)
    torch.testing.assert_close((values - groups.weight).abs(), best, rtol=1e-5, atol=1e-6)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        start = groups.levels.codes[torch.randint(0, len(groups.levels.codes), (COUNT, SIZE), generator=generator)]
        grid = LearnedGrid(groups, start)
        codes, scale, zero_point = grid.chosen()
        assert torch.equal(codes, start)
        assert torch.equal(scale, groups.scale)
        assert zero_point is None or torch.equal(zero_point, groups.zero_point)
    # Those that are at the nearest level already are not moved, beyond the ends as well as between them.
    again = LearnedGrid(groups, nearest.chosen()[0])
    assert not again.anchor.any()


def test_the_start_is_the_middle_of_what_offsets_reach() -> None:
    groups = symmetric()
    start = groups.levels.codes[torch.randint(1, 7, (COUNT, SIZE), generator=torch.Generator().manual_seed(0))]
    grid = LearnedGrid(groups, start)
    reached = []
    for offset in (-0.5, 0.5):
        grid.offset = torch.full((COUNT, SIZE), offset)
        reached.append(groups.levels.places[grid.chosen()[0].long()] - groups.levels.places[start.long()])
    for change in reached:
        assert (change.abs() <= 1).all()
    assert ((reached[0] != 0) | (reached[1] != 0)).all()


def test_codes_that_decode_alike_stay_as_they_were() -> None:
    groups = groups_of(E2M1(), torch.full((COUNT,), 100.0))
    minus_zero = torch.full((COUNT, SIZE), 8, dtype=torch.uint8)
    grid = LearnedGrid(groups, minus_zero)
    assert torch.equal(grid.chosen()[0], minus_zero)
    grid.offset = torch.full((COUNT, SIZE), 0.5)
    changed = grid.chosen()[0]
    assert torch.equal(changed == 8, groups.weight <= 0)


@pytest.mark.parametrize("part", [1.0, 0.6])
def test_gradients_of_a_symmetric_range_are_those_of_a_fake_quantizer(part: float) -> None:
    groups = symmetric("bf16", part)
    sent, generator = random(COUNT, SIZE, seed=5), torch.Generator().manual_seed(6)
    start = (groups.weight / groups.scale.unsqueeze(-1)).round().clamp(-4, 3) + 4
    for grid in (LearnedGrid(groups), LearnedGrid(groups, start.to(torch.uint8))):
        grid.offset = (torch.rand(COUNT, SIZE, generator=generator) - 0.5).requires_grad_(True)
        grid.high = (0.6 + 0.4 * torch.rand(COUNT, generator=generator)).requires_grad_(True)
        factor, offset = grid.high.detach().clone().requires_grad_(), grid.offset.detach().clone().requires_grad_()
        expected = symmetric_oracle(groups.weight, as_stored(groups.scale * factor, torch.bfloat16), offset, bits=3)
        torch.testing.assert_close(grid.values(), expected)
        found = torch.autograd.grad(grid.values(), (grid.high, grid.offset), sent)
        wanted = torch.autograd.grad(expected, (factor, offset), sent)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_of_both_ends_are_those_of_a_fake_quantizer() -> None:
    groups = asymmetric()
    assert groups.zero_point is not None
    grid, sent = LearnedGrid(groups), random(COUNT, SIZE, seed=7)
    generator = torch.Generator().manual_seed(8)
    # Offsets alone are too small to be told from codes that are rounded at other places.
    grid.high, grid.low = ((0.7 + 0.3 * torch.rand(COUNT, generator=generator)).requires_grad_() for _ in range(2))
    grid.offset.requires_grad_(True)
    assert grid.low is not grid.high
    low, high = (end.detach().clone().requires_grad_(True) for end in (grid.low, grid.high))
    offset = torch.zeros(COUNT, SIZE, requires_grad=True)
    ends = (-groups.zero_point * groups.scale * low, (15 - groups.zero_point) * groups.scale * high)
    expected = asymmetric_oracle(groups.weight, ends, offset, bits=4, dtype=torch.bfloat16)
    torch.testing.assert_close(grid.values(), expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(grid.values(), (grid.low, grid.high, grid.offset), sent)
    wanted = torch.autograd.grad(expected, (low, high, offset), sent)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_block_scales_count_the_multiplier() -> None:
    groups = block_scaled()
    grid, sent = LearnedGrid(groups), random(COUNT, SIZE, seed=9)
    grid.high = torch.full((COUNT,), 0.73, requires_grad=True)
    factor = torch.full((COUNT,), 0.73, requires_grad=True)
    scale = (as_stored(groups.scale * factor, torch.float8_e4m3fn) * 0.013).unsqueeze(-1)
    levels, x = groups.levels.values, groups.weight / scale
    nearest = levels[(x.detach().unsqueeze(-1) - levels).abs().argmin(-1)]
    # The step at the ends is 2: up to one half of it beyond them, a value is still rounded and not cut off.
    passed = torch.where(x.abs() < 7, x, nearest)
    assert 0 < (x.abs() > 7).sum() < COUNT * SIZE // 4
    expected = (passed + (nearest - passed).detach()) * scale
    torch.testing.assert_close(grid.values(), expected)
    torch.testing.assert_close(
        torch.autograd.grad(grid.values(), grid.high, sent),
        torch.autograd.grad(expected, factor, sent),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_range_that_cuts_weights_off_wants_to_grow() -> None:
    """All of the error is beyond the upper end: more scale, less error; so it is where the start is a method's, too."""
    weight = torch.full((COUNT, SIZE), 7.0)
    levels = levels_of(Int4(), zero_points=False, device=CPU)
    groups = Groups(weight, torch.full((COUNT,), 0.8), None, torch.ones(COUNT), levels, "fp32")
    for start in (None, torch.full((COUNT, SIZE), 15, dtype=torch.uint8)):
        grid = LearnedGrid(groups, start)
        grid.high.requires_grad_(True)
        (gradient,) = torch.autograd.grad((grid.values() - weight).square().sum(), grid.high)
        assert (gradient < 0).all()
