"""The description keeps every promise that qtool makes of a family."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qtool.model.family import LLAMA_LIKE_LINEARS
from qtool.plugins import Plugins
from qtool.testing import CheckError, check_family
from qtool_seed_oss.seed_oss import SEED_OSS


def test_every_variant_keeps_the_contract() -> None:
    check_family(SEED_OSS)


def test_qtool_finds_it_by_its_name() -> None:
    assert Plugins.discover().load("families", "seed-oss") is SEED_OSS


def test_a_linear_that_is_left_out_is_noticed() -> None:
    without = replace(SEED_OSS, linears=LLAMA_LIKE_LINEARS[1:])
    with pytest.raises(CheckError, match=r"layers\.0\.self_attn\.q_proj\.weight"):
        check_family(without)
