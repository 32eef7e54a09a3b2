from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.numerics.two_streams import TwoStreams
from tests.oracles.low_rank_joint import regressed


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and two streams of 12 inputs that are related."""
    generator = torch.Generator().manual_seed(5)
    weight, full, noise = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((6, 12), (12, 200), (12, 200))
    )
    return weight, full, full.roll(1, 0) * 0.3 + full + noise * 0.4


def streams(full: Tensor, rounded: Tensor, dampening_frac: float = 0.0) -> TwoStreams:
    return TwoStreams.of(rounded @ rounded.T / 200, full @ rounded.T / 200, full @ full.T / 200, dampening_frac)


def test_all_is_what_tokens_say() -> None:
    weight, full, rounded = inputs()
    decoded = (weight * 2).round() / 2
    both = streams(full, rounded)
    torch.testing.assert_close(both.target(weight), regressed(weight @ full, rounded), rtol=0, atol=1e-8)
    expected = regressed(weight @ full - decoded @ rounded, full)
    torch.testing.assert_close(both.wanted(weight, decoded), expected, rtol=0, atol=1e-8)
    left = (weight @ full - decoded @ rounded).square().sum() / 200
    assert both.energy(weight, decoded) == pytest.approx(float(left), rel=1e-10)


def test_damping_draws_to_what_equal_streams_want() -> None:
    weight, full, rounded = inputs()
    decoded = (weight * 2).round() / 2
    equal = streams(full, full, 0.3)
    torch.testing.assert_close(equal.target(weight), weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(equal.wanted(weight, decoded), weight - decoded, rtol=0, atol=1e-12)
    free, drawn, bound = (streams(full, rounded, frac) for frac in (0.0, 0.1, 1e9))
    torch.testing.assert_close(bound.target(weight), weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(bound.wanted(weight, decoded), weight - decoded, rtol=0, atol=1e-6)
    assert 0 < float((drawn.target(weight) - weight).norm()) < float((free.target(weight) - weight).norm())
    # The ridge: `min E ||W x_f - V x_q||^2 + λ ||V - W||^2`.
    frac = 0.1 * (rounded @ rounded.T / 200).diagonal().mean()
    ridge = torch.cat([rounded / 200**0.5, frac.sqrt() * torch.eye(12)], dim=1)
    outputs = torch.cat([weight @ full / 200**0.5, frac.sqrt() * weight], dim=1)
    torch.testing.assert_close(drawn.target(weight), regressed(outputs, ridge), rtol=0, atol=1e-8)


def test_inputs_that_are_never_seen_and_single_precision() -> None:
    weight, full, rounded = inputs()
    full[3], rounded[3] = 0.0, 0.0
    both = streams(full.float(), rounded.float())
    target = both.target(weight.float())
    assert target.dtype == torch.float32
    assert bool(torch.isfinite(target).all())
    assert torch.equal(target[:, 3], weight[:, 3].float())
    nothing = TwoStreams.of(*(torch.zeros(12, 12) for _ in range(3)), dampening_frac=0.0)
    assert torch.equal(nothing.target(weight), weight)
