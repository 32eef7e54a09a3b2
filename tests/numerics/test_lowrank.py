from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.errors import ShapeError
from qtool.numerics import lowrank
from qtool.numerics.losses import loss_ratio, output_energy, relative_loss
from qtool.numerics.lowrank import truncated_svd
from qtool.numerics.moments import PANEL
from tests.oracles.lowrank import lorc_oracle, output_error


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
