"""Regressions from moments are those that one gets from the tokens themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.numerics.regression import Moments, affine_fit, low_rank_fit

N, TOKENS = 7, 120


def tokens(seed: int = 0, *, count: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with a mean, what is lacking of outputs, and the outputs, a row a token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(count, N) @ (draw(N, N) + 3 * torch.eye(N)) + 2 * draw(N)
    lacking = x @ draw(N, N) * 0.3 + draw(count, N) + 3 * draw(N)
    return x, lacking, draw(count, N) * 4


def moments_of(x: Tensor, lacking: Tensor, outputs: Tensor, *, batch: int = 1000) -> Moments:
    moments = Moments.empty(x.shape[1], torch.device("cpu"))
    for start in range(0, len(x), batch):
        rows = slice(start, start + batch)
        moments.add(x[rows], lacking[rows], outputs[rows])
    return moments


def least_squares(x: Tensor, lacking: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """``min Σ ‖d - M x - b‖² + tokens λ ‖M‖²`` with a column of ones, which the second term leaves out."""
    size = (ridge * len(x) * (x - x.mean(0)).square().mean(0).mean()).sqrt()
    left = torch.cat([torch.cat([x, torch.ones(len(x), 1)], 1), torch.cat([size * torch.eye(N), torch.zeros(N, 1)], 1)])
    right = torch.cat([lacking, torch.zeros(N, N)])
    solution = torch.linalg.lstsq(left, right.double()).solution
    return solution[:N].T, solution[N]


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_full_rank_is_least_squares_with_a_column_of_ones(ridge: float) -> None:
    x, lacking, outputs = tokens()
    up, down, bias = low_rank_fit(moments_of(x, lacking, outputs), N, ridge)
    matrix, shift = least_squares(x, lacking, ridge)
    torch.testing.assert_close(up @ down, matrix, rtol=0, atol=1e-7)
    torch.testing.assert_close(bias, shift, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rank", range(1, N + 1))
def test_a_rank_is_the_best_of_that_rank(rank: int) -> None:
    """The fitted values of the optimum are those of the full fit, cut off at a rank: Eckart and Young."""
    x, lacking, outputs = tokens(1)
    up, down, bias = low_rank_fit(moments_of(x, lacking, outputs), rank, 0.0)
    assert up.shape == (N, rank)
    assert down.shape == (rank, N)
    matrix, _ = least_squares(x, lacking, 0.0)
    fitted = (x - x.mean(0)) @ matrix.T
    u, sizes, v = torch.linalg.svd(fitted, full_matrices=False)
    expected = (u[:, :rank] * sizes[:rank]) @ v[:rank] + lacking.mean(0)
    torch.testing.assert_close(x @ (up @ down).T + bias, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-9, atol=0)


def test_with_a_ridge_a_rank_is_the_best_of_the_ridged_error() -> None:
    """No other matrix of the rank has a lower sum of error and ridge: tried around the optimum and at random."""
    x, lacking, outputs = tokens(2)
    ridge = 0.1
    up, down, bias = low_rank_fit(moments_of(x, lacking, outputs), 2, ridge)
    size = ridge * len(x) * (x - x.mean(0)).square().mean(0).mean()

    def cost(left: Tensor, right: Tensor) -> float:
        shift = (lacking - x @ (left @ right).T).mean(0)
        return float((lacking - x @ (left @ right).T - shift).square().sum() + size * (left @ right).square().sum())

    torch.testing.assert_close(bias, (lacking - x @ (up @ down).T).mean(0), rtol=0, atol=1e-9)
    best, generator = cost(up, down), torch.Generator().manual_seed(0)
    for step in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            left, right = (torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in (up, down))
            assert cost(up + step * left, down + step * right) > best


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_factors_are_a_regression_of_each_channel(ridge: float) -> None:
    x, lacking, outputs = tokens(3)
    scale, bias = affine_fit(moments_of(x, lacking, outputs), ridge)
    size = (ridge * len(x) * (x - x.mean(0)).square().mean(0).mean()).sqrt()
    for channel in range(N):
        ones = torch.ones(len(x), dtype=torch.float64)
        rows = torch.cat([torch.stack([x[:, channel], ones], 1), torch.stack([size, size * 0])[None]])
        answers = torch.cat([lacking[:, channel], torch.zeros(1)])
        expected = torch.linalg.lstsq(rows, answers[:, None]).solution.flatten()
        assert float(scale[channel]) == pytest.approx(float(expected[0]), abs=1e-10)
        assert float(bias[channel]) == pytest.approx(float(expected[1]), abs=1e-9)


def test_the_error_of_any_matrix_and_bias() -> None:
    x, lacking, outputs = tokens(4)
    matrix, bias = torch.randn(N, N).double(), torch.randn(N).double()
    expected = (lacking - x @ matrix.T - bias).square().sum() / outputs.square().sum()
    moments = moments_of(x, lacking, outputs)
    assert moments.error(matrix, bias) == pytest.approx(float(expected), rel=1e-10)
    nothing = moments.error(torch.zeros(N, N), torch.zeros(N))
    assert nothing == pytest.approx(float(lacking.square().sum() / outputs.square().sum()), rel=1e-12)


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_the_batch_does_not_matter_and_nothing_is_modified(batch: int) -> None:
    x, lacking, outputs = (one.float() for one in tokens(5))
    kept = [one.clone() for one in (x, lacking, outputs)]
    whole, parts = moments_of(x, lacking, outputs), moments_of(x, lacking, outputs, batch=batch)
    assert whole.count == parts.count == TOKENS
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(parts, name), value, rtol=1e-12, atol=1e-10)
    assert all(torch.equal(one, before) for one, before in zip((x, lacking, outputs), kept, strict=True))
    before = {name: torch.as_tensor(value).clone() for name, value in vars(whole).items()}
    low_rank_fit(whole, 2, 0.1), affine_fit(whole, 0.1), whole.error(torch.eye(N), torch.ones(N))
    assert all(torch.equal(torch.as_tensor(value), before[name]) for name, value in vars(whole).items())


def test_inputs_that_never_change() -> None:
    x, lacking, outputs = tokens(6)
    constant = torch.full_like(x, 2.0)
    up, down, bias = low_rank_fit(moments_of(constant, lacking, outputs), N, 0.01)
    torch.testing.assert_close(constant[0] @ (up @ down).T + bias, lacking.mean(0), rtol=0, atol=1e-6)
    x[:, 2] = 5.0
    for ridge in (0.0, 0.01):
        up, down, bias = low_rank_fit(moments_of(x, lacking, outputs), N, ridge)
        left = (lacking - x @ (up @ down).T - bias).square().sum()
        assert float(left) < float((lacking - lacking.mean(0)).square().sum())
        scale, _ = affine_fit(moments_of(x, lacking, outputs), ridge)
        assert float(scale[2].abs()) < 1e-2
    nothing = low_rank_fit(moments_of(x, lacking * 0, outputs), 3, 0.0)
    assert all(bool((one == 0).all()) for one in (nothing[0] @ nothing[1], nothing[2]))
