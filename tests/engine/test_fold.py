"""Folding leaves the function of a model unchanged, to 1e-9 in float64, and what cannot be exact is refused.

Models are tiny and random: grouped queries, a head size that is not hidden / heads, odd Hadamard orders, norm weights
and biases that are not trivial.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from qtool.engine import fold as fold_module
from qtool.engine import subject as subject_module
from qtool.engine.fold import fold_block, fold_ends, input_operators, require_biases
from qtool.engine.network import Network
from qtool.engine.planner import ABSORBED_BY, extend
from qtool.engine.subject import Subject
from qtool.errors import UsageError
from qtool.model.family import Family, Linear, Norm
from qtool.model.graph import HEAD_IN, RESIDUAL, ModelGraph
from qtool.model.plan import Plan, Proposal, SitePlan
from qtool.model.source import Model, open_model, read_dimensions
from qtool.numerics.operators import (
    OPERATORS,
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
)
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.testing import (
    EXACT,
    CheckError,
    TinyModel,
    check_transform,
    double_precision,
    exact_logits,
    save_tiny_model,
    tiny_config,
    tiny_model,
)

MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-three-kv-heads": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "llama-no-groups": ("llama", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
}
BEFORE: dict[str, Tensor] = {}
"""Logits of the models as they are, by id."""

Tiny = Callable[[str], TinyModel]
Kinds = tuple[str, ...]
Proposed = Mapping[str, Sequence[Operator]]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Tiny]:
    """Tiny models by the names of ``MODELS``, made once; their norms compute in float64 until all tests are done."""
    with ExitStack() as stack:
        plugins, made = Plugins.discover(), dict[str, TinyModel]()

        def of(name: str) -> TinyModel:
            if name not in made:
                model_type, changes = MODELS[name]
                made[name] = stack.enter_context(tiny_model(model_type, plugins=plugins, **changes))
                stack.enter_context(double_precision())
            return made[name]

        yield of


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def subject_of(one: TinyModel) -> Subject:
    return Subject(one.workspace.model(str(one.path)), one.workspace.plugins)


def change(one: TinyModel, plan: Plan) -> float:
    """How much a plan changes a tiny model's logits, relative to the largest."""
    return changed(subject_of(one), plan)


def changed(subject: Subject, plan: Plan) -> float:
    if subject.model.id not in BEFORE:
        BEFORE[subject.model.id] = exact_logits(subject)
    before, after = BEFORE[subject.model.id], exact_logits(replace(subject, plan=plan))
    return float((after - before).abs().max() / before.abs().max())


