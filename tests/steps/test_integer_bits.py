"""Integers of every number of bits are offered for weights, activations and caches, under every rule for a range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.engine.cache import CacheRounding
from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding
from qtool.errors import SchemeError
from qtool.plugins import Plugins
from qtool.scheme import TensorScheme
from qtool.steps.schemes import read_scheme

RULES = ("sym", "sym-full", "sym-half", "sym-signed_full", "sym-narrow", "asym", "asym-real", "asym-offset")


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover()


def rounded(x: Tensor, bits: int, rule: str, plugins: Plugins) -> Tensor:
    """Round as activations and as keys and values, for which the scheme must be the same."""
    scheme = read_scheme("", dict.fromkeys(("weights", "activations", "kv"), f"int{bits}-{rule}-g32"), plugins)
    assert isinstance(scheme.kv, TensorScheme)
    assert scheme.weights == scheme.activations == scheme.kv
    cache = CacheRounding.of(scheme, plugins.format)
    found = Rounding(Grid.of(scheme.kv, plugins.format(scheme.kv.format)))(x)
    assert cache is not None
    assert all(torch.equal(one, found) for one in cache.by_token(x, x))
    return found


@pytest.mark.parametrize("rule", RULES)
def test_every_number_of_bits_is_offered_everywhere(rule: str, plugins: Plugins) -> None:
    x = torch.randn(1, 3, 9, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 64)
    errors = []
    for bits in range(2, 9):
        found = rounded(x, bits, rule, plugins)
        counts = [len(group.unique()) for group in found.unflatten(-1, (2, 32)).flatten(0, -2)]
        assert max(counts) <= 2**bits - (rule == "sym-narrow")
        errors.append(float((found - x).square().mean()))
    assert all(6 > errors[i] / errors[i + 1] > 2.5 for i in range(1, 5)), "a bit more is a quarter of the error"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_rules_of_symmetric_integers_are_not_for_zero_points(bits: int, plugins: Plugins) -> None:
    for rule in ("full", "half", "signed_full", "narrow"):
        with pytest.raises(SchemeError, match="is a rule for symmetric integers") as refused:
            read_scheme("", {"kv": f"int{bits}-asym-token-head-{rule}"}, plugins)
        nearest = refused.value.hint.removeprefix("nearest that works: ")
        assert nearest == f"int{bits}-asym-token-head-sbf16"
        read_scheme("", {"kv": nearest}, plugins)
