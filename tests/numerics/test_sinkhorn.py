"""Sinkhorn scales, against a slow loop over explicit matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qtool.numerics.sinkhorn import sinkhorn_scales


def sinq_by_hand(weight: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 on ``[out, repeat, in]``, each deviation taken over an explicit list of values."""
    out, repeat, n = weight.shape
    log_u, log_v = [0.0] * out, [0.0] * n
    best, least, target = (list(log_u), list(log_v)), float("inf"), None
    for step in range(iterations + 1):
        scaled = np.empty_like(weight)
        for i in range(out):
            for r in range(repeat):
                for j in range(n):
                    scaled[i, r, j] = weight[i, r, j] / np.exp(log_u[i]) / np.exp(log_v[j])
        of_rows = [float(np.std(scaled[i].reshape(-1))) for i in range(out)]
        of_columns = [float(np.std(scaled[:, :, j].reshape(-1))) for j in range(n)]
        target = min(of_rows + of_columns) if step == 0 else target
        imbalance = max(of_rows + of_columns) / min(of_rows + of_columns)
        if imbalance < least:
            least, best = imbalance, (list(log_u), list(log_v))
        for logs, deviations in ((log_u, of_rows), (log_v, of_columns)):
            for k, deviation in enumerate(deviations):
                logs[k] += np.log(min(max(deviation / target, 0.7), 2.0))
    u, v = (np.array(one) for one in best)
    return np.exp(u + v.mean()), np.exp(v - v.mean())


def weight_of(*shape: int, seed: int = 0) -> Tensor:
    """A weight whose rows and columns differ widely."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randn(shape[axis], generator=g, dtype=torch.float64).exp() for axis in (0, 2))
    return torch.randn(*shape, generator=g, dtype=torch.float64) * rows[:, None, None] * columns + 0.1


def imbalance(weight: Tensor, u: Tensor, v: Tensor) -> float:
    scaled = weight / u[:, None, None] / v
    every = torch.cat([scaled.std((1, 2), correction=0), scaled.std((0, 1), correction=0)])
    return float(every.max() / every.min())


@pytest.mark.parametrize("shape", [(10, 1, 7), (6, 3, 5), (5, 1, 4)])
@pytest.mark.parametrize("iterations", [0, 1, 2, 5, 16])
def test_it_is_the_papers_loop(shape: tuple[int, ...], iterations: int) -> None:
    weight = weight_of(*shape, seed=iterations)
    u, v = sinkhorn_scales(weight, iterations=iterations)
    expected_u, expected_v = sinq_by_hand(weight.numpy(), iterations)
    torch.testing.assert_close(u, torch.from_numpy(expected_u), rtol=1e-9, atol=0)
    torch.testing.assert_close(v, torch.from_numpy(expected_v), rtol=1e-9, atol=0)


def test_rows_and_columns_become_alike() -> None:
    weight = weight_of(64, 1, 48)
    before = weight.clone()
    u, v = sinkhorn_scales(weight)
    one = torch.ones(1, dtype=torch.float64)
    assert imbalance(weight, u, v) < 2 < 50 < imbalance(weight, one.expand(64), one.expand(48))
    assert float(v.log().mean()) == pytest.approx(0, abs=1e-12)
    assert torch.equal(weight, before)


def test_a_balanced_weight_is_left_alone() -> None:
    """Rows and columns of a Latin square hold the same values."""
    index = (torch.arange(6)[:, None] + torch.arange(6)) % 6
    u, v = sinkhorn_scales(torch.randn(6, generator=torch.Generator().manual_seed(0)).double()[index][:, None])
    torch.testing.assert_close(u, torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(v, torch.ones(6, dtype=torch.float64))


def test_rows_and_columns_without_spread_count_for_nothing() -> None:
    weight = weight_of(8, 1, 6)
    wider = torch.zeros(9, 1, 7, dtype=torch.float64)
    wider[:8, :, :6] = weight
    u, v = sinkhorn_scales(wider)
    assert (float(u[8]), float(v[6])) == (1.0, 1.0)
    assert bool(u.isfinite().all())
    assert bool(v.isfinite().all())
    for scale in sinkhorn_scales(torch.zeros(3, 1, 4)):
        assert scale.tolist() == [1.0] * len(scale)


def test_float32_is_near() -> None:
    weight = weight_of(32, 2, 24)
    for narrow, wide in zip(sinkhorn_scales(weight.float()), sinkhorn_scales(weight), strict=True):
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=0)
