"""Integers of every number of bits are offered for weights, activations and caches, under every rule for their range."""

from __future__ import annotations

import pytest
import torch

from qtool.engine.cache import CacheRounding
from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding
from qtool.errors import SchemeError
from qtool.plugins import Plugins
from qtool.scheme import TensorScheme
from qtool.steps.schemes import read_scheme

RULES = ("sym", "sym-full", "sym-half", "sym-signed_full", "sym-narrow", "asym", "asym-real")


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_number_of_bits_is_offered_everywhere(bits: int, rule: str, plugins: Plugins) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(bits)) * torch.linspace(0.5, 2, 64)
    scheme = read_scheme("", dict.fromkeys(("weights", "activations", "kv"), f"int{bits}-{rule}-g32"), plugins)
    assert isinstance(scheme.kv, TensorScheme)
    assert scheme.weights == scheme.activations == scheme.kv
    grid = Grid.of(scheme.kv, plugins.format(f"int{bits}"))
    rounded = Rounding(grid)(x)
    cache = CacheRounding.of(scheme.keys, scheme.values, plugins.format)
    assert cache is not None
    assert all(torch.equal(one, rounded) for one in cache.by_token(x, x))
    groups = rounded.unflatten(-1, (2, 32))
    most = 2**bits - (rule == "sym-narrow")
    counts = [len(group.unique()) for group in groups.flatten(0, -2)]
    assert max(counts) <= most
    assert max(counts) == most or bits > 3, "few codes are all used"
    (part,) = grid.parts
    step = part.fit(part.groups(x), global_scale=None).step().abs().unsqueeze(-1)
    inside = (part.groups(x) - groups).abs() <= 0.51 * step
    assert bool(inside.all()) or rule in ("sym-half", "sym-signed_full", "sym-full", "sym-narrow", "asym-real", "asym")
    assert float(inside.double().mean()) > 0.9


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_rules_of_symmetric_integers_are_not_for_zero_points(bits: int, plugins: Plugins) -> None:
    for rule in ("full", "half", "signed_full", "narrow"):
        with pytest.raises(SchemeError, match="is a rule for symmetric integers") as refused:
            read_scheme("", {"kv": f"int{bits}-asym-token-head-{rule}"}, plugins)
        nearest = refused.value.hint.removeprefix("nearest that works: ")
        assert nearest == f"int{bits}-asym-token-head-sbf16"
        read_scheme("", {"kv": nearest}, plugins)
