"""The transform changes no output, and does what its first line says."""

from __future__ import annotations

import pytest
import torch

from qtool.errors import UsageError
from qtool.testing import check_transform
from qtool_template.channel_balance import ChannelBalance, ChannelBalanceConfig, balancing_factors


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_models_outputs_stay_what_they_are(strength: float) -> None:
    check_transform(ChannelBalance(), ChannelBalanceConfig(strength))


def test_factors_by_hand() -> None:
    absmax = torch.tensor([1.0, 4.0, 16.0])
    assert torch.allclose(balancing_factors(absmax, 0.5), torch.tensor([2.0, 1.0, 0.5]))
    assert torch.allclose(balancing_factors(absmax, 1.0) * absmax, torch.full((3,), 4.0))
    assert torch.equal(balancing_factors(absmax, 0.0), torch.ones(3))


def test_channels_that_are_never_active_stay_and_do_not_count() -> None:
    absmax = torch.tensor([0.0, 1.0, 4.0])
    assert torch.allclose(balancing_factors(absmax, 1.0), torch.tensor([1.0, 2.0, 0.5]))
    assert torch.equal(balancing_factors(torch.zeros(3), 1.0), torch.ones(3))


def test_the_callers_statistics_are_not_modified() -> None:
    absmax = torch.tensor([1.0, 2.0])
    balancing_factors(absmax, 1.0)
    assert absmax.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_a_strength_that_means_nothing_is_refused(strength: float) -> None:
    with pytest.raises(UsageError, match="`strength` must lie between 0 and 1"):
        ChannelBalanceConfig(strength)