def orthogonal(dim: int, generator: torch.Generator, *heads: int) -> Tensor:
    random = torch.randn(*heads, dim, dim, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(random).Q.contiguous()


def invertible(dim: int, generator: torch.Generator, *heads: int) -> Tensor:
    return torch.eye(dim, dtype=torch.float64) + 0.2 * torch.randn(*heads, dim, dim, generator=generator).double()


def factors(dim: int, generator: torch.Generator, *heads: int) -> Tensor:
    """Factors of both signs, none near zero."""
    size = 0.5 + torch.rand(*heads, dim, generator=generator, dtype=torch.float64)
    return size * (1 - 2 * torch.randint(0, 2, size.shape, generator=generator))


def signs(dim: int, generator: torch.Generator, *heads: int) -> Tensor:
    return (1 - 2 * torch.randint(0, 2, (*heads, dim), generator=generator)).to(torch.int8)


def operator(kind: str, dim: int, generator: torch.Generator, heads: int = 1) -> Operator:
    """An operator of a kind; ``by head`` in the kind gives every head parameters of its own."""
    name, _, by_head = kind.partition(" ")
    leading = (heads,) if by_head else ()
    count = heads if by_head else 1
    makers: dict[str, Callable[[], Operator]] = {
        "shift": lambda: Shift(torch.randn(*leading, dim, generator=generator).double(), count),
        "diag": lambda: Diag(factors(dim, generator, *leading), count),
        "signs": lambda: Signs(signs(dim, generator, *leading), count),
        "perm": lambda: Perm(torch.randperm(dim, generator=generator)),
        "hadamard": lambda: Hadamard(dim, signs(dim, generator)),
        "orthogonal": lambda: Orthogonal(orthogonal(dim, generator, *leading), count),
        "affine": lambda: Affine.from_matrix(invertible(dim, generator, *leading), count),
        "kron": lambda: Kron(invertible(4, generator), invertible(dim // 4, generator)),
        "block": lambda: Block(invertible(4, generator, dim // 4), dim),
        "head_mix": lambda: HeadMix(4, dim // 4),
    }
    return makers[name]()


ANYTHING = ("diag", "signs", "perm", "hadamard", "orthogonal", "affine", "kron", "block", "shift")
BY_HEAD = tuple(f"{kind} by head" for kind in ("diag", "signs", "orthogonal", "affine", "shift"))
FOLDED: Mapping[str, tuple[str, ...]] = {
    RESIDUAL: ("orthogonal", "hadamard", "perm", "signs"),
    HEAD_IN: ("diag", "signs"),
    "attn_in": ("diag", "signs"),
    "mlp_in": ("diag", "signs"),
    "up_down": ("diag", "signs", "perm"),
    "vo": (*ANYTHING, *BY_HEAD),
    "o_in": (),
    "qk_post": (),
}
ONLINE: Mapping[str, tuple[str, ...]] = {
    site: tuple(kind for kind in (*ANYTHING, *(("head_mix",) if site == "o_in" else ())) if kind not in FOLDED[site])
    for site in ("attn_in", "mlp_in", "up_down", "o_in", "qk_post")
}


def proposal(graph: ModelGraph, site: str, kinds: Sequence[str], generator: torch.Generator) -> Proposed:
    """Operators of these kinds, in order, at every site of this name."""
    return {one.id: [operator(kind, one.dim, generator, one.heads) for kind in kinds] for one in graph.of_kind(site)}


def plan_of(graph: ModelGraph, *proposals: Proposed) -> Plan:
    plan = Plan()
    for one in proposals:
        plan = extend(plan, Proposal(one), graph, method="test")
    return plan


class TestWhatIsExact:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize(("site", "kinds"), [*FOLDED.items(), *ONLINE.items()])
    def test_every_kind(self, tiny: Tiny, generator: torch.Generator, name: str, site: str, kinds: Kinds) -> None:
        graph = subject_of(tiny(name)).model.graph
        plan = plan_of(graph, proposal(graph, site, kinds, generator))
        folded = len(kinds) if kinds == FOLDED[site] else 0
        assert {one.folded for one in plan.sites.values()} == {folded}
        if not change(tiny(name), plan) < EXACT:
            apart = {
                kind: change(tiny(name), plan_of(graph, proposal(graph, site, (kind,), generator))) for kind in kinds
            }
            pytest.fail(f"not exact at {site}: {apart}")

    @pytest.mark.parametrize("name", MODELS)
    def test_everything_at_once(self, tiny: Tiny, generator: torch.Generator, name: str) -> None:
        graph = subject_of(tiny(name)).model.graph
        kinds = {
            RESIDUAL: ("hadamard", "perm"),
            HEAD_IN: ("diag",),
            "attn_in": ("diag", "kron"),
            "mlp_in": ("diag", "signs", "orthogonal", "diag"),
            "vo": ("affine by head", "shift by head", "orthogonal"),
            "o_in": ("head_mix", "affine"),
            "up_down": ("diag", "hadamard"),
            "qk_post": ("affine", "hadamard"),
        }
        plan = Plan()
        for site, which in kinds.items():
            plan = extend(plan, Proposal(proposal(graph, site, which, generator)), graph, method="test")
        assert plan.at("layers.0.attn_in").folded == 1
        assert plan.at("layers.0.mlp_in").folded == 2
        assert plan.at("layers.1.vo").folded == 3
        assert plan.at("layers.1.up_down").folded == 1
        assert change(tiny(name), plan) < EXACT

    def test_there_is_no_kind_without_a_test(self) -> None:
        tested = {kind.partition(" ")[0] for kinds in (*FOLDED.values(), *ONLINE.values()) for kind in kinds}
        assert tested == set(OPERATORS)

    @pytest.mark.parametrize("site", ["attn_in", "mlp_in", "up_down"])
    @pytest.mark.parametrize("kind", ["diag", "signs"])
    def test_folded_and_online_agree(self, tiny: Tiny, generator: torch.Generator, site: str, kind: str) -> None:
        one = tiny("llama-biases")
        subject = subject_of(one)
        folded = plan_of(subject.model.graph, proposal(subject.model.graph, site, (kind,), generator))
        online = Plan({site_id: SitePlan(at.operators, 0) for site_id, at in folded.sites.items()})
        left, right = (exact_logits(replace(subject, plan=plan)) for plan in (folded, online))
        assert change(one, online) < EXACT
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)

    def test_an_empty_plan_changes_no_bit(self, tiny: Tiny) -> None:
        subject = subject_of(tiny("qwen2"))
        state = subject.model.tensors("model.layers.1.")
        for plan in (Plan(), Plan({RESIDUAL: SitePlan((), 0)})):
            folded = fold_block(subject.model.graph, plan, 1, state)
            assert folded.keys() == state.keys()
            assert all(torch.equal(folded[name], state[name]) for name in state)

    def test_the_stored_tensors_are_not_modified(self, tiny: Tiny, generator: torch.Generator) -> None:
        subject = subject_of(tiny("llama-biases"))
        graph = subject.model.graph
        state = subject.model.tensors("model.layers.0.")
        kept = {name: tensor.clone() for name, tensor in state.items()}
        plan = plan_of(
            graph, proposal(graph, RESIDUAL, ("perm",), generator), proposal(graph, "vo", ANYTHING, generator)
        )
        folded = fold_block(graph, plan, 0, state)
        assert all(torch.equal(kept[name], state[name]) for name in state)
        assert {tensor.dtype for tensor in folded.values()} == {torch.float64}


class TestByHand:
    """The formulas of folding, written out for one linear each."""

    def test_rotated_residual(self, tiny: Tiny, generator: torch.Generator) -> None:
        subject = subject_of(tiny("llama-biases"))
        q = orthogonal(24, generator)
        plan = plan_of(subject.model.graph, {RESIDUAL: [Orthogonal(q)]})
        state, folded = subject.folded(1), replace(subject, plan=plan).folded(1)
        gamma = state["input_layernorm.weight"]
        expected = {
            "input_layernorm.weight": torch.ones(24, dtype=torch.float64),
            "self_attn.k_proj.weight": state["self_attn.k_proj.weight"] @ torch.diag(gamma) @ q,
            "self_attn.k_proj.bias": state["self_attn.k_proj.bias"],
            "self_attn.o_proj.weight": q.T @ state["self_attn.o_proj.weight"],
            "mlp.down_proj.bias": state["mlp.down_proj.bias"] @ q,
        }
        for name, tensor in expected.items():
            torch.testing.assert_close(folded[name], tensor, rtol=1e-12, atol=1e-12)

    def test_each_query_head_follows_its_value_head(self, tiny: Tiny, generator: torch.Generator) -> None:
        subject = subject_of(tiny("llama-three-kv-heads"))
        p = invertible(8, generator, 3)
        plan = plan_of(subject.model.graph, {"layers.0.vo": [Affine.from_matrix(p, 3)]})
        state, folded = subject.folded(0), replace(subject, plan=plan).folded(0)
        value, out = state["self_attn.v_proj.weight"], state["self_attn.o_proj.weight"]
        for head in range(3):
            rows = slice(8 * head, 8 * head + 8)
            torch.testing.assert_close(folded["self_attn.v_proj.weight"][rows], p[head].T @ value[rows])
        for head in range(6):
            cols = slice(8 * head, 8 * head + 8)
            expected = out[:, cols] @ torch.linalg.inv(p[head // 2]).T
            torch.testing.assert_close(folded["self_attn.o_proj.weight"][:, cols], expected)

    def test_scales_in_front_of_down_proj(self, tiny: Tiny, generator: torch.Generator) -> None:
        subject = subject_of(tiny("llama-biases"))
        s = factors(40, generator)
        plan = plan_of(subject.model.graph, {"layers.1.up_down": [Diag(s)]})
        state, folded = subject.folded(1), replace(subject, plan=plan).folded(1)
        torch.testing.assert_close(folded["mlp.up_proj.weight"], s[:, None] * state["mlp.up_proj.weight"])
        torch.testing.assert_close(folded["mlp.up_proj.bias"], s * state["mlp.up_proj.bias"])
        torch.testing.assert_close(folded["mlp.down_proj.weight"], state["mlp.down_proj.weight"] / s)
        torch.testing.assert_close(folded["mlp.gate_proj.weight"], state["mlp.gate_proj.weight"])

    def test_a_tied_head_gets_weights_of_its_own(self, tiny: Tiny, generator: torch.Generator) -> None:
        subject = subject_of(tiny("llama-tied"))
        q = orthogonal(24, generator)
        plan = plan_of(subject.model.graph, {RESIDUAL: [Orthogonal(q)]})
        assert plan.unties_head(tied=True)
        assert not plan.unties_head(tied=False)
        stored, ends = subject.stored("model.embed_tokens.weight"), replace(subject, plan=plan).ends()
        gamma = subject.stored("model.norm.weight")
        torch.testing.assert_close(ends["model.embed_tokens.weight"], stored @ q)
        torch.testing.assert_close(ends["lm_head.weight"], (stored * gamma) @ q)
        assert torch.equal(ends["model.norm.weight"], torch.ones(24, dtype=torch.float64))

    def test_operators_between_a_sites_input_and_its_transformed_one(
        self, tiny: Tiny, generator: torch.Generator
    ) -> None:
        graph = subject_of(tiny("llama")).model.graph
        sites = (RESIDUAL, "vo", "attn_in", "o_in", "up_down")
        kinds = {RESIDUAL: "perm", "vo": "affine", "attn_in": "diag", "o_in": "head_mix", "up_down": "kron"}
        plan = plan_of(graph, *(proposal(graph, site, (kinds[site],), generator) for site in sites))
        met = {name: [one.kind for one in input_operators(graph, plan, 1, name)] for name in graph.input_sites_of(1)}
        assert met == {
            "attn_in": ["perm", "diag"],
            "o_in": ["affine", "head_mix"],
            "mlp_in": ["perm"],
            "up_down": ["kron"],
        }


class TestWhatIsRefused:
    @pytest.mark.parametrize("kind", ["diag", "affine", "kron", "block", "shift"])
    def test_on_the_residual(self, tiny: Tiny, generator: torch.Generator, kind: str) -> None:
        graph = subject_of(tiny("llama")).model.graph
        with pytest.raises(
            UsageError, match=f"`test` is not exact on this model: `{kind}` cannot be folded"
        ) as refused:
            plan_of(graph, proposal(graph, RESIDUAL, (kind,), generator))
        facts = dict(refused.value.facts)
        assert "orthogonal" in str(facts["exact there"])
        assert "RMS normalisation" in str(facts["because"])

    @pytest.mark.parametrize("kind", ["orthogonal", "hadamard", "perm", "affine", "shift"])
    def test_in_front_of_the_head(self, tiny: Tiny, generator: torch.Generator, kind: str) -> None:
        graph = subject_of(tiny("llama")).model.graph
        with pytest.raises(UsageError, match=f"`{kind}` cannot be folded at `head_in`"):
            plan_of(graph, proposal(graph, HEAD_IN, (kind,), generator))

    def test_what_the_planner_refuses_would_change_the_model(self, tiny: Tiny, generator: torch.Generator) -> None:
        one = tiny("llama")
        for site, kind, norms in ((RESIDUAL, "diag", True), (RESIDUAL, "orthogonal", False), (HEAD_IN, "perm", True)):
            by_hand = Plan({site: SitePlan((operator(kind, 24, generator),), 1)}, fold_norms=norms)
            assert change(one, by_hand) > 1e-3

    @pytest.mark.parametrize("site", ["attn_in", "mlp_in", "o_in"])
    def test_a_rotation_behind_a_norm_runs_online(self, tiny: Tiny, generator: torch.Generator, site: str) -> None:
        graph = subject_of(tiny("llama")).model.graph
        plan = plan_of(graph, proposal(graph, site, ("orthogonal",), generator))
        for one in graph.of_kind(site):
            assert plan.at(one.id).folded == 0
            assert len(plan.at(one.id).online) == 1
        assert not plan.fold_norms
        forced = Plan({site_id: SitePlan(at.operators, 1) for site_id, at in plan.sites.items()})
        assert change(tiny("llama"), forced) > 1e-3

    def test_only_the_prefix_is_folded(self, tiny: Tiny, generator: torch.Generator) -> None:
        graph = subject_of(tiny("llama")).model.graph
        plan = plan_of(graph, {"layers.0.up_down": [operator(k, 40, generator) for k in ("diag", "kron", "diag")]})
        assert plan.at("layers.0.up_down").folded == 1
        assert [one.kind for one in plan.at("layers.0.up_down").online] == ["kron", "diag"]
        assert change(tiny("llama"), plan) < EXACT

    @pytest.mark.parametrize(
        ("site", "dim", "heads"),
        [
            ("layers.0.attn_in", 20, 1),
            ("layers.0.vo", 16, 1),
            ("layers.0.vo", 4, 2),
            ("layers.0.vo", 8, 4),
            (RESIDUAL, 23, 1),
        ],
    )
    def test_another_size(self, tiny: Tiny, generator: torch.Generator, site: str, dim: int, heads: int) -> None:
        graph = subject_of(tiny("llama")).model.graph
        by_head = " by head" if heads > 1 else ""
        with pytest.raises(UsageError, match=f"wrong size at `{site}`") as refused:
            plan_of(graph, {site: [operator(f"orthogonal{by_head}", dim, generator, heads)]})
        assert dict(refused.value.facts)["received"] == f"{heads} x {dim}"

    @pytest.mark.parametrize(("name", "dim", "heads"), [("llama-no-groups", 32, 1), ("llama-one-kv-head", 4, 2)])
    def test_value_heads_are_not_mixed_and_not_split(
        self, tiny: Tiny, generator: torch.Generator, name: str, dim: int, heads: int
    ) -> None:
        graph = subject_of(tiny(name)).model.graph
        mixing = operator("orthogonal by head" if heads > 1 else "orthogonal", dim, generator, heads)
        with pytest.raises(UsageError, match=r"wrong size at `layers\.0\.vo`"):
            plan_of(graph, {"layers.0.vo": [mixing]})
        assert change(tiny(name), Plan({"layers.0.vo": SitePlan((mixing,), 1)})) > 1e-3

    def test_a_site_that_is_not_there(self, tiny: Tiny) -> None:
        graph = subject_of(tiny("llama")).model.graph
        with pytest.raises(UsageError, match=r"family `llama` has no site `layers.2.attn_in`") as refused:
            plan_of(graph, {"layers.2.attn_in": [Hadamard(24)]})
        assert "attn_in, o_in, mlp_in, up_down, vo, qk_pre, qk_post" in str(refused.value.facts[0][1])

    def test_every_group_is_decided(self) -> None:
        assert {one.group for one in OPERATORS.values()} <= set(ABSORBED_BY)


SANDWICH = Family(
    name="sandwich",
    model_types=("glm4",),
    final_norm=Norm("model.norm"),
    norms={"attn_in": Norm("input_layernorm"), "mlp_in": Norm("post_attention_layernorm")},
    linears=(
        Linear("self_attn.q_proj", reads="attn_in"),
        Linear("self_attn.k_proj", reads="attn_in"),
        Linear("self_attn.v_proj", reads="attn_in", writes="vo"),
        Linear("self_attn.o_proj", reads="o_in", writes="residual", writes_through="post_self_attn_layernorm"),
        Linear("mlp.gate_up_proj", reads="mlp_in"),
        Linear("mlp.down_proj", reads="up_down", writes="residual", writes_through="post_mlp_layernorm"),
    ),
)
"""A model whose blocks normalise their outputs too, described as data."""


class TestSandwichNorms:
    @pytest.fixture
    def one(self, tmp_path: Path) -> Iterator[Subject]:
        save_tiny_model(tmp_path / "model", tiny_config("glm4", pad_token_id=None, eos_token_id=None))
        model = open_model(tmp_path / "model", {"sandwich": SANDWICH}, cache=tmp_path / "cache")
        with double_precision():
            yield Subject(model, Plugins.discover())

    @pytest.mark.parametrize("kind", ["orthogonal", "hadamard"])
    def test_r1_is_refused_and_says_which_norms(self, one: Subject, generator: torch.Generator, kind: str) -> None:
        graph = one.model.graph
        with pytest.raises(UsageError, match="is not exact on this model") as refused:
            plan_of(graph, proposal(graph, RESIDUAL, (kind,), generator))
        assert "post_mlp_layernorm, post_self_attn_layernorm" in str(dict(refused.value.facts)["because"])
        forced = Plan({RESIDUAL: SitePlan((operator(kind, 24, generator),), 1)}, fold_norms=True)
        assert changed(one, forced) > 1e-3

    @pytest.mark.parametrize("kinds", [("perm",), ("signs",), ("perm", "signs", "perm")])
    def test_signed_permutations_are_exact(
        self, one: Subject, generator: torch.Generator, kinds: tuple[str, ...]
    ) -> None:
        graph = one.model.graph
        assert changed(one, plan_of(graph, proposal(graph, RESIDUAL, kinds, generator))) < EXACT

    @pytest.mark.parametrize(("site", "kind"), [("attn_in", "diag"), ("vo", "affine"), ("up_down", "hadamard")])
    def test_the_other_sites_are_as_ever(self, one: Subject, generator: torch.Generator, site: str, kind: str) -> None:
        graph = one.model.graph
        assert changed(one, plan_of(graph, proposal(graph, site, (kind,), generator))) < EXACT

    def test_without_an_up_proj_of_its_own_nothing_is_folded_in_front_of_down_proj(
        self, one: Subject, generator: torch.Generator
    ) -> None:
        graph = one.model.graph
        assert plan_of(graph, proposal(graph, "up_down", ("diag",), generator)).at("layers.0.up_down").folded == 0


class TestLayerNorms:
    """Norms that remove the mean, described as data; nothing of the kind is shipped."""

    @pytest.fixture
    def graph(self) -> ModelGraph:
        norms = {"attn_in": Norm("input_layernorm", kind="layer"), "mlp_in": Norm("post_attention_layernorm", "layer")}
        family = replace(SANDWICH, name="layered", norms=norms, final_norm=Norm("model.norm", "layer"), linears=())
        plain = tuple(replace(linear, writes_through="") for linear in SANDWICH.linears)
        return ModelGraph(replace(family, linears=plain), read_dimensions(tiny_config("llama"), family))

    @pytest.mark.parametrize("kind", ["orthogonal", "hadamard", "signs"])
    def test_they_do_not_commute_with_rotations(self, graph: ModelGraph, generator: torch.Generator, kind: str) -> None:
        with pytest.raises(UsageError, match="is not exact on this model") as refused:
            plan_of(graph, proposal(graph, RESIDUAL, (kind,), generator))
        assert "mean" in str(dict(refused.value.facts)["because"])

    def test_permutations_are_exact_and_shifts_are_folded(self, graph: ModelGraph, generator: torch.Generator) -> None:
        assert plan_of(graph, proposal(graph, RESIDUAL, ("perm",), generator)).at(RESIDUAL).folded == 1
        assert (
            plan_of(graph, proposal(graph, "attn_in", ("shift", "diag"), generator)).at("layers.0.attn_in").folded == 2
        )

    def test_a_shift_that_has_nowhere_to_go_is_refused(self, graph: ModelGraph, generator: torch.Generator) -> None:
        plan = plan_of(graph, proposal(graph, "mlp_in", ("diag", "shift"), generator))
        biases = {f"model.layers.{i}.post_attention_layernorm.bias" for i in range(2)}
        require_biases(graph, plan, biases.__contains__)
        biases.remove("model.layers.1.post_attention_layernorm.bias")
        with pytest.raises(UsageError, match=r"layers\.1\.post_attention_layernorm`, which has no bias") as told:
            require_biases(graph, plan, biases.__contains__)
        assert "bias=False" in told.value.hint
        state = {f"{one.module}.weight": torch.ones(40, graph.width(one.reads)) for one in graph.family.linears}
        norms = {f"{norm.module}.weight": torch.ones(24) for norm in graph.family.norms.values()}
        for fold_norms in (False, True):
            with pytest.raises(UsageError, match="`post_attention_layernorm`, which has no bias"):
                fold_block(graph, replace(plan, fold_norms=fold_norms), 0, state | norms)

    def test_without_a_bias_a_shift_runs_online(self, graph: ModelGraph, generator: torch.Generator) -> None:
        norms = {**graph.family.norms, "attn_in": Norm("input_layernorm", "layer", bias=False)}
        plain = replace(graph, family=replace(graph.family, norms=norms))
        plan = plan_of(plain, proposal(plain, "attn_in", ("diag", "shift"), generator))
        site = plan.at("layers.0.attn_in")
        assert [one.kind for one in site.online] == ["shift"]
        require_biases(plain, plan, lambda _: False)
        state = {f"{one.module}.weight": torch.randn(40, plain.width(one.reads)) for one in plain.family.linears}
        state |= {f"{norm.module}.weight": torch.rand(24) + 0.5 for norm in plain.family.norms.values()}
        state = {name: tensor.double() for name, tensor in state.items()}
        x = torch.nn.functional.layer_norm(torch.randn(5, 24, generator=generator).double(), (24,))
        folded = fold_block(plain, plan, 0, state)
        seen = x * folded["input_layernorm.weight"]
        for one in site.online:
            seen = one.act(seen)
        received = torch.nn.functional.linear(seen, folded["self_attn.q_proj.weight"], folded["self_attn.q_proj.bias"])
        torch.testing.assert_close(received, (x * state["input_layernorm.weight"]) @ state["self_attn.q_proj.weight"].T)

    def test_weight_and_bias_move_into_the_linears(self, graph: ModelGraph, generator: torch.Generator) -> None:
        state = {
            f"{linear.module}.weight": torch.randn(6, 24, generator=generator) for linear in graph.family.linears[:3]
        }
        state["self_attn.o_proj.weight"] = torch.randn(24, 32, generator=generator)
        state["mlp.gate_up_proj.weight"] = torch.randn(80, 24, generator=generator)
        state["mlp.down_proj.weight"] = torch.randn(24, 40, generator=generator)
        for norm in graph.family.norms.values():
            state |= {f"{norm.module}.{leaf}": torch.randn(24, generator=generator) for leaf in ("weight", "bias")}
        state["self_attn.q_proj.bias"] = torch.randn(6, generator=generator)
        state = {name: tensor.double() for name, tensor in state.items()}
        x = torch.nn.functional.layer_norm(torch.randn(5, 24, generator=generator).double(), (24,))

        def output(tensors: Mapping[str, Tensor]) -> Tensor:
            normed = x * tensors["input_layernorm.weight"] + tensors["input_layernorm.bias"]
            bias = tensors.get("self_attn.q_proj.bias")
            return torch.nn.functional.linear(normed, tensors["self_attn.q_proj.weight"], bias)

        proposed = proposal(graph, "attn_in", ("shift", "diag", "shift"), generator)
        for plan in (plan_of(graph, proposed), replace(plan_of(graph, proposed), fold_norms=True)):
            torch.testing.assert_close(output(fold_block(graph, plan, 0, state)), output(state))


class TestEnds:
    """Embedding and head are folded some rows at a time, to the bits that they have as a whole."""

    KINDS: Mapping[str, Kinds] = {
        "rotated": ("hadamard", "perm"),
        "dense": ("orthogonal", "signs"),
    }

    @pytest.mark.parametrize("name", ["llama", "llama-tied"])
    @pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_rows_at_a_time_give_the_bits_of_the_whole(
        self,
        tiny: Tiny,
        generator: torch.Generator,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        kinds: Kinds,
        dtype: torch.dtype,
    ) -> None:
        subject = subject_of(tiny(name))
        graph = subject.model.graph
        plan = plan_of(
            graph, proposal(graph, RESIDUAL, kinds, generator), proposal(graph, HEAD_IN, ("diag",), generator)
        )
        whole = fold_ends(graph, plan, subject.stored)
        assert {one.dtype for one in whole.values()} == {torch.float64}
        for rows in (64, 128):
            monkeypatch.setattr(fold_module, "ROWS", rows)
            ends = fold_ends(graph, plan, subject.stored, dtype=dtype)
            for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
                assert ends[tensor].dtype == dtype
                assert torch.equal(ends[tensor], whole[tensor].to(dtype))

    def test_no_operator_ever_sees_more(
        self, tiny: Tiny, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        subject = subject_of(tiny("llama"))
        graph, seen = subject.model.graph, list[int]()
        plan = plan_of(graph, proposal(graph, RESIDUAL, ("hadamard",), generator))
        act = Hadamard.act

        def watched(self: Hadamard, x: Tensor) -> Tensor:
            seen.append(len(x))
            return act(self, x)

        monkeypatch.setattr(Hadamard, "act", watched)
        monkeypatch.setattr(fold_module, "ROWS", 100)
        fold_ends(graph, plan, subject.stored)
        assert seen == 2 * [100, 100, 60]


class TestComposition:
    @pytest.mark.parametrize("name", ["llama-tied", "llama-biases", "qwen3"])
    @pytest.mark.parametrize("rotated_again", [False, True])
    def test_two_plans_in_one_are_one_after_the_other(
        self, tiny: Tiny, generator: torch.Generator, tmp_path: Path, name: str, rotated_again: bool
    ) -> None:
        one = tiny(name)
        subject = subject_of(one)
        graph = subject.model.graph
        first = [
            proposal(graph, RESIDUAL, ("hadamard",), generator),
            proposal(graph, "vo", ("orthogonal by head",), generator),
            proposal(graph, "up_down", ("diag",), generator),
            proposal(graph, "mlp_in", ("diag",), generator),
        ]
        second = [
            *((proposal(graph, RESIDUAL, ("perm",), generator),) if rotated_again else ()),
            proposal(graph, "attn_in", ("diag", "orthogonal"), generator),
            proposal(graph, "vo", ("affine by head", "shift"), generator),
            proposal(graph, "up_down", ("diag", "hadamard"), generator),
            proposal(graph, "o_in", ("head_mix",), generator),
        ]
        model = saved_with(replace(subject, plan=plan_of(graph, *first)), tmp_path / "first")
        after = Subject(model, subject.plugins, plan_of(model.graph, *second))
        composed = replace(subject, plan=plan_of(graph, *first, *second))
        for layer in range(graph.dims.num_layers):
            left, right = composed.folded(layer), after.folded(layer)
            assert left.keys() - right.keys() <= {"self_attn.v_proj.bias", "self_attn.o_proj.bias"}
            for tensor in right:
                torch.testing.assert_close(left[tensor], right[tensor], rtol=1e-9, atol=1e-9, msg=tensor)
        expected = exact_logits(subject)
        torch.testing.assert_close(exact_logits(composed), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(exact_logits(after), expected, rtol=1e-9, atol=1e-9)

    def test_scales_in_a_norm_vanish_in_front_of_a_rotation_and_it_is_said(
        self, tiny: Tiny, generator: torch.Generator
    ) -> None:
        subject = subject_of(tiny("llama"))
        graph = subject.model.graph
        scales = [proposal(graph, site, ("diag",), generator) for site in ("attn_in", "mlp_in", HEAD_IN, "up_down")]
        rotation = proposal(graph, RESIDUAL, ("hadamard",), generator)
        both, alone = plan_of(graph, *scales, rotation), plan_of(graph, scales[-1], rotation)
        assert both.notes == (
            "scales at attn_in, head_in, mlp_in vanish: the rotation that follows folds the norms they live in",
        )
        assert alone.notes == ()
        left, right = (replace(subject, plan=plan) for plan in (both, alone))
        for tensor, expected in {**right.folded(1), **right.ends()}.items():
            torch.testing.assert_close({**left.folded(1), **left.ends()}[tensor], expected, rtol=1e-12, atol=1e-12)
        assert both.at("layers.0.up_down").folded == 1
        assert change(tiny("llama"), both) < EXACT

    def test_scales_behind_a_rotation_stay(self, tiny: Tiny, generator: torch.Generator) -> None:
        graph = subject_of(tiny("llama")).model.graph
        scales = proposal(graph, "attn_in", ("diag",), generator)
        plan = plan_of(graph, proposal(graph, RESIDUAL, ("hadamard",), generator), scales)
        assert plan.notes == ()
        assert plan.at("layers.0.attn_in").operators == tuple(scales["layers.0.attn_in"])
        assert change(tiny("llama"), plan) < EXACT

    def test_scales_in_front_of_an_online_operator_survive_a_rotation_exactly(
        self, tiny: Tiny, generator: torch.Generator
    ) -> None:
        graph = subject_of(tiny("qwen2")).model.graph
        partly = proposal(graph, "attn_in", ("diag", "kron"), generator)
        plan = plan_of(graph, partly, proposal(graph, RESIDUAL, ("orthogonal",), generator))
        assert change(tiny("qwen2"), plan) < EXACT
        assert plan.notes == ("operators at attn_in act behind the rotation that follows them",)


class TestState:
    def test_a_plan_comes_back_bit_for_bit(self, tiny: Tiny, generator: torch.Generator, tmp_path: Path) -> None:
        subject = subject_of(tiny("llama-biases"))
        graph = subject.model.graph
        plan = plan_of(
            graph,
            proposal(graph, RESIDUAL, ("hadamard", "perm", "signs"), generator),
            proposal(graph, "vo", (*ANYTHING, *BY_HEAD), generator),
            proposal(graph, "o_in", ("head_mix", "block"), generator),
            proposal(graph, "up_down", ("diag", "kron"), generator),
            proposal(graph, "qk_post", ("affine",), generator),
        )
        tensors, described = plan.to_state()
        save_file(tensors, tmp_path / "plan.safetensors")
        again = Plan.from_state(load_file(tmp_path / "plan.safetensors"), json.loads(json.dumps(described)))
        assert again.fold_norms
        assert again.notes == plan.notes
        assert {site: at.folded for site, at in again.sites.items()} == {s: at.folded for s, at in plan.sites.items()}
        back, described_again = again.to_state()
        assert described_again == described
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in back)
        left, right = (replace(subject, plan=one) for one in (plan, again))
        for layer in range(2):
            expected = left.folded(layer)
            assert all(torch.equal(tensor, expected[name]) for name, tensor in right.folded(layer).items())
        assert torch.equal(exact_logits(left), exact_logits(right))


class TestDecoding:
    """A cache holds keys before R3 and rounding; what attention sees must not depend on when a key was stored."""

    @pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
    @pytest.mark.parametrize("kv", ["", "int4-asym-token", "int8-sym-g4"])
    def test_token_by_token_equals_all_at_once(
        self, tiny: Tiny, generator: torch.Generator, name: str, kv: str
    ) -> None:
        one = tiny(name)
        subject = subject_of(one)
        graph = subject.model.graph
        plan = plan_of(
            graph,
            proposal(graph, RESIDUAL, ("hadamard",), generator),
            proposal(graph, "vo", ("orthogonal by head",), generator),
            proposal(graph, "qk_post", ("affine", "hadamard"), generator),
            proposal(graph, "up_down", ("hadamard",), generator),
        )
        scheme = ModelScheme(kv=parse_tensor_scheme(kv, subject.plugins.format) if kv else None)
        subject = replace(subject, plan=plan, scheme=scheme)
        ids = torch.randint(0, 256, (2, 12), generator=generator)
        module: Any = Network(subject, device=torch.device("cpu"), dtype=torch.float64).load_all()
        with torch.no_grad():
            whole = module(input_ids=ids, use_cache=False).logits
            steps, cache = [], None
            for piece in (ids[:, :5], *ids[:, 5:].split(1, dim=1)):
                out = module(input_ids=piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits)
        plain = exact_logits_of(replace(subject, plan=Plan()), ids)
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-9, atol=1e-9)
        if kv:
            assert float((whole - plain).abs().max()) > 1e-6
        else:
            torch.testing.assert_close(whole, plain, rtol=1e-9, atol=1e-9)


class TestPlantedMistakes:
    """The checks see what they are for."""

    def test_a_head_that_stays_tied(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from qtool.builtin.transforms.quarot import QuaRot

        def tied(
            graph: ModelGraph, plan: Plan, state: Callable[[str], Tensor], *, dtype: torch.dtype
        ) -> dict[str, Tensor]:
            ends = fold_ends(graph, plan, state, dtype=dtype)
            return ends | ({"lm_head.weight": ends["model.embed_tokens.weight"]} if graph.dims.tied else {})

        monkeypatch.setattr(subject_module, "fold_ends", tied)
        with pytest.raises(CheckError, match=r"QuaRot changes the model \(llama, tied head\)"):
            check_transform(QuaRot(), families=["llama"])

    def test_query_heads_that_follow_the_wrong_value_head(
        self, tiny: Tiny, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        graph = subject_of(tiny("llama")).model.graph
        plan = plan_of(graph, proposal(graph, "vo", ("affine by head",), generator))
        original = Affine.weight_in

        def tiled(self: Affine, w: Tensor) -> Tensor:
            shuffled = w.unflatten(-1, (2, 2, 8)).transpose(-2, -3).flatten(-3)
            return original(self, shuffled).unflatten(-1, (2, 2, 8)).transpose(-2, -3).flatten(-3)

        monkeypatch.setattr(Affine, "weight_in", tiled)
        assert change(tiny("llama"), plan) > 1e-3


def saved_with(subject: Subject, folder: Path) -> Model:
    """Save a model with its plan folded in, all offline, as a model of its own with an untied head."""
    graph = subject.model.graph
    tensors = dict(subject.ends())
    for layer in range(graph.dims.num_layers):
        tensors |= {f"{graph.block_name(layer)}.{name}": tensor for name, tensor in subject.folded(layer).items()}
    folder.mkdir()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = AutoConfig.from_pretrained(subject.model.path)
    config.tie_word_embeddings = False
    config.save_pretrained(folder)
    return open_model(folder, {"same": subject.model.family}, cache=folder / "cache")


def exact_logits_of(subject: Subject, ids: Tensor) -> Tensor:
    """Logits in float64 of these tokens."""
    module: Any = Network(subject, device=torch.device("cpu"), dtype=torch.float64).load_all()
    with torch.no_grad():
        logits: Tensor = module(input_ids=ids, use_cache=False).logits
    return logits
