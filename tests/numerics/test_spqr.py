from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from qtool.errors import ShapeError
from qtool.numerics.gptq import ColumnGrid, factorize_inverse, gptq_round
from qtool.numerics.integers import decode_integers, encode_integers, fit_real, round_integers
from qtool.numerics.second_level import store_second_level
from qtool.numerics.spqr import RangeColumns, leave_one_out_gain, outlier_threshold, spqr_round
from qtool.scheme import GroupParameters
from tests.oracles.spqr import SpQROptions, group_loss, spqr_oracle


def problem(seed: int = 0, n_out: int = 20, n_in: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with a few large entries, a damped Hessian of correlated inputs, and the factor of its inverse."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_in, n_in // 3, generator=generator, dtype=torch.float64)
    hidden = torch.randn(n_in // 3, 4 * n_in, generator=generator, dtype=torch.float64)
    noise = torch.randn(n_in, 4 * n_in, generator=generator, dtype=torch.float64)
    sizes = torch.linspace(0.3, 2.0, n_in, dtype=torch.float64)[torch.randperm(n_in, generator=generator)]
    inputs = sizes[:, None] * (mixing @ hidden + 0.5 * noise)
    weight = torch.randn(n_out, n_in, generator=generator, dtype=torch.float64)
    weight *= 1 + 5 * (torch.rand(n_out, n_in, generator=generator, dtype=torch.float64) < 0.03)
    hessian = inputs @ inputs.T / inputs.shape[1]
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return weight, hessian, factorize_inverse(hessian, 0.0).upper


def plain(groups: Tensor, bits: int) -> GroupParameters:
    return GroupParameters(*fit_real(groups, num_bits=bits, scale_format="fp32"))


def two_levels(groups: Tensor, bits: int) -> GroupParameters:
    silent = (groups == 0).all(-1)
    return store_second_level(plain(groups, bits), silent, num_bits=3, block=16, scale_format="fp16")


def columns(n: int, size: int, bits: int, fit: Callable[[Tensor, int], GroupParameters] = plain) -> RangeColumns:
    return RangeColumns(n, size, bits, partial(fit, bits=bits))


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(("bits", "tau"), [(2, 0.2), (3, 0.05), (3, 1e9), (4, 0.02)])
def test_equals_the_paper_weight_by_weight(bits: int, tau: float, coded: bool) -> None:
    weight, hessian, upper = problem(bits)
    grid = columns(32, 8, bits, two_levels if coded else plain)
    found = spqr_round(weight, upper, grid=[grid], tau=tau)
    expected = spqr_oracle(weight, hessian, SpQROptions(bits, 8, tau, second_bits=3 if coded else 0))
    assert torch.equal(found.outliers, expected.outliers)
    assert bool(found.outliers.any()) == (tau < 1e9)
    inside = ~expected.outliers
    assert torch.equal(found.codes[inside].long(), expected.codes[inside])
    torch.testing.assert_close(found.values, expected.weight, rtol=2e-4, atol=2e-5)
    (own,) = found.parameters
    decoded = decode_integers(found.codes.reshape(20, 4, 8), own.step(), own.zero_point, bits).reshape(20, 32)
    torch.testing.assert_close(decoded.double()[inside], found.values[inside], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4])
def test_without_outliers_it_is_gptq_with_fresh_groups(bits: int) -> None:
    weight, hessian, upper = problem()
    part = columns(32, 8, bits)
    found = spqr_round(weight, upper, grid=[part])
    same = ColumnGrid(
        8,
        fit=lambda groups, _: part.fit(groups),
        round=lambda x, own: round_integers(x, own.step(), own.zero_point, bits),
        encode=lambda x, own: encode_integers(x, own.step(), own.zero_point, bits),
    )
    expected = gptq_round(weight, hessian, grid=[same], dampening_frac=0.0, parameters="fresh")
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.parameters[0].scale, expected.parameters[0].scale)
    torch.testing.assert_close(found.loss, expected.loss)
    assert not found.outliers.any()


@pytest.mark.parametrize("fit", [plain, two_levels])
def test_the_loss_is_that_of_the_result_and_outliers_are_not_propagated(
    fit: Callable[[Tensor, int], GroupParameters],
) -> None:
    weight, hessian, upper = problem(5)
    found = spqr_round(weight, upper, grid=[columns(32, 16, 3, fit)], tau=0.05)
    error = weight - found.values
    torch.testing.assert_close(found.loss, ((error @ hessian) * error).sum(1), rtol=1e-8, atol=0)
    assert torch.equal(found.values[found.outliers], found.values[found.outliers].half().double())


