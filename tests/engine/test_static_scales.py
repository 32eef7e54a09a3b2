"""Scales of activations that are found once: the search, what is stored of it, and what runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding
from qtool.engine.static_scales import biases_tried, calibrated_scales, needs_of_range, sum_of_squares
from qtool.model.plan import Segment
from qtool.numerics.minifloats import E1M2, E2M1, E3M0, Minifloat
from qtool.scheme import TensorScheme
from tests.builtin.format_cases import FORMATS, read
from tests.oracles import llm_fp4 as oracle

KINDS = [("fp4", E2M1), ("fp4_e1m2", E1M2), ("fp4_e3m0", E3M0)]


def grid_of(text: str) -> Grid:
    form, scheme = read(text)
    return Grid.of(scheme, form)


def inputs(tokens: int = 14, n: int = 6, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Return tokens with heavy tails, and two weights; the column with the largest values matters little."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator) ** 3
    x[:, 2] *= 20
    weights = [torch.randn(rows, n, generator=generator) for rows in (5, 3)]
    for weight in weights:
        weight[:, 2] /= 400
    return x, weights


def searched(text: str, x: Tensor, weights: list[Tensor]) -> float:
    (scale,), zeros = calibrated_scales(grid_of(text), x.abs().amax(0), x, weights)
    assert scale is not None
    assert scale.shape == ()
    assert zeros == (None,)
    return float(scale)


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize("unit", [1.0, 2.0**-9])
def test_it_finds_the_bias_with_the_least_output_error(name: str, kind: Minifloat, unit: float) -> None:
    fields = (kind.exponent_bits, kind.mantissa_bits)
    x, weights = inputs()
    x = x * unit
    scale = searched(f"{name}-tensor-static", x, weights)
    rows = torch.cat(weights).tolist()
    best, errors = oracle.searched_activation_bias(x.tolist(), rows, float(x.abs().max()), *fields)
    bias = 2 ** (kind.exponent_bits - 1) - 1 - math.log2(scale)
    assert bias == pytest.approx(best, abs=1e-5)
    start = oracle.bias_of(float(x.abs().max()), *fields)
    assert best - start > 0.5  # the whole range is not the best, or nothing would be tested
    assert errors[best] < 0.7 * errors[min(errors, key=lambda one: abs(one - start))]


def test_the_weights_decide() -> None:
    """The column with the largest values is clipped where little is made of it, and is not where much is."""
    x, weights = inputs()
    heavy = [weight * torch.tensor([1.0, 1, 800, 1, 1, 1]) for weight in weights]
    assert searched("fp4-tensor-static", x, heavy) > 1.5 * searched("fp4-tensor-static", x, weights)


def test_the_largest_of_all_tokens_is_where_the_search_starts() -> None:
    x, weights = inputs()
    amax = 3 * x.abs().max()
    (scale,), _ = calibrated_scales(grid_of("int8-tensor-sfp32-static"), amax.expand(6), x, weights)
    assert scale is not None
    bias = float((amax / 127 / scale).log2())
    assert min(abs(bias - tried) for tried in biases_tried()) < 1e-5
    assert bias > 1.5


def test_what_is_found_is_a_scale_as_it_is_stored() -> None:
    x, weights = inputs()
    for text, exact in (("fp4-tensor-sbf16-static", torch.bfloat16), ("int4-tensor-sfp16-static", torch.float16)):
        scale = torch.tensor(searched(text, x, weights))
        assert torch.equal(scale.to(exact).float(), scale)
    assert math.log2(searched("fp4-tensor-se8m0-static", x, weights)) % 1 == 0


def test_moments_are_those_of_all_rows() -> None:
    _, weights = inputs()
    rows = torch.cat(weights)
    torch.testing.assert_close(sum_of_squares(weights), rows.T @ rows)
    assert torch.equal(weights[0], inputs()[1][0])


def test_channels_set_apart_have_a_scale_of_their_own() -> None:
    x, weights = inputs(n=8)
    grid = Grid.segmented(
        TensorScheme("fp4", strategy="tensor", static=True), [Segment(3, "int8")], FORMATS.__getitem__
    )
    found, _ = calibrated_scales(grid, x.abs().amax(0), x, weights)
    assert [part.scheme.static for part in grid.parts] == [True, True]
    apart, _ = calibrated_scales(
        grid_of("int8-tensor-sfp32-static"), x[:, 5:].abs().amax(0), x[:, 5:], [one[:, 5:] for one in weights]
    )
    assert found[0] is not None
    assert torch.equal(found[1] or torch.zeros(()), apart[0] or torch.ones(()))
    rounded = Rounding(grid, found)(x)
    assert not torch.equal(rounded[:, :5], x[:, :5])
    steps = rounded[:, 5:] / float(found[1] or 0)
    torch.testing.assert_close(steps, steps.round())


def test_a_static_scale_does_not_follow_the_values() -> None:
    grid = grid_of("fp4-tensor-static")
    rounding = Rounding(grid, (torch.tensor(0.5),))
    assert not rounding.shared
    x = torch.tensor([[[0.3, 40.0], [0.1, -0.6]]])
    assert rounding(x).tolist() == [[[0.25, 3.0], [0.0, -0.5]]]
    assert torch.equal(rounding(x[:, 1:]), rounding(x)[:, 1:])
    dynamic = Rounding(grid)  # until it is calibrated
    assert dynamic.shared
    assert float(dynamic(x).abs().max()) == pytest.approx(40.0)


ASYMMETRIC = "int8-asym-tensor-sfp32-static"


def test_an_asymmetric_range_has_the_zero_point_and_the_scale_with_the_least_error() -> None:
    """Each candidate by hand: both ends times a ratio, widened to hold 0, and codes from 0 to 255."""
    x, weights = inputs()
    x = x + 3
    low, high = 2 * x.amin(0), 2 * x.amax(0)  # the sample need not hold the ends of the range
    (scale,), (zero,) = calibrated_scales(grid_of(ASYMMETRIC), torch.stack((low, high)), x, weights)
    rows, found = torch.cat(weights).double(), {}
    for ratio in (1.0, *(2.0**-bias for bias in biases_tried())):
        ends = [float(min(low.min(), 0)) * ratio, float(max(high.max(), 0)) * ratio]
        step = (ends[1] - ends[0]) / 255
        middle = min(max(round(-ends[0] / step), 0), 255)
        codes = ((x.double() / step).round() + middle).clamp(0, 255)
        found[float((((codes - middle) * step - x) @ rows.T).square().sum())] = (step, middle, ratio)
    step, middle, ratio = found[min(found)]
    assert ratio < 0.9  # the whole range is not the best, or nothing would be tested
    assert scale is not None
    assert zero is not None
    assert float(scale) == pytest.approx(step, rel=1e-6)
    assert float(zero) == middle
    assert 0 < middle < 128


@pytest.mark.parametrize(("shift", "zero"), [(9.0, 0.0), (-9.0, 255.0)])
def test_a_range_on_one_side_of_zero_holds_it(shift: float, zero: float) -> None:
    x, weights = torch.rand(14, 6, generator=torch.Generator().manual_seed(0)) + shift, [torch.eye(6)]
    extremes = torch.stack((x.amin(0), x.amax(0)))
    (scale,), (found,) = calibrated_scales(grid_of(ASYMMETRIC), extremes, x, weights)
    assert scale is not None
    assert found is not None
    assert float(found) == zero
    rounded = Rounding(grid_of(ASYMMETRIC), (scale,), zero_points=(found,))
    assert float((rounded(x) - x).abs().max()) < 0.03
    assert float(rounded(torch.zeros(1, 6)).abs().max()) == 0


def test_a_static_zero_point_does_not_follow_the_values() -> None:
    rounding = Rounding(grid_of(ASYMMETRIC), (torch.tensor(0.5),), zero_points=(torch.tensor(3.0),))
    assert not rounding.shared
    x = torch.tensor([[[-9.0, 0.3, 40.0, 300.0], [0.1, -0.6, -1.5, 126.2]]])
    assert rounding(x).tolist() == [[[-1.5, 0.5, 40.0, 126.0], [0.0, -0.5, -1.5, 126.0]]]
    dynamic = Rounding(grid_of(ASYMMETRIC))  # until it is calibrated
    assert dynamic.shared
    wide = dynamic(x)
    assert float(wide.max()) == pytest.approx(300.0, rel=0.005)
    assert float(wide.min()) == pytest.approx(-9.0, abs=309 / 255)
    assert wide.unique().numel() > 3


def test_only_asymmetric_static_scales_read_both_ends() -> None:
    assert needs_of_range(grid_of(ASYMMETRIC)) == ("min", "max")
    for text in ("int8-tensor-static", "nvfp4", "int8-asym-token", "fp8-tensor-static"):
        assert needs_of_range(grid_of(text)) == ("absmax",)
