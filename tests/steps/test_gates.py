"""Gates: what can be written, when they are met, and what they say when they cannot be read."""

from __future__ import annotations

import pytest

from qtool.errors import UsageError
from qtool.steps.gates import Gate, read_gate


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("perplexity/wikitext2<=22", Gate("perplexity/wikitext2", "<=", 22.0)),
        ("acc/arc_easy>=0.5", Gate("acc/arc_easy", ">=", 0.5)),
        ("kl/c4<1e-3", Gate("kl/c4", "<", 0.001)),
        ("top1/c4 > .99", Gate("top1/c4", ">", 0.99)),
        ("  x  <  -1 ", Gate("x", "<", -1.0)),
        ("acc,none/piqa>=+2.5E-1", Gate("acc,none/piqa", ">=", 0.25)),
    ],
)
def test_what_can_be_read(text: str, gate: Gate) -> None:
    assert read_gate(text) == gate


@pytest.mark.parametrize("gate", ["a<=1", "a/b>=0.25", "a<1e-05", "a>3"])
def test_gates_are_written_as_they_are_read(gate: str) -> None:
    assert str(read_gate(gate)) == gate


@pytest.mark.parametrize(
    "text", ["", "a", "a<", "<1", "a=1", "a==1", "a<=", "a<=x", "a<=1.2.3", "a<=1 b", "a b<1", "a<>1", "a<=nan", "a<=e"]
)
def test_what_cannot(text: str) -> None:
    with pytest.raises(UsageError, match="cannot read the gate") as refused:
        read_gate(text)
    assert f"`{text}`" in refused.value.message
    assert refused.value.hint == "--require 'perplexity/wikitext2<=22'"


@pytest.mark.parametrize(
    ("relation", "below", "equal", "above"),
    [("<=", True, True, False), ("<", True, False, False), (">=", False, True, True), (">", False, False, True)],
)
def test_bounds(relation: str, below: bool, equal: bool, above: bool) -> None:
    gate = Gate("m", relation, 2.0)
    assert [gate.met({"m": value}) for value in (1.0, 2.0, 3.0)] == [below, equal, above]
    assert not gate.met({"m": float("nan")})


def test_a_metric_that_was_not_measured() -> None:
    with pytest.raises(UsageError, match=r"`--require m<1` names a metric that was not measured") as refused:
        Gate("m", "<", 1.0).met({"perplexity/a": 3.0, "kl/a": 0.1})
    assert refused.value.facts == (("measured", "perplexity/a, kl/a"),)
