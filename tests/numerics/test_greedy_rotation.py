"""Greedy rotations, against a loop that multiplies dense matrices from the start at each step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qtool.errors import ShapeError
from qtool.numerics.greedy_rotation import ROWS, greedy_rotation, spreading_rotations


def rotation_by_hand(x: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Equations 2 and 3 of the paper for one block ``[tokens, size]``."""
    size = x.shape[1]
    steps, found = [np.eye(size)], np.eye(size)
    for rotation in rotations:
        magnitudes = np.abs(x @ found).max(0)
        c = int(np.argmax(magnitudes))
        swap = np.eye(size)
        swap[[0, c]] = swap[[c, 0]]
        found = found @ swap @ rotation @ swap
        steps.append(found)
    return min(steps, key=lambda r: float(np.abs(x @ r).max()))


def values_of(tokens: int, blocks: int, size: int, seed: int = 0) -> Tensor:
    """Values with a loud channel and a loud token in places that differ from block to block."""
    x = torch.randn(tokens, blocks, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for block in range(blocks):
        x[:, block, (3 * block + 1) % size] *= 20
        x[block, block, block % size] = -200
    return x


def drawn(size: int, steps: int) -> Tensor:
    return spreading_rotations(size, steps, torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", [2, 3, 8, 32])
def test_spreading_rotations(size: int) -> None:
    rotations = drawn(size, 4)
    for rotation in rotations:
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
        torch.testing.assert_close(rotation[0], torch.full((size,), size**-0.5, dtype=torch.float64))
    assert not torch.allclose(rotations[0], rotations[1])


@pytest.mark.parametrize(("tokens", "blocks", "size", "steps"), [(20, 3, 8, 30), (9, 1, 16, 40), (2, 2, 4, 7)])
def test_it_is_the_papers_loop(tokens: int, blocks: int, size: int, steps: int) -> None:
    x, rotations = values_of(tokens, blocks, size), drawn(size, steps)
    before = x.clone()
    found = greedy_rotation(x, rotations)
    assert torch.equal(x, before)
    for block in range(blocks):
        expected = torch.from_numpy(rotation_by_hand(x[:, block].numpy(), rotations.numpy()))
        torch.testing.assert_close(found[block], expected, rtol=0, atol=1e-9)


def test_a_lone_outlier_is_spread_evenly() -> None:
    x = torch.zeros(1, 1, 16, dtype=torch.float64)
    x[0, 0, 5] = 8
    found = greedy_rotation(x, drawn(16, 1))
    torch.testing.assert_close((x[0, 0] @ found[0]).abs(), torch.full((16,), 2.0, dtype=torch.float64))


def test_quiet_rows_change_nothing() -> None:
    x = values_of(ROWS - 8, 2, 8)
    quiet = 1e-3 * torch.randn(300, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotations = drawn(8, 20)
    torch.testing.assert_close(
        greedy_rotation(torch.cat([quiet, x]), rotations), greedy_rotation(x, rotations), rtol=0, atol=1e-12
    )


def test_it_is_orthogonal_to_float64_whatever_the_values_are() -> None:
    found = greedy_rotation(values_of(64, 3, 32).float(), drawn(32, 200))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found @ found.mT, torch.eye(32).double().expand(3, 32, 32), rtol=0, atol=1e-14)


def test_it_is_never_louder_than_before_and_quieter_with_outliers() -> None:
    x = values_of(100, 4, 32)
    rotated = torch.einsum("tbi,bij->tbj", x, greedy_rotation(x, drawn(32, 64)))
    before, after = x.abs().amax((0, 2)), rotated.abs().amax((0, 2))
    assert bool((after < 0.4 * before).all())
    even = torch.ones(3, 1, 4, dtype=torch.float64)
    even[1, 0, 1] = even[2, 0, 2] = -1
    assert float((even @ greedy_rotation(even, drawn(4, 16))[0]).abs().max()) <= 1 + 1e-12


def test_what_does_not_fit_is_refused() -> None:
    for tokens, size in ((0, 8), (3, 4)):
        with pytest.raises(ShapeError, match="rotations do not fit the values"):
            greedy_rotation(torch.zeros(tokens, 2, size), drawn(8, 2).float())
