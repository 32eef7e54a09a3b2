"""QuIP: what is rounded is the paper's matrix, entry by entry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.builtin.transforms.quip import QuIP, QuIPConfig, random_kron
from qtool.engine.planner import extend
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError
from qtool.model.plan import Plan, TransformContext
from qtool.model.statistics import SiteStatistics
from qtool.numerics.operators import Diag, Kron, Perm
from qtool.steps.transform import context_of
from qtool.testing import TinyModel, check_transform, double_precision, plan_of, tiny_model


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("qwen2_moe") as made, double_precision():
        yield made


@pytest.fixture
def context(tiny: TinyModel) -> TransformContext:
    return context_of(tiny.subject, tiny.statistics)


def by_hand(perm: Perm, kron: Kron, n: int) -> Tensor:
    """``P kron(L, R)`` entry by entry: ``x`` reordered, read as a matrix ``[a, b]``, and multiplied from both sides."""
    left, right = kron.left, kron.right
    b = len(right)
    dense = torch.zeros(n, n, dtype=torch.float64)
    for place, channel in enumerate(perm.index.tolist()):
        for column in range(n):
            dense[channel, column] = left[place // b, column // b] * right[place % b, column % b]
    return dense


class TestInvariance:
    def test_families_tied_and_untied(self) -> None:
        check_transform(QuIP(), families=("llama", "qwen2-moe"))

    @pytest.mark.slow
    def test_every_family(self) -> None:
        check_transform(QuIP())

    def test_every_option(self) -> None:
        check_transform(QuIP(), QuIPConfig(rescale=False, outputs=False), families=("qwen2",))


class TestPlan:
    def test_both_sides_of_every_linear(self, context: TransformContext) -> None:
        found = QuIP().plan(context, QuIPConfig()).operators
        graph = context.graph
        inputs = {f"layers.{i}.{name}" for i in range(2) for name in graph.input_sites_of(i)}
        outputs = {f"layers.{one.layer}.out.{one.spec.module}" for one in graph.linears}
        assert set(found) == inputs | outputs
        assert "layers.1.out.mlp.experts.2.down_proj" in outputs
        assert set(QuIP().plan(context, QuIPConfig(outputs=False)).operators) == inputs
        kinds = {tuple(one.kind for one in found[site]) for site in inputs}
        assert kinds == {("diag", "perm", "kron")}
        plain = QuIP().plan(context, QuIPConfig(rescale=False)).operators
        assert {tuple(one.kind for one in operators) for operators in plain.values()} == {("perm", "kron")}

    def test_what_is_rounded_is_the_papers_matrix(self, tiny: TinyModel) -> None:
        """``kron(L', R').T P'.T W diag(s) P kron(L, R)``, ``s`` from the weights of all that share the input."""
        subject, plan = plan_of(QuIP(), QuIPConfig(), tiny)
        original, folded = Subject.folded(tiny.subject, 0), subject.folded(0)
        assert torch.equal(original["self_attn.k_proj.weight"].double(), folded["self_attn.k_proj.weight"].double())
        folded = replace(subject, plan=plan).folded(0)
        hessian = tiny.statistics.tensor("layers.0.attn_in.hessian").double()
        members = [original[f"self_attn.{name}_proj.weight"].double() for name in "qkv"]
        energy = sum((w.square().sum(0) for w in members), torch.zeros(24, dtype=torch.float64))
        s = (hessian.diagonal() / energy) ** 0.25
        diag, perm, kron = plan.at("layers.0.attn_in").operators
        out_perm, out_kron = plan.at("layers.0.out.self_attn.k_proj").operators
        assert isinstance(diag, Diag)
        assert isinstance(perm, Perm)
        assert isinstance(kron, Kron)
        assert isinstance(out_perm, Perm)
        assert isinstance(out_kron, Kron)
        torch.testing.assert_close(1 / diag.s.double(), s, rtol=1e-5, atol=0)
        left, right = by_hand(out_perm, out_kron, 16), by_hand(perm, kron, 24)
        expected = left.T @ (members[1] / diag.s.double()) @ right
        torch.testing.assert_close(folded["self_attn.k_proj.weight"], expected, rtol=1e-12, atol=1e-12)

    def test_factors_are_orthogonal_and_as_near_as_they_get(self, context: TransformContext) -> None:
        found = QuIP().plan(context, QuIPConfig()).operators
        for site, orders in (("layers.0.o_in", (4, 8)), ("layers.0.attn_in", (4, 6)), ("layers.0.up_down", (5, 8))):
            kron = found[site][-1]
            assert isinstance(kron, Kron)
            assert (len(kron.left), len(kron.right)) == orders
            dense = kron.to_dense()
            torch.testing.assert_close(dense @ dense.T, torch.eye(len(dense)).double(), rtol=0, atol=1e-13)

    def test_no_two_are_alike_and_the_seed_decides(self, context: TransformContext) -> None:
        def dense(seed: int, site: str) -> Tensor:
            return QuIP().plan(replace(context, seed=seed), QuIPConfig()).operators[site][-1].to_dense()

        assert torch.equal(dense(0, "layers.0.o_in"), dense(0, "layers.0.o_in"))
        assert not torch.allclose(dense(0, "layers.0.o_in"), dense(1, "layers.0.o_in"))
        assert not torch.allclose(dense(0, "layers.0.o_in"), dense(0, "layers.1.o_in"))


