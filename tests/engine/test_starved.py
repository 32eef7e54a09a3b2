"""Starved experts: completed by what the layer shares, to the token; all others go by what they saw."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.engine.starved import Completed, Routing, complete, expert_notes
from qtool.model.statistics import SiteStatistics
from qtool.numerics.second_moments import diagonal_blocks
from tests.engine.sparse import HIDDEN, INNER, drawn, of_tokens, sparse_graph

COUNTS = (30, 3, 0, 27)
"""Of experts chosen two at a time from 30 tokens; 15 each would be even."""


@pytest.fixture
def seen() -> dict[str, Tensor]:
    """The tokens behind the statistics, by site."""
    every = drawn(30, HIDDEN, 0)
    tokens = {"mlp_in": every}
    for expert, count in enumerate(COUNTS):
        tokens[f"experts.{expert}.mlp_in"] = every[30 - count :]
        tokens[f"experts.{expert}.up_down"] = drawn(count, INNER, 1 + expert)
    return tokens


def completed(seen: dict[str, Tensor], share: float) -> tuple[dict[str, SiteStatistics], Completed]:
    given = {name: of_tokens(tokens) for name, tokens in seen.items()}
    return given, complete(given, sparse_graph().linears_of(1), Routing(torch.tensor(COUNTS), share))


class TestCompleting:
    def test_who_is_starved(self, seen: dict[str, Tensor]) -> None:
        for share, shrunk, unknown in [
            (0.25, {1, 2}, set()),
            (0.2, {2}, set()),
            (1.0, {1, 2}, set()),
            (0.0, set(), {2}),
        ]:
            _, found = completed(seen, share)
            assert (found.shrunk, found.unknown) == (shrunk, unknown), share

    def test_it_counts_tokens_not_routings(self) -> None:
        routing = Routing(torch.tensor(COUNTS), 0.5)
        assert routing.expected == 30 * 2 / 4
        assert routing.prior == 7.5

    def test_well_fed_experts_and_shared_sites_are_left_as_they_were(self, seen: dict[str, Tensor]) -> None:
        given, found = completed(seen, 0.25)
        for site in ("mlp_in", "experts.0.mlp_in", "experts.0.up_down", "experts.3.mlp_in", "experts.3.up_down"):
            assert found.statistics[site] is given[site]

    def test_a_shared_input_is_shrunk_toward_all_tokens(self, seen: dict[str, Tensor]) -> None:
        _, found = completed(seen, 0.25)
        own, every = seen["experts.1.mlp_in"], seen["mlp_in"]
        expected = (own.T @ own + 3.75 * every.T @ every / 30) / (3 + 3.75)
        torch.testing.assert_close(found.statistics["experts.1.mlp_in"].entries["hessian"], expected)
        torch.testing.assert_close(
            found.statistics["experts.1.mlp_in"].entries["mean"], (own.sum(0) + 3.75 * every.mean(0)) / 6.75
        )

    def test_an_input_of_its_own_is_shrunk_toward_the_tokens_of_all_experts(self, seen: dict[str, Tensor]) -> None:
        _, found = completed(seen, 0.25)
        own = seen["experts.1.up_down"]
        every = torch.cat([seen[f"experts.{expert}.up_down"] for expert in range(4)])
        expected = (own.T @ own + 3.75 * every.T @ every / 60) / (3 + 3.75)
        torch.testing.assert_close(found.statistics["experts.1.up_down"].entries["hessian"], expected)
        for name in ("absmax", "max", "min"):
            extreme = {"absmax": every.abs().amax(0), "max": every.amax(0), "min": every.amin(0)}[name]
            torch.testing.assert_close(found.statistics["experts.1.up_down"].entries[name], extreme)

    def test_without_a_token_it_is_the_shared_one(self, seen: dict[str, Tensor]) -> None:
        given, found = completed(seen, 0.25)
        assert given["experts.2.mlp_in"].entries == {}
        for name, entry in given["mlp_in"].entries.items():
            assert torch.equal(found.statistics["experts.2.mlp_in"].entries[name], entry)
        every = torch.cat([seen[f"experts.{expert}.up_down"] for expert in range(4)])
        torch.testing.assert_close(
            found.statistics["experts.2.up_down"].entries["hessian"], every.T @ every / len(every)
        )

    def test_with_nothing_to_shrink_to_its_inputs_are_white(self, seen: dict[str, Tensor]) -> None:
        given, found = completed(seen, 0.0)
        hessian = found.statistics["experts.2.mlp_in"].entries["hessian"]
        size = given["mlp_in"].entries["hessian"].diagonal().mean()
        torch.testing.assert_close(hessian, size * torch.eye(HIDDEN))
        assert found.statistics["experts.1.mlp_in"] is given["experts.1.mlp_in"]

    def test_a_sample_is_its_own_where_it_has_one(self, seen: dict[str, Tensor]) -> None:
        given, found = completed(seen, 0.25)
        sample = found.statistics["experts.1.mlp_in"].entries["sample"]
        assert torch.equal(sample, given["experts.1.mlp_in"].entries["sample"])
        assert torch.equal(found.statistics["experts.2.mlp_in"].entries["sample"], given["mlp_in"].entries["sample"])

    @pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
    def test_blocks_are_those_of_the_completed_hessian(self, seen: dict[str, Tensor], share: float) -> None:
        _, found = completed(seen, share)
        for one in found.statistics.values():
            if one.entries:
                expected = diagonal_blocks(one.entries["hessian"], 8)
                torch.testing.assert_close(one.entries["hessian_blocks"], expected, rtol=1e-5, atol=1e-6)

    def test_nothing_that_was_given_is_modified(self, seen: dict[str, Tensor]) -> None:
        given = {name: of_tokens(tokens) for name, tokens in seen.items()}
        kept = {name: {e: t.clone() for e, t in one.entries.items()} for name, one in given.items()}
        complete(given, sparse_graph().linears_of(1), Routing(torch.tensor(COUNTS), 1.0))
        for name, one in given.items():
            assert all(torch.equal(t, kept[name][e]) for e, t in one.entries.items())

    def test_experts_that_nothing_ever_reached(self) -> None:
        every = of_tokens(drawn(9, HIDDEN, 0))
        given = {"mlp_in": every}
        linears = [one for one in sparse_graph().linears_of(1) if one.spec.reads == "mlp_in"]
        found = complete(given, linears, Routing(torch.zeros(4, dtype=torch.int64)))
        assert found.unknown == {0, 1, 2, 3}


class TestNotes:
    def test_stages_are_joined(self) -> None:
        first = Completed({}, frozenset({1, 2}), frozenset(), Routing(torch.tensor([5, 1, 0, 2])))
        last = Completed({}, frozenset({3}), frozenset({2}), Routing(torch.tensor([4, 3, 0, 1])))
        assert expert_notes([Completed({}), first, last]) == {
            "tokens": [4, 3, 0, 1],
            "shrunk_experts": [1, 3],
            "experts_rtn": [2],
        }

    def test_a_dense_block_has_none(self) -> None:
        assert expert_notes([Completed({})]) == {}