def test_a_lower_threshold_keeps_more_and_loses_less() -> None:
    weight, _, upper = problem(1)
    grid = [columns(32, 8, 2)]
    results = [spqr_round(weight, upper, grid=grid, tau=tau) for tau in (math.inf, 1.0, 0.3, 0.1, 0.03, 0.01, 0.0)]
    counts = [int(result.outliers.sum()) for result in results]
    assert counts == sorted(set(counts))
    assert counts[0] == 0
    # The ends of each range are on the grid, nearer than float16 comes.
    assert 0.7 * weight.numel() < counts[-1] <= 0.75 * weight.numel() + 80
    losses = [float(result.loss.sum()) for result in results]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("bits", [2, 3])
def test_leaving_one_out_is_refitting_without_it(bits: int) -> None:
    group, pivots = problem(2)[0][:, :8], torch.linspace(0.5, 2.0, 8, dtype=torch.float64)
    group[3, 1] = group[3].amax()  # a tie: what is left keeps its range
    gain = leave_one_out_gain(group, pivots, bits)
    squares = pivots.square().tolist()
    for row, values in enumerate(group.tolist()):
        every = group_loss(values, squares, bits)
        for i in range(8):
            rest = group_loss(values[:i] + values[i + 1 :], squares[:i] + squares[i + 1 :], bits)
            assert float(gain[row, i]) == pytest.approx(every - rest, rel=1e-4, abs=1e-5 * every)


def test_the_threshold_is_relative_to_columns_replaced_by_their_mean() -> None:
    weight, hessian, upper = problem(4)
    pivots = [float(torch.linalg.inv(hessian[col:, col:])[0, 0]) for col in range(32)]
    expected = sum(float(weight[:, col].var()) / pivots[col] for col in range(32)) / 32
    assert outlier_threshold(weight, upper, 0.3) == pytest.approx(0.3 * expected)
    assert outlier_threshold(weight[:1], upper, 0.3) == math.inf


def test_codes_below_outliers_stand_for_0_as_near_as_may_be() -> None:
    weight, _, upper = problem(5)
    found = spqr_round(weight, upper, grid=[columns(32, 16, 3)], tau=0.05)
    (own,) = found.parameters
    assert own.zero_point is not None
    nearest = own.zero_point.round().clamp(0, 7).repeat_interleave(16, dim=1)
    assert torch.equal(found.codes[found.outliers].float(), nearest[found.outliers])


def test_groups_of_one_value_have_it_exactly() -> None:
    weight = torch.tensor([[0.5] * 4, [-3.0] * 4, [0.0] * 4])
    found = spqr_round(weight, torch.eye(4), grid=[columns(4, 4, 3)])
    assert torch.equal(found.values, weight)
    for value in (0.5, -3.0, 0.0):
        same = torch.full((16, 4), value)
        coded = spqr_round(same, torch.eye(4), grid=[columns(4, 4, 3, two_levels)])
        torch.testing.assert_close(coded.values, same, rtol=2e-3, atol=1e-6)


def test_what_float16_cannot_hold_is_no_outlier() -> None:
    weight, _, upper = problem(3)
    grid = [columns(32, 8, 2)]
    assert float(weight.abs().amax()) * 2.0**14 > 65504
    large = spqr_round(weight * 2.0**14, upper, grid=grid, tau=0.01)
    assert torch.isfinite(large.values).all()
    assert large.outliers.any()
    small = spqr_round(weight * 2.0**-40, upper, grid=grid, tau=0.01)
    assert (small.values[small.outliers] == 0).all()
    assert not small.outliers.all()


def test_parts_side_by_side_have_their_own_bits() -> None:
    weight, _, upper = problem(6)
    grid = [columns(24, 8, 2), columns(8, 8, 8)]
    found = spqr_round(weight, upper, grid=grid)
    assert [own.scale.shape for own in found.parameters] == [(20, 3), (20, 1)]
    assert int(found.codes[:, :24].max()) == 3
    assert int(found.codes[:, 24:].max()) == 255


@pytest.mark.parametrize("parts", [[(32, 5)], [(16, 8)], [(40, 8)]])
def test_what_does_not_fit_is_refused(parts: list[tuple[int, int]]) -> None:
    weight, _, upper = problem()
    with pytest.raises(ShapeError, match="do not fit each other"):
        spqr_round(weight, upper, grid=[columns(n, size, 3) for n, size in parts])
