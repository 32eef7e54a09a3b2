"""What is known of a site's input is carried through operators as if their outputs had been seen."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qtool.errors import ArtifactError
from qtool.model.statistics import FROM_SAMPLE, SiteStatistics, summarize
from qtool.numerics.operators import (
    Affine,
    Block,
    Diag,
    Hadamard,
    HeadMix,
    Kron,
    Operator,
    Orthogonal,
    Perm,
    Shift,
    Signs,
    compose_act,
)

N = 24


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    mixing = torch.randn(N, N, generator=generator, dtype=torch.float64)
    return torch.randn(64, N, generator=generator, dtype=torch.float64) @ mixing + 0.3


def statistics_of(x: Tensor) -> SiteStatistics:
    """Everything, from every token."""
    entries = {"hessian": x.T @ x / len(x), "mean": x.mean(0), "sample": x, **summarize(x)}
    return SiteStatistics(len(x), entries)


def matrix(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.eye(shape[-1]).double() + 0.2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def operators(generator: torch.Generator) -> dict[str, tuple[Operator, ...]]:
    q = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64)).Q.contiguous()
    order = torch.randperm(N, generator=generator)
    factors = torch.linspace(-2.0, 2.0, N).double()
    flips = 1 - 2 * torch.randint(0, 2, (N,), generator=generator)
    return {
        "diag": (Diag(factors),),
        "diag by head": (Diag(factors[:8].reshape(2, 4), 2),),
        "signs": (Signs(flips),),
        "perm": (Perm(order),),
        "shift": (Shift(torch.randn(N, generator=generator).double()),),
        "orthogonal": (Orthogonal(q),),
        "hadamard": (Hadamard(N, flips),),
        "affine": (Affine.from_matrix(matrix(generator, N, N)),),
        "affine by head": (Affine.from_matrix(matrix(generator, 2, 4, 4), 2),),
        "kron": (Kron(matrix(generator, 4, 4), matrix(generator, 6, 6)),),
        "block": (Block(matrix(generator, 3, 8, 8), N),),
        "head mix": (HeadMix(4, 6),),
        "several": (Diag(factors), Shift(torch.ones(N).double()), Orthogonal(q), Perm(order), Diag(factors.flip(0))),
    }


KINDS = tuple(operators(torch.Generator()))
CHANNELS_STAY_APART = ("diag", "diag by head", "signs", "perm")


@pytest.mark.parametrize("name", KINDS)
def test_everything_carried_is_what_the_transformed_tokens_give(
    x: Tensor, generator: torch.Generator, name: str
) -> None:
    chain = operators(generator)[name]
    carried, expected = statistics_of(x).carried(chain), statistics_of(compose_act(chain, x))
    assert carried.entries.keys() == expected.entries.keys()
    for entry, value in expected.entries.items():
        torch.testing.assert_close(carried.entries[entry], value, rtol=1e-10, atol=1e-10, msg=entry)
    assert carried.tokens == len(x)
    assert carried.estimated == (frozenset() if name in CHANNELS_STAY_APART else frozenset(FROM_SAMPLE))


@pytest.mark.parametrize("name", CHANNELS_STAY_APART)
def test_extremes_need_no_sample_where_channels_stay_apart(x: Tensor, generator: torch.Generator, name: str) -> None:
    chain = operators(generator)[name]
    whole = statistics_of(x)
    # The extremes are of all tokens, of which the sample shows few.
    few = SiteStatistics(whole.tokens, {**whole.entries, "sample": x[:3]})
    none = SiteStatistics(whole.tokens, {n: v for n, v in whole.entries.items() if n != "sample"})
    expected = summarize(compose_act(chain, x))
    for statistics in (few, none):
        carried = statistics.carried(chain)
        assert not carried.estimated
        for entry, value in expected.items():
            torch.testing.assert_close(carried.entries[entry], value, rtol=1e-12, atol=1e-12)


def test_through_a_rotation_extremes_are_those_of_the_sample(x: Tensor, generator: torch.Generator) -> None:
    chain = operators(generator)["orthogonal"]
    whole = statistics_of(x)
    few = SiteStatistics(whole.tokens, {**whole.entries, "sample": x[:9]}).carried(chain)
    expected = summarize(compose_act(chain, x[:9]))
    assert all(torch.equal(few.entries[entry], value) for entry, value in expected.items())
    assert few.estimated == set(FROM_SAMPLE)
    torch.testing.assert_close(few.entries["hessian"], statistics_of(compose_act(chain, x)).entries["hessian"])


def test_what_was_estimated_once_stays_estimated(x: Tensor, generator: torch.Generator) -> None:
    named = operators(generator)
    carried = statistics_of(x).carried((*named["orthogonal"], *named["diag"]))
    assert carried.estimated == set(FROM_SAMPLE)


def test_without_a_sample_they_are_dropped(x: Tensor, generator: torch.Generator) -> None:
    entries = {name: value for name, value in statistics_of(x).entries.items() if name != "sample"}
    carried = SiteStatistics(64, entries).carried(operators(generator)["hadamard"])
    assert set(carried.entries) == {"hessian", "mean"}
    with pytest.raises(ArtifactError, match=r"the statistics lack `absmax` at `layers\.0\.attn_in`") as refused:
        carried.need("absmax", site="layers.0.attn_in")
    assert "sample" in refused.value.hint, "another calibration with `absmax` alone would end here again"


def test_only_what_was_gathered_is_carried(x: Tensor, generator: torch.Generator) -> None:
    named = operators(generator)
    entries = {"absmax": x.abs().amax(0), "sample": x}
    carried = SiteStatistics(64, entries).carried(named["orthogonal"])
    assert set(carried.entries) == {"absmax", "sample"}
    assert carried.estimated == {"absmax"}
    assert SiteStatistics(64, {"max": x.amax(0)}).carried(named["perm"]).entries.keys() == {"max"}


@pytest.mark.parametrize("name", ["diag", "signs"])
def test_one_end_alone_behind_a_factor_of_either_sign(x: Tensor, generator: torch.Generator, name: str) -> None:
    """A channel that is flipped has its maximum where its minimum was: without both there is nothing to say."""
    chain = operators(generator)[name]
    carried = SiteStatistics(64, {"max": x.amax(0)}).carried(chain)
    truth = compose_act(chain, x).amax(0)
    assert "max" not in carried.entries or torch.allclose(carried.entries["max"], truth)


def test_a_hessian_is_carried_through_a_shift_only_with_the_mean(x: Tensor, generator: torch.Generator) -> None:
    (shift,) = operators(generator)["shift"]
    entries = {"hessian": x.T @ x / len(x), "mean": x.mean(0)}
    carried = SiteStatistics(64, entries).carried((shift,))
    moved = shift.act(x)
    torch.testing.assert_close(carried.entries["hessian"], moved.T @ moved / 64)


def test_nothing_of_the_caller_is_modified(x: Tensor, generator: torch.Generator) -> None:
    statistics = statistics_of(x)
    kept = {name: value.clone() for name, value in statistics.entries.items()}
    chains: Sequence[tuple[Operator, ...]] = tuple(operators(generator).values())
    for chain in chains:
        statistics.carried(chain)
    assert all(torch.equal(kept[name], value) for name, value in statistics.entries.items())
    assert statistics.carried(()) is statistics


def test_an_entry_that_is_missing_is_named_with_what_there_is() -> None:
    with pytest.raises(ArtifactError, match="the statistics lack `hessian` at `site`") as refused:
        SiteStatistics(1, {"mean": torch.zeros(2), "absmax": torch.zeros(2)}).need("hessian", site="site")
    assert refused.value.facts == (("gathered", "absmax, mean"),)
    assert refused.value.hint == "qtool calibrate MODEL --gather absmax,hessian,mean"
    with pytest.raises(ArtifactError) as refused:
        SiteStatistics(1, {}).need("mean", site="site")
    assert refused.value.facts == (("gathered", "nothing"),)
    assert refused.value.hint == "qtool calibrate MODEL --gather mean"
    gathered = SiteStatistics(1, {"mean": torch.zeros(2)}, gathered=frozenset({"mean", "saliency"}))
    with pytest.raises(ArtifactError) as refused:
        gathered.carried((Signs(torch.tensor([1, -1])),)).need("hessian", site="site")
    assert refused.value.facts == (("gathered", "mean, saliency"),)
    assert refused.value.hint == "qtool calibrate MODEL --gather hessian,mean,saliency"
