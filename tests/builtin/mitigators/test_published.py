"""Defaults that papers publish: what users compare with a paper's table has to be the paper's method."""

from __future__ import annotations

import pytest

from qtool.builtin.mitigators.autoround import AutoRoundConfig
from qtool.builtin.mitigators.caldera import CalderaConfig
from qtool.builtin.mitigators.foem import FOEMConfig
from qtool.builtin.mitigators.gptaq import GPTAQConfig
from qtool.builtin.mitigators.gptq import GPTQConfig
from qtool.builtin.mitigators.spqr import SpQRConfig
from qtool.builtin.statistics.saliency import GROUPS


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (GPTQConfig, {"dampening_frac": 0.01}),  # arXiv:2210.17323
        (GPTAQConfig, {"alpha": 0.25}),  # arXiv:2504.02692, the authors' code
        (FOEMConfig, {"beta": 0.2}),  # arXiv:2507.11017, the authors' code
        (AutoRoundConfig, {"steps": 200, "batch": 8, "widest": 1.0}),  # arXiv:2309.05516, the authors' code
        (CalderaConfig, {"factor_iterations": 5}),  # arXiv:2405.18886, the authors' code
        (SpQRConfig, {"tau": 0.2, "dampening_frac": 1.0}),  # arXiv:2306.03078, the authors' scripts
    ],
)
def test_defaults_are_those_of_the_paper(config: type, published: dict[str, float]) -> None:
    own = config()
    assert {name: getattr(own, name) for name in published} == published


def test_guided_hessians_are_of_four_groups_of_outputs() -> None:
    assert GROUPS == 4  # arXiv:2505.07004