class TestGaps:
    def test_an_expert_without_tokens_keeps_its_scale(self, context: TransformContext) -> None:
        starved = {site: context.statistics[site] for site in context.statistics}
        starved["layers.1.experts.2.up_down"] = SiteStatistics(0, {})
        found = QuIP().plan(replace(context, statistics=starved), QuIPConfig()).operators
        assert [one.kind for one in found["layers.1.experts.2.up_down"]] == ["perm", "kron"]
        assert [one.kind for one in found["layers.1.experts.1.up_down"]] == ["diag", "perm", "kron"]

    def test_without_a_hessian_it_says_what_to_gather(self, context: TransformContext) -> None:
        bare = {site: SiteStatistics(1, {"absmax": torch.ones(24)}) for site in context.statistics}
        with pytest.raises(ArtifactError, match=r"lack `hessian` at `layers\.0\.attn_in`"):
            QuIP().plan(replace(context, statistics=bare), QuIPConfig())

    def test_a_dead_channel_keeps_its_scale(self, context: TransformContext) -> None:
        dead = {site: context.statistics[site] for site in context.statistics}
        hessian = dead["layers.0.attn_in"].entries["hessian"].clone()
        hessian[5], hessian[:, 5] = 0, 0
        dead["layers.0.attn_in"] = SiteStatistics(1, {"hessian": hessian})
        proposal = QuIP().plan(replace(context, statistics=dead), QuIPConfig())
        diag = proposal.operators["layers.0.attn_in"][0]
        assert isinstance(diag, Diag)
        assert float(diag.s[5]) == 1.0
        extend(Plan(), proposal, context.graph, method="quip")

    def test_a_prime_width_has_one_dense_factor(self) -> None:
        perm, kron = random_kron(13, torch.Generator().manual_seed(0))
        dense = kron.to_dense()
        assert int((dense.abs() > 1e-9).sum()) == 13 * 13
        torch.testing.assert_close(dense @ dense.T, torch.eye(13).double(), rtol=0, atol=1e-13)
        assert perm.dim == 13


def test_a_weight_with_outliers_is_rounded_with_less_error() -> None:
    """Both sides together spread a loud entry over all others, one side only over its row."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=g, dtype=torch.float64)
    for place in range(8):
        weight[11 * place, 13 * place] = 60
    before = weight
    (perm, kron), (out_perm, out_kron) = (random_kron(n, g) for n in (128, 96))
    rotated = kron.weight_in(perm.weight_in(weight))
    both = out_kron.weight_out(out_perm.weight_out(rotated))

    def error(w: Tensor) -> float:
        step = w.abs().max() / 15
        return float(((w / step).round() * step - w).norm() / w.norm())

    assert error(both) < 0.8 * error(rotated) < 0.7 * error(before)
    assert float(both.norm()) == pytest.approx(float(before.norm()))
