from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qtool.errors import ShapeError
from qtool.numerics import lowrank
from qtool.numerics.losses import loss_ratio, output_energy, relative_loss
from qtool.numerics.lowrank import (
    best_down,
    best_up,
    leading_eigenvectors,
    projected_out,
    quantize_components,
    truncated_svd,
    weighted_truncation,
)
from qtool.numerics.moments import PANEL
from tests.oracles.lowrank import lorc_oracle, matrix_root, output_error, weighted_oracle


def noise(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_is_the_nearest_matrix_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    error = noise(*shape)
    up, down = truncated_svd(error, rank)
    expected, least = lorc_oracle(error, torch.zeros_like(error), rank)
    torch.testing.assert_close(up @ down, expected, rtol=0, atol=1e-10)
    sigma = torch.linalg.svdvals(error)
    left = float((error - up @ down).square().sum())
    assert left == pytest.approx(least, rel=1e-8, abs=1e-20)
    assert left == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-8, abs=1e-20)


def test_both_factors_take_the_root_of_the_singular_values() -> None:
    error = noise(24, 40)
    up, down = truncated_svd(error, 6)
    sigma = torch.diag(torch.linalg.svdvals(error)[:6])
    torch.testing.assert_close(up.T @ up, sigma, rtol=0, atol=1e-10)
    torch.testing.assert_close(down @ down.T, sigma, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [0, 25])
def test_a_rank_that_the_matrix_does_not_have_is_refused(rank: int) -> None:
    with pytest.raises(ShapeError, match=f"no part of rank {rank}\nhint: rank=24"):
        truncated_svd(noise(24, 40), rank)


