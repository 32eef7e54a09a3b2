"""Blocks of a Hessian that are gathered in place of the whole are those of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.builtin.statistics.hessian import Hessian, HessianBlocks
from qtool.engine.gather import Gathering, SiteObserver
from qtool.numerics.second_moments import diagonal_blocks
from qtool.numerics.token_weights import parse_token_weight

RULES = ["uniform", "inverse-norm", "inverse-norm:0.5", "clip:1.05"]
WINDOW = 16
SIZES = {512: 128, 576: 64, 300: 4, 24: 8, 7: 1}
"""Channels, and those of a block."""


def gathered(x: Tensor, rule: str, *, batch: int) -> dict[str, Tensor]:
    gathering = Gathering(len(x), parse_token_weight(rule), window=WINDOW)
    observer = SiteObserver("layers.0.mlp_in", {"hessian": Hessian(), "hessian_blocks": HessianBlocks()}, gathering)
    for start in range(0, len(x), batch * WINDOW):
        observer(x[start : start + batch * WINDOW])
    return dict(observer.result().entries)


def tokens(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(12 * WINDOW, n, generator=generator) @ torch.randn(n, n, generator=generator) / n**0.5
    return x * (torch.rand(len(x), 1, generator=generator) * 3 + 0.1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("n", "size"), SIZES.items())
def test_they_are_those_of_the_whole(n: int, size: int, rule: str) -> None:
    found = gathered(tokens(n), rule, batch=5)
    blocks, whole = found["hessian_blocks"], found["hessian"]
    assert (blocks.shape, blocks.dtype) == ((n // size, size, size), torch.float32)
    assert torch.equal(blocks, blocks.mT)
    expected = diagonal_blocks(whole, size)
    torch.testing.assert_close(blocks, expected, rtol=0, atol=1e-6 * float(whole.abs().max()))
    assert float(expected.std()) > 0.01 * float(whole.abs().max())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", [1, 5])
def test_the_batch_does_not_matter(batch: int, rule: str) -> None:
    parts, joined = (gathered(tokens(512), rule, batch=one)["hessian_blocks"] for one in (batch, 12))
    torch.testing.assert_close(parts, joined, rtol=0, atol=1e-6 * float(joined.abs().max()))


@pytest.mark.parametrize("n", SIZES)
def test_their_size_is_known_beforehand(n: int) -> None:
    found = gathered(tokens(n), "uniform", batch=12)
    gathering = Gathering(1, parse_token_weight("uniform"))
    assert HessianBlocks().nbytes(n, gathering) == found["hessian_blocks"].nbytes
    assert Hessian().nbytes(n, gathering) == found["hessian"].nbytes
