"""Sites whose operators lie in the rows of linears (in front of the rotary positions, at outputs), and segments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.engine.fold import fold_block
from qtool.engine.planner import extend
from qtool.engine.subject import Subject
from qtool.errors import UsageError
from qtool.model.graph import RESIDUAL, ModelGraph
from qtool.model.plan import Plan, Proposal, Segment, SitePlan
from qtool.numerics.operators import Affine, Diag, Hadamard, Kron, Operator, Orthogonal, Perm, Signs
from qtool.plugins import Plugins
from qtool.testing import EXACT, double_precision, exact_logits, tiny_model

QK_PRE, GATED = "layers.0.qk_pre", "layers.0.up_down"
MODELS: Mapping[str, Mapping[str, object]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {},
    "mixtral": {},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "gpt_neox": {"hidden_size": 48, "num_attention_heads": 6, "head_dim": None},
}


@pytest.fixture(scope="module")
def subjects() -> Iterator[dict[str, Subject]]:
    """Tiny models by model type, in float64 until all tests are done."""
    plugins = Plugins.discover()
    changes = {**MODELS["mixtral"], "num_local_experts": 4, "num_experts_per_tok": 2}
    options = {**MODELS, "mixtral": changes, "phi3": {**MODELS["phi3"], "pad_token_id": 0, "head_dim": 8}}
    with ExitStack() as stack:
        made = {name: stack.enter_context(tiny_model(name, plugins=plugins, **options[name])) for name in MODELS}
        stack.enter_context(double_precision())
        yield {name: Subject(one.workspace.model(str(one.path)), plugins) for name, one in made.items()}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def change(subject: Subject, plan: Plan) -> float:
    before, after = exact_logits(subject), exact_logits(replace(subject, plan=plan))
    return float((after - before).abs().max() / before.abs().max())


def planned(graph: ModelGraph, operators: Mapping[str, list[Operator]], plan: Plan | None = None) -> Plan:
    return extend(plan or Plan(), Proposal(operators), graph, method="test")


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class TestInFrontOfTheRotaryPositions:
    @pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
    def test_a_diagonal_that_treats_a_pair_alike_is_exact(
        self, subjects: dict[str, Subject], generator: torch.Generator, name: str
    ) -> None:
        graph = subjects[name].model.graph
        site = graph.site(QK_PRE)
        assert site.heads == (1 if name == "qwen3" else graph.dims.num_kv_heads)
        factors = 0.5 + noise(generator, site.heads, site.dim).abs()
        half = graph.dims.turned // 2
        factors[:, half : 2 * half] = factors[:, :half]
        assert site.dim == 2 * half or name == "phi3"
        tied = Diag(factors if site.heads > 1 else factors[0], site.heads)
        flipped = Signs(torch.full((site.dim,), -1).to(torch.int8))
        plan = planned(graph, {QK_PRE: [tied, flipped]})
        assert plan.at(QK_PRE).folded == 2
        assert change(subjects[name], plan) < EXACT

    @pytest.mark.parametrize("name", ["llama", "qwen3"])
    def test_another_diagonal_is_refused_and_would_change_the_model(
        self, subjects: dict[str, Subject], generator: torch.Generator, name: str
    ) -> None:
        graph = subjects[name].model.graph
        untied = Diag(0.5 + noise(generator, graph.dims.head_dim).abs())
        with pytest.raises(UsageError, match=r"`diag` cannot be folded at `layers\.0\.qk_pre`") as refused:
            planned(graph, {QK_PRE: [untied]})
        assert "a diagonal that treats a pair alike" in str(dict(refused.value.facts)["because"])
        assert change(subjects[name], Plan({QK_PRE: SitePlan((untied,), 1)})) > 1e-3

    @pytest.mark.parametrize("operator", [Hadamard(8), Perm(torch.arange(8).flip(0))], ids=["hadamard", "perm"])
    def test_what_mixes_channels_is_refused(self, subjects: dict[str, Subject], operator: Operator) -> None:
        with pytest.raises(UsageError, match=r"cannot be folded at `layers\.0\.qk_pre`"):
            planned(subjects["llama"].model.graph, {QK_PRE: [operator]})

    def test_keys_get_the_factor_and_the_queries_of_the_same_head_its_inverse(
        self, subjects: dict[str, Subject], generator: torch.Generator
    ) -> None:
        subject = subjects["llama"]
        graph, state = subject.model.graph, subject.model.tensors("model.layers.0.")
        dims = graph.dims
        factors = 0.5 + noise(generator, dims.num_kv_heads, dims.head_dim // 2).abs().repeat(1, 2)
        folded = fold_block(graph, planned(graph, {QK_PRE: [Diag(factors, dims.num_kv_heads)]}), 0, state)
        for head in range(dims.num_heads):
            rows = slice(head * dims.head_dim, (head + 1) * dims.head_dim)
            own = factors[head // dims.group].unsqueeze(-1)
            expected = state["self_attn.q_proj.weight"][rows].double() / own
            torch.testing.assert_close(folded["self_attn.q_proj.weight"][rows], expected)
            if head < dims.num_kv_heads:
                own = factors[head].unsqueeze(-1)
                expected = state["self_attn.k_proj.weight"][rows].double() * own
                torch.testing.assert_close(folded["self_attn.k_proj.weight"][rows], expected)

    def test_a_family_that_does_not_say_how_positions_turn_has_no_such_site(self, subjects: dict[str, Subject]) -> None:
        with pytest.raises(UsageError, match=r"has no site `layers\.0\.qk_pre`"):
            subjects["gpt_neox"].model.graph.site(QK_PRE)


class TestOrderBehindAGate:
    @pytest.mark.parametrize("name", ["llama", "mixtral", "phi3", "gpt_neox"])
    def test_a_permutation_is_folded_and_exact(
        self, subjects: dict[str, Subject], generator: torch.Generator, name: str
    ) -> None:
        graph = subjects[name].model.graph
        orders = {site.id: [Perm(torch.randperm(site.dim, generator=generator))] for site in graph.of_kind("up_down")}
        plan = planned(graph, orders)
        assert all(site.folded == 1 for site in plan.sites.values())
        assert change(subjects[name], plan) < EXACT

    def test_the_rows_of_the_gate_move_and_are_not_scaled(
        self, subjects: dict[str, Subject], generator: torch.Generator
    ) -> None:
        subject = subjects["llama"]
        graph, state = subject.model.graph, subject.model.tensors("model.layers.0.")
        order, factors = torch.randperm(40, generator=generator), 0.5 + noise(generator, 40).abs()
        plan = planned(graph, {GATED: [Diag(factors), Perm(order)]})
        assert plan.at(GATED).folded == 2
        folded = fold_block(graph, plan, 0, state)
        gate, up, down = (state[f"mlp.{name}_proj.weight"].double() for name in ("gate", "up", "down"))
        torch.testing.assert_close(folded["mlp.gate_proj.weight"], gate[order])
        torch.testing.assert_close(folded["mlp.gate_proj.bias"], state["mlp.gate_proj.bias"].double()[order])
        torch.testing.assert_close(folded["mlp.up_proj.weight"], (up * factors.unsqueeze(-1))[order])
        torch.testing.assert_close(folded["mlp.down_proj.weight"], (down / factors)[:, order])

    def test_clamped_and_interleaved_gates_keep_their_order(self) -> None:
        family = Plugins.discover().load("families", "gpt-oss")
        assert all(not linear.feeds for linear in family.experts.linears)


class TestOutputs:
    @pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_neox"])
    def test_operators_on_every_output_are_undone(
        self, subjects: dict[str, Subject], generator: torch.Generator, name: str
    ) -> None:
        subject = subjects[name]
        graph = subject.model.graph
        operators: dict[str, list[Operator]] = {}
        for linear in graph.linears:
            rows = subject.model.tensor(f"{linear.name}.weight").shape[0]
            q = torch.linalg.qr(noise(generator, rows // 4, rows // 4)).Q.contiguous()
            scale = Diag(0.5 + noise(generator, rows).abs())
            kron = Kron(torch.linalg.qr(noise(generator, 4, 4)).Q.contiguous(), q)
            operators[f"layers.{linear.layer}.out.{linear.spec.module}"] = [scale, kron]
        plan = planned(graph, operators)
        assert change(subject, plan) < EXACT
        assert change(subject, replace(plan, sites={})) == 0.0

    def test_rows_take_the_operators_behind_those_of_the_site_that_they_write(
        self, subjects: dict[str, Subject], generator: torch.Generator
    ) -> None:
        subject = subjects["llama"]
        graph, state = subject.model.graph, subject.model.tensors("model.layers.1.")
        heads, dim = graph.dims.num_kv_heads, graph.dims.value_dim
        p, t = noise(generator, dim, dim), noise(generator, heads * dim, heads * dim)
        out = "layers.1.out.self_attn.v_proj"
        plan = planned(graph, {"layers.1.vo": [Affine.from_matrix(p)], out: [Affine.from_matrix(t)]})
        folded = fold_block(graph, plan, 1, state)
        expected = (
            t.T @ torch.kron(torch.eye(heads).double(), p.T.contiguous()) @ state["self_attn.v_proj.weight"].double()
        )
        torch.testing.assert_close(folded["self_attn.v_proj.weight"], expected)
        assert change(subject, plan) < EXACT

    def test_a_linear_that_is_not_there(self, subjects: dict[str, Subject]) -> None:
        with pytest.raises(UsageError, match=r"has no site `layers\.0\.out\.mlp\.w1`"):
            planned(subjects["llama"].model.graph, {"layers.0.out.mlp.w1": [Hadamard(40)]})


class TestSegments:
    SEGMENTS = (Segment(8, "int8"),)

    def apart(self, graph: ModelGraph, site: str, channels: int = 8) -> Plan:
        return extend(Plan(), Proposal(segments={site: (Segment(channels, "int8"),)}), graph, method="test")

    def test_they_are_kept_and_written(self, subjects: dict[str, Subject]) -> None:
        graph = subjects["llama"].model.graph
        plan = self.apart(graph, GATED)
        assert not plan.empty
        assert Plan.from_state(*plan.to_state()).at(GATED).segments == self.SEGMENTS
        scaled = planned(graph, {GATED: [Diag(torch.full((40,), 2.0))]}, plan)
        assert scaled.at(GATED).segments == self.SEGMENTS
        assert planned(graph, {"layers.1.up_down": [Hadamard(40)]}, plan).at(GATED).segments == self.SEGMENTS

    @pytest.mark.parametrize(
        ("apart", "place"),
        [(GATED, GATED), ("layers.0.attn_in", RESIDUAL), ("layers.1.o_in", "layers.1.vo")],
    )
    def test_their_channels_are_not_mixed_later(self, subjects: dict[str, Subject], apart: str, place: str) -> None:
        graph = subjects["llama"].model.graph
        mixing = Hadamard(graph.site(place).dim)
        with pytest.raises(UsageError, match=f"`test` would mix channels .* at `{apart}`") as refused:
            planned(graph, {place: [mixing]}, self.apart(graph, apart))
        assert "in front of" in refused.value.hint
        before = planned(graph, {place: [mixing]})
        both = extend(before, Proposal(segments={apart: self.SEGMENTS}), graph, method="test")
        assert both.at(apart).segments == self.SEGMENTS

    @pytest.mark.parametrize(("apart", "basis"), [("layers.0.attn_in", RESIDUAL), ("layers.1.o_in", "layers.1.vo")])
    def test_a_basis_in_front_of_what_mixes_its_channels_sets_nothing_apart(
        self, subjects: dict[str, Subject], apart: str, basis: str
    ) -> None:
        graph = subjects["llama"].model.graph
        dim = graph.site(basis).dim
        q = torch.linalg.qr(noise(torch.Generator().manual_seed(1), dim, dim)).Q.contiguous()
        proposal = Proposal({basis: [Orthogonal(q)]}, {apart: self.SEGMENTS})
        mixed = planned(graph, {apart: [Hadamard(graph.site(apart).dim)]})
        with pytest.raises(UsageError, match=f"would mix the channels that `test` sets apart at `{apart}`"):
            extend(mixed, proposal, graph, method="test")
        scaled = planned(graph, {apart: [Diag(torch.full((graph.site(apart).dim,), 2.0))]})
        assert extend(scaled, proposal, graph, method="test").at(apart).segments == self.SEGMENTS

    @pytest.mark.parametrize(("site", "channels"), [(GATED, 40), (GATED, 0), ("layers.0.vo", 4), (RESIDUAL, 8)])
    def test_channels_that_are_not_there(self, subjects: dict[str, Subject], site: str, channels: int) -> None:
        with pytest.raises(UsageError, match=f"sets apart channels that `{site}` does not have"):
            self.apart(subjects["llama"].model.graph, site, channels)

    def test_a_rotation_that_folds_norms_keeps_segments_of_its_own(self, subjects: dict[str, Subject]) -> None:
        graph = subjects["llama"].model.graph
        scaled = planned(graph, {"layers.0.attn_in": [Diag(torch.full((24,), 2.0))]})
        q = torch.linalg.qr(noise(torch.Generator().manual_seed(1), 24, 24)).Q.contiguous()
        proposal = Proposal({RESIDUAL: [Orthogonal(q)]}, {"layers.0.attn_in": self.SEGMENTS})
        plan = extend(scaled, proposal, graph, method="test")
        assert plan.at("layers.0.attn_in") == SitePlan((), 0, self.SEGMENTS)
