"""Identity: nothing is proposed, so nothing changes."""

from __future__ import annotations

from qtool.builtin.transforms.identity import Identity
from qtool.steps.transform import context_of
from qtool.testing import check_transform, tiny_model


def test_it_proposes_nothing() -> None:
    with tiny_model("qwen2") as tiny:
        proposal = Identity().plan(context_of(tiny.subject, None), Identity.Config())
    assert not proposal.operators
    assert not proposal.segments


def test_families() -> None:
    check_transform(Identity(), families=("llama", "qwen2-moe"))