class TestRandomized:
    @pytest.fixture(autouse=True)
    def small_matrices_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lowrank, "_EXACT_UP_TO", 32)

    def test_keeps_nearly_the_energy_of_the_best_even_of_noise(self) -> None:
        error = noise(300, 200)
        up, down = truncated_svd(error, 10)
        best = float(torch.linalg.svdvals(error)[:10].square().sum())
        assert 0.97 * best < float((up @ down).square().sum()) < best
        torch.testing.assert_close(up.T @ up, down @ down.T, rtol=0, atol=1e-8)

    def test_finds_a_low_rank_matrix_under_noise(self) -> None:
        error = noise(300, 8, 1) @ noise(8, 200, 2) + 0.01 * noise(300, 200, 3)
        up, down = truncated_svd(error, 8)
        _, least = lorc_oracle(error, torch.zeros_like(error), 8)
        assert float((error - up @ down).square().sum()) == pytest.approx(least, rel=1e-8)

    def test_only_where_the_rank_is_small(self) -> None:
        error = noise(100, 60)
        up, down = truncated_svd(error, 15)
        _, least = lorc_oracle(error, torch.zeros_like(error), 15)
        assert float((error - up @ down).square().sum()) == pytest.approx(least, rel=1e-10)

    def test_the_seed_decides_and_the_global_state_stays(self) -> None:
        error = noise(300, 200)
        state = torch.get_rng_state()
        first, again, other = (truncated_svd(error, 10, seed=seed)[0] for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.allclose(first, other)
        assert torch.equal(torch.get_rng_state(), state)


def moments(n: int, samples: int, seed: int = 1) -> Tensor:
    """The second moments of inputs that differ in size, of rank ``samples`` at most."""
    inputs = noise(n, samples, seed) * torch.linspace(0.1, 3.0, n, dtype=torch.float64).unsqueeze(-1)
    return inputs @ inputs.T / samples


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
class TestWeighted:
    @pytest.mark.parametrize("rank", [1, 5, 24])
    def test_is_the_best_correction_under_the_moments(self, shape: tuple[int, int], rank: int) -> None:
        error, seen = noise(*shape), moments(shape[1], 100)
        up, down = weighted_truncation(error, seen, rank)
        expected, least = weighted_oracle(error, matrix_root(seen), rank)
        torch.testing.assert_close(up @ down, expected, rtol=0, atol=1e-8)
        assert output_error(error - up @ down, seen) == pytest.approx(least, rel=1e-8, abs=1e-18)

    def test_nothing_of_its_rank_does_better(self, shape: tuple[int, int]) -> None:
        error, seen = noise(*shape), moments(shape[1], 100)
        up, down = weighted_truncation(error, seen, 3)
        least = output_error(error - up @ down, seen)
        for seed, size in enumerate((1e-4, 1e-3, 1e-2, 0.1)):
            moved_up, moved_down = up + size * noise(*up.shape, seed), down + size * noise(*down.shape, seed + 9)
            assert output_error(error - moved_up @ down, seen) > least
            assert output_error(error - up @ moved_down, seen) > least

    @pytest.mark.parametrize("rank", [2, 24])
    def test_the_diagonal_stands_for_a_diagonal_matrix(self, shape: tuple[int, int], rank: int) -> None:
        error, seen = noise(*shape), moments(shape[1], 100).diagonal()
        up, down = weighted_truncation(error, seen, rank)
        expected, _ = weighted_oracle(error, torch.diag(seen.sqrt()), rank)
        torch.testing.assert_close(up @ down, expected, rtol=0, atol=1e-8)
        dense_up, dense_down = weighted_truncation(error, torch.diag(seen), rank)
        torch.testing.assert_close(dense_up @ dense_down, up @ down, rtol=0, atol=1e-8)

    @pytest.mark.parametrize("size", [1.0, 0.0])
    def test_of_white_inputs_and_of_none_it_is_the_truncated_svd(self, shape: tuple[int, int], size: float) -> None:
        error = noise(*shape)
        up, down = weighted_truncation(error, size * torch.eye(shape[1]), 6)
        u, sigma, vh = torch.linalg.svd(error, full_matrices=False)
        root = sigma[:6].sqrt()
        torch.testing.assert_close(up @ down, u[:, :6] @ torch.diag(sigma[:6]) @ vh[:6], rtol=0, atol=1e-9)
        torch.testing.assert_close(up.abs(), (u[:, :6] * root).abs(), rtol=0, atol=1e-8)
        torch.testing.assert_close(down.abs(), (root[:, None] * vh[:6]).abs(), rtol=0, atol=1e-8)

    @pytest.mark.parametrize("size", [2.0**-60, 2.0**40])
    def test_the_unit_of_the_inputs_does_not_matter(self, shape: tuple[int, int], size: float) -> None:
        error, seen = noise(*shape), moments(shape[1], 100)
        up, down = weighted_truncation(error, seen, 4)
        other_up, other_down = weighted_truncation(error, size * seen, 4)
        torch.testing.assert_close(up @ down, other_up @ other_down, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("rank", [3, 12, 24])
    def test_fewer_samples_than_inputs_do_no_harm(self, shape: tuple[int, int], rank: int) -> None:
        error, seen = noise(*shape), moments(shape[1], 7)
        seen[[0, 5]] = seen[:, [0, 5]] = 0.0
        up, down = weighted_truncation(error, seen, rank)
        _, least = weighted_oracle(error, matrix_root(seen), rank)
        left = output_error(error - up @ down, seen)
        assert left == pytest.approx(least, rel=1e-6, abs=1e-9 * output_error(error, seen))
        # A projection: no column of the error grows, also none that is never seen.
        assert bool(((up @ down).norm(dim=0) <= error.norm(dim=0) * (1 + 1e-9)).all())
        if rank > 7:
            assert left < 1e-9 * output_error(error, seen)
            # What the inputs leave open, the weight decides.
            plain, seen_only = error - up @ down, weighted_truncation(error, seen, 7)
            assert float(plain.square().sum()) < float((error - seen_only[0] @ seen_only[1]).square().sum())

    def test_full_rank_leaves_nothing(self, shape: tuple[int, int]) -> None:
        error = noise(*shape)
        up, down = weighted_truncation(error, moments(shape[1], 100), 24)
        torch.testing.assert_close(up @ down, error, rtol=0, atol=1e-12)

    def test_the_two_vectors_of_a_component_are_alike_in_length(self, shape: tuple[int, int]) -> None:
        up, down = weighted_truncation(noise(*shape), moments(shape[1], 100), 6)
        torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-9, atol=0)
        torch.testing.assert_close(up.T @ up, torch.diag((up.T @ up).diagonal()), rtol=0, atol=1e-10)

    def test_it_stays_in_float32_and_leaves_what_it_is_given(self, shape: tuple[int, int]) -> None:
        error, seen = noise(*shape).float(), moments(shape[1], 100).float()
        kept = error.clone(), seen.clone()
        up, down = weighted_truncation(error, seen, 5)
        assert up.dtype == down.dtype == torch.float32
        assert torch.equal(error, kept[0])
        assert torch.equal(seen, kept[1])
        _, least = weighted_oracle(error, matrix_root(seen), 5)
        assert output_error(error - up @ down, seen) == pytest.approx(least, rel=1e-5)

    def test_an_error_of_zeros_needs_no_correction(self, shape: tuple[int, int]) -> None:
        up, down = weighted_truncation(torch.zeros(shape), moments(shape[1], 100).float(), 5)
        assert not up.any()
        assert not down.any()

    @pytest.mark.parametrize("rank", [0, 25])
    def test_a_rank_that_the_error_does_not_have_is_refused(self, shape: tuple[int, int], rank: int) -> None:
        with pytest.raises(ShapeError, match=f"no part of rank {rank}\nhint: rank=24"):
            weighted_truncation(noise(*shape), torch.eye(shape[1]), rank)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
class TestWeightedRandomized:
    @pytest.fixture(autouse=True)
    def small_matrices_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lowrank, "_EXACT_UP_TO", 32)

    def test_leaves_little_more_than_the_best(self, shape: tuple[int, int]) -> None:
        error, seen = noise(*shape), moments(shape[1], 400)
        up, down = weighted_truncation(error, seen, 10)
        _, least = weighted_oracle(error, matrix_root(seen), 10)
        left = output_error(error - up @ down, seen)
        assert least < left < 1.01 * least
        plain = truncated_svd(error, 10)
        assert left < 0.9 * output_error(error - plain[0] @ plain[1], seen)

    def test_finds_what_few_directions_of_the_inputs_see(self, shape: tuple[int, int]) -> None:
        inputs = torch.linalg.qr(noise(shape[1], shape[1], 4)).Q
        seen = inputs @ torch.diag(10.0 ** -torch.linspace(0, 40, shape[1], dtype=torch.float64)) @ inputs.T
        up, down = weighted_truncation(noise(*shape), seen, 8)
        _, least = weighted_oracle(noise(*shape), matrix_root(seen), 8)
        assert output_error(noise(*shape) - up @ down, seen) == pytest.approx(least, rel=1e-6)

    def test_the_seed_decides(self, shape: tuple[int, int]) -> None:
        error, seen = noise(*shape), moments(shape[1], 400)
        first, again, other = (weighted_truncation(error, seen, 10, seed=seed)[0] for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_relative_loss_is_the_ratio_of_output_energies() -> None:
    weight, inputs = noise(6, 10), noise(10, 50, 1)
    hessian = inputs @ inputs.T / 50
    rounded = (weight * 2).round() / 2
    expected = output_error(weight - rounded, hessian) / output_error(weight, hessian)
    assert relative_loss(weight, rounded, hessian) == pytest.approx(expected, rel=1e-12)
    measured = ((weight - rounded) @ inputs).square().sum() / (weight @ inputs).square().sum()
    assert relative_loss(weight, rounded, hessian) == pytest.approx(float(measured), rel=1e-12)
    assert output_energy(weight, hessian) == pytest.approx(float((weight @ inputs).square().sum() / 50), rel=1e-12)


@pytest.mark.parametrize("n", [PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 7])
def test_half_of_the_hessian_gives_the_energy_of_the_whole(n: int) -> None:
    matrix, inputs = noise(3, n), noise(n, 5, 1)
    expected = float((matrix @ inputs).square().sum())
    assert output_energy(matrix, inputs @ inputs.T) == pytest.approx(expected, rel=1e-10)


def test_without_a_hessian_it_is_the_error_of_the_weight() -> None:
    weight = noise(6, 10)
    assert relative_loss(weight, 0.9 * weight) == pytest.approx(0.01)
    identity = torch.eye(10, dtype=torch.float64)
    assert relative_loss(weight, 0.7 * weight, identity) == pytest.approx(0.09)


def test_losses_without_a_signal() -> None:
    zero = torch.zeros(2, 3)
    assert relative_loss(zero, zero, torch.eye(3)) == 0.0
    assert relative_loss(zero, zero + 1, torch.eye(3)) == float("inf")
    assert loss_ratio(0.0, 0.0) == 0.0


class TestOneFactorBesideTheOther:
    def test_each_is_a_least_squares_solution_over_tokens(self) -> None:
        error, inputs, up, down = noise(24, 40), noise(40, 100, 1), noise(24, 5, 2), noise(5, 40, 3)
        hessian = inputs @ inputs.T
        expected = torch.linalg.lstsq((down @ inputs).T, (error @ inputs).T).solution.T
        torch.testing.assert_close(best_up(error, down, hessian), expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(best_down(error, up), torch.linalg.lstsq(up, error).solution, rtol=0, atol=1e-9)

    def test_components_that_say_nothing_do_no_harm(self) -> None:
        error, inputs, up, down = noise(24, 40), noise(40, 100, 1), noise(24, 5, 2), noise(5, 40, 3)
        up[:, 4], down[4], hessian = up[:, 3], down[3], inputs @ inputs.T
        alone = best_up(error, down[:4], hessian) @ down[:4]
        torch.testing.assert_close(best_up(error, down, hessian) @ down, alone, rtol=0, atol=1e-9)
        alone = up[:, :4] @ best_down(error, up[:, :4])
        torch.testing.assert_close(up @ best_down(error, up), alone, rtol=0, atol=1e-9)
        down[4] = 0.0
        torch.testing.assert_close(best_up(error, down, hessian)[:, 4], torch.zeros(24).double())

    def test_in_turn_they_reach_the_best_of_their_rank(self) -> None:
        error, seen = noise(12, 16), moments(16, 100)
        up, down = noise(12, 3, 5), noise(3, 16, 6)
        losses = []
        for _ in range(500):
            up = best_up(error, down, seen)
            down = best_down(error, up)
            losses.append(output_error(error - up @ down, seen))
        assert all(after <= before * (1 + 1e-12) for before, after in pairwise(losses))
        assert losses[-1] == pytest.approx(weighted_oracle(error, matrix_root(seen), 3)[1], rel=1e-6)


class TestLeadingEigenvectors:
    @pytest.mark.parametrize("rank", [1, 7, 40])
    def test_what_they_leave_is_the_rest_of_the_spectrum(self, rank: int) -> None:
        seen = moments(40, 100)
        values, vectors = torch.linalg.eigh(seen)
        leading = leading_eigenvectors(seen, rank)
        torch.testing.assert_close(leading.T @ leading, torch.eye(rank).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(leading.T @ seen @ leading, torch.diag(values.flip(0)[:rank]), rtol=0, atol=1e-10)
        left = vectors[:, : 40 - rank] @ torch.diag(values[: 40 - rank]) @ vectors[:, : 40 - rank].T
        torch.testing.assert_close(projected_out(seen, leading), left, rtol=0, atol=1e-9)
        error = noise(24, 40)
        correction = error @ leading @ leading.T
        assert output_error(error - correction, seen) == pytest.approx(output_error(error, left), rel=1e-8, abs=1e-18)

    def test_a_large_matrix_takes_the_randomized_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = torch.linalg.qr(noise(200, 200, 4)).Q
        seen = inputs @ torch.diag(10.0 ** -torch.linspace(0, 40, 200, dtype=torch.float64)) @ inputs.T
        exact = leading_eigenvectors(seen, 8)
        monkeypatch.setattr(lowrank, "_EXACT_UP_TO", 32)
        found = leading_eigenvectors(seen, 8)
        assert not torch.equal(found, exact)
        torch.testing.assert_close((found.T @ exact).abs(), torch.eye(8).double(), rtol=0, atol=1e-6)

    def test_any_directions_are_projected_out_on_both_sides(self) -> None:
        seen, basis = moments(40, 100), torch.linalg.qr(noise(40, 5, 8)).Q
        apart = torch.eye(40).double() - basis @ basis.T
        torch.testing.assert_close(projected_out(seen, basis), apart @ seen @ apart, rtol=0, atol=1e-9)

    def test_dead_inputs_stay_dead_and_others_keep_a_floor(self) -> None:
        seen = moments(40, 100)
        seen[[0, 5]] = seen[:, [0, 5]] = 0.0
        left = projected_out(seen, leading_eigenvectors(seen, 40))
        assert not left[[0, 5]].any()
        assert not left[:, [0, 5]].any()
        floor = left.diagonal()[[1, 2, 3, 39]]
        torch.testing.assert_close(floor / (1e-10 * seen.diagonal().mean()), torch.ones(4).double(), rtol=1e-3, atol=0)
        assert projected_out(seen.float(), leading_eigenvectors(seen.float(), 3)).dtype == torch.float32

    def test_more_than_there_are_is_refused(self) -> None:
        with pytest.raises(ShapeError, match="no part of rank 41"):
            leading_eigenvectors(moments(40, 100), 41)


def test_components_are_rounded_by_themselves() -> None:
    factor = noise(4, 300).float() * torch.tensor([1.0, 1e-3, 50.0, 0.0]).unsqueeze(-1)
    codes, scale = quantize_components(factor)
    assert codes.abs().amax(-1).tolist() == [127, 127, 127, 0]
    torch.testing.assert_close(scale.float(), factor.abs().amax(-1) / 127, rtol=1e-2, atol=0)
    far = (codes.float() * scale.float().unsqueeze(-1) - factor).abs()
    # A scale that was rounded down clips its largest value by no more than it was rounded.
    assert bool((far <= 0.501 * scale.float().unsqueeze(-1) + 127 * 2.0**-11 * scale.float().unsqueeze(-1)).all())
    assert float(scale[3]) == 0.0
    assert bool(torch.isinf(quantize_components(torch.full((1, 2), 1e8))[1]).all())
