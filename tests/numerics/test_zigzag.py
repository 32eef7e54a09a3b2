"""Zig-zag orders: cards dealt to and fro, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.errors import ShapeError
from qtool.numerics.zigzag import zigzag_order


def dealt_by_hand(magnitudes: Tensor, blocks: int) -> list[int]:
    """Walk over the blocks there and back, and give each the largest channel that is left."""
    left = list(range(len(magnitudes)))
    hands: list[list[int]] = [[] for _ in range(blocks)]
    block, step = 0, 1
    while left:
        largest = max(left, key=lambda channel: float(magnitudes[channel]))
        hands[block].append(largest)
        left.remove(largest)
        if not 0 <= block + step < blocks:
            step = -step  # the last to be dealt to is the first on the way back
        else:
            block += step
    return [channel for hand in hands for channel in hand]


@pytest.mark.parametrize(("n", "blocks"), [(12, 3), (12, 4), (30, 6), (8, 1), (8, 8), (8, 2)])
def test_it_deals_to_and_fro(n: int, blocks: int) -> None:
    magnitudes = torch.rand(n, generator=torch.Generator().manual_seed(n + blocks))
    before = magnitudes.clone()
    assert zigzag_order(magnitudes, blocks).tolist() == dealt_by_hand(magnitudes, blocks)
    assert torch.equal(magnitudes, before)


def test_blocks_become_alike() -> None:
    """Any two sums differ by at most the largest channel; a plain order is far from it."""
    magnitudes = torch.rand(64, generator=torch.Generator().manual_seed(0)) ** 8
    sums = magnitudes[zigzag_order(magnitudes, 8)].reshape(8, 8).sum(1)
    assert float(sums.max() - sums.min()) <= float(magnitudes.max())
    plain = magnitudes.sort(descending=True).values.reshape(8, 8).sum(1)
    assert float(plain.max() - plain.min()) > 4 * float(magnitudes.max())


@pytest.mark.parametrize("blocks", [0, 5, 13])
def test_blocks_that_do_not_divide_are_refused(blocks: int) -> None:
    with pytest.raises(ShapeError, match="blocks do not divide the channels"):
        zigzag_order(torch.rand(12), blocks)
