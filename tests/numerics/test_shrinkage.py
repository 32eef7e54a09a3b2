"""Shrinkage: the shared mean counts as a number of tokens, no more and no less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.errors import NumericalError
from qtool.numerics.shrinkage import shrink


def mean_outer(x: Tensor) -> Tensor:
    """The mean of x xᵀ, one token after the other."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
    for token in x:
        total += torch.outer(token, token)
    return total / len(x)


@pytest.mark.parametrize(("tokens", "prior"), [(1, 4.0), (3, 12.0), (7, 4.0), (20, 4.0)])
def test_it_is_the_mean_over_the_tokens_and_copies_of_the_shared_ones(tokens: int, prior: float) -> None:
    generator = torch.Generator().manual_seed(tokens)
    own, shared = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (tokens, 4))
    expected = mean_outer(torch.cat([own, *[shared] * int(prior / 4)]))
    found = shrink(mean_outer(own), mean_outer(shared), tokens=tokens, prior=prior)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_ends_are_exact_and_nothing_is_modified() -> None:
    own, shared = torch.randn(2, 4, 4)
    kept = own.clone(), shared.clone()
    assert torch.equal(shrink(own, shared, tokens=3, prior=0.0), own)
    assert torch.equal(shrink(own, shared, tokens=0, prior=2.5), shared)
    shrink(own, shared, tokens=1, prior=1.0)
    assert torch.equal(own, kept[0])
    assert torch.equal(shared, kept[1])


def test_one_token_is_enough_for_a_positive_definite_result() -> None:
    generator = torch.Generator().manual_seed(0)
    own, shared = (mean_outer(torch.randn(n, 6, generator=generator, dtype=torch.float64)) for n in (1, 50))
    assert int(torch.linalg.cholesky_ex(own).info)
    assert not int(torch.linalg.cholesky_ex(shrink(own, shared, tokens=1, prior=3.0)).info)


@pytest.mark.parametrize(("tokens", "prior"), [(0, 0.0), (-1, 4.0), (4, -1.0)])
def test_nothing_to_go_by(tokens: int, prior: float) -> None:
    with pytest.raises(NumericalError, match="nothing to shrink"):
        shrink(torch.eye(2), torch.eye(2), tokens=tokens, prior=prior)
