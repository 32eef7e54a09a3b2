"""Trials against a block that is put together by hand, and what they leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import qtool.engine.trials as trials_module
from qtool.engine.fold import fold_block
from qtool.engine.network import Network
from qtool.engine.planner import extend
from qtool.engine.stream import Stream
from qtool.engine.subject import BlockContent
from qtool.engine.trials import Trial, Trials, round_siblings
from qtool.errors import SchemeError, UsageError
from qtool.model.graph import Site
from qtool.model.plan import BlockTrial, Plan, Proposal
from qtool.numerics.operators import Diag, Hadamard, Operator, Shift
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.calibrate import WINDOWS
from qtool.testing import TinyModel, tiny_model

CPU = torch.device("cpu")
FAMILIES = ("llama", "qwen2_moe", "gpt_neox", "llama4_text", "deepseek_v2", "gpt_oss")


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("llama", attention_bias=True) as made:
        yield made


def scheme_of(tiny: TinyModel, weights: str, activations: str | None = None) -> ModelScheme:
    lookup = tiny.workspace.plugins.format
    return ModelScheme(
        weights=parse_tensor_scheme(weights, lookup),
        activations=None if activations is None else parse_tensor_scheme(activations, lookup, vector="token"),
    )


def trials_of(tiny: TinyModel, scheme: ModelScheme, plan: Plan | None = None) -> Trials:
    windows = tiny.statistics.tensor(WINDOWS).long()
    return Trials(replace(tiny.subject, plan=plan or Plan()), windows, scheme, CPU, torch.float64)


def factors(n: int, seed: int = 0) -> Tensor:
    return 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scales(site: Site, seed: int = 0) -> list[Operator]:
    if site.heads == 1:
        return [Diag(factors(site.dim, seed))]
    return [Diag(factors(site.dim * site.heads, seed).view(site.heads, site.dim), heads=site.heads)]


class TestAgainstABlockByHand:
    """The oracle is transformers' own block with weights that are put in, and hooks that round."""

    @pytest.mark.parametrize("activations", [None, "int4-asym-token-sfp32"])
    @pytest.mark.parametrize("kind", ["attn_in", "vo", "mlp_in", "up_down"])
    def test_every_site_of_every_block(self, tiny: TinyModel, kind: str, activations: str | None) -> None:
        import transformers

        scheme = scheme_of(tiny, "int3-asym", activations)
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float64).eval()
        windows = tiny.statistics.tensor(WINDOWS).long()[:2]
        with torch.no_grad():
            states = model.model(windows, output_hidden_states=True).hidden_states
            rotary = model.model.rotary_emb(states[0], torch.arange(windows.shape[1])[None])
        for trial in trials_of(tiny, scheme)(2 * windows.shape[1]):
            layer = trial.layer
            site = tiny.subject.model.graph.site(f"layers.{layer}.{kind}")
            (diag,) = scales(site, layer)
            assert isinstance(diag, Diag)
            block = model.model.layers[layer]
            linears = {
                "attn_in": [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj],
                "vo": [block.self_attn.o_proj],
                "mlp_in": [block.mlp.gate_proj, block.mlp.up_proj],
                "up_down": [block.mlp.down_proj],
            }[kind]
            # Heads of queries lie side by side, those of one value head next to each other.
            s = diag.s if diag.heads == 1 else diag.s.repeat_interleave(2, dim=0).flatten()

            def scaled(_: object, given: tuple[Tensor], s: Tensor = s) -> tuple[Tensor]:
                return (by_hand(given[0] * s, 4) if activations else given[0] * s,)

            with torch.no_grad():
                exact = block(states[layer], position_embeddings=rotary)
                if layer == 0:
                    torch.testing.assert_close(exact, states[1])
                kept = [one.weight.data for one in linears]
                hooks = [one.register_forward_pre_hook(scaled) for one in linears]
                for one in linears:
                    one.weight.data = by_hand((one.weight.data / s).float(), 3, bf16=True).double()
                found = block(states[layer], position_embeddings=rotary)
                for one, weight, hook in zip(linears, kept, hooks, strict=True):
                    one.weight.data = weight
                    hook.remove()
            expected = float((found - exact).square().mean())
            assert expected > 0
            assert trial.error({site.id: [diag]}) == pytest.approx(expected, rel=1e-6)


def by_hand(x: Tensor, num_bits: int, *, bf16: bool = False) -> Tensor:
    """Round each row to an asymmetric grid that holds zero."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0).float(), x.amax(-1, keepdim=True).clamp_min(0).float()
    scale = (high - low) / (2**num_bits - 1)
    scale = scale.bfloat16().float() if bf16 else scale
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 2**num_bits - 1).sub(zero).mul(scale).to(x.dtype)


class TestExactness:
    """Without rounding no operator changes a block, whatever reads the site."""

    @pytest.fixture(autouse=True)
    def _unrounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trials_module, "round_siblings", lambda weights, grid: list(weights))

    @pytest.mark.parametrize("name", FAMILIES)
    def test_scales_at_every_site(self, name: str) -> None:
        with tiny_model(name) as tiny:
            graph = tiny.subject.model.graph
            for trial in trials_of(tiny, scheme_of(tiny, "int4"))(64):
                inputs = [graph.site(f"layers.{trial.layer}.{site}") for site in graph.input_sites_of(trial.layer)]
                for site in (*inputs, *graph.of_kind("vo", trial.layer)):
                    assert trial.error({site.id: scales(site)}) < 1e-14
                assert trial.error({site.id: scales(site) for site in inputs}) < 1e-14

    def test_shifts_and_rotations(self, tiny: TinyModel) -> None:
        for trial in trials_of(tiny, scheme_of(tiny, "int4"))(64):
            operators: list[Operator] = [Shift(factors(24)), Hadamard(24)]
            assert trial.error({f"layers.{trial.layer}.mlp_in": operators}) < 1e-14

    def test_behind_a_plan(self, tiny: TinyModel) -> None:
        graph = tiny.subject.model.graph
        earlier = {
            f"layers.{layer}.{name}": [Hadamard(graph.width(name)), Diag(factors(graph.width(name), 3))]
            for layer in range(2)
            for name in ("attn_in", "o_in", "up_down")
        }
        plan = extend(Plan(), Proposal(earlier), graph, method="x")
        for trial in trials_of(tiny, scheme_of(tiny, "int4"), plan)(64):
            for kind in ("attn_in", "vo", "o_in", "up_down"):
                site = graph.site(f"layers.{trial.layer}.{kind}")
                assert trial.error({site.id: scales(site)}) < 1e-14
            vo, o_in = (graph.site(f"layers.{trial.layer}.{kind}") for kind in ("vo", "o_in"))
            assert trial.error({vo.id: scales(vo), o_in.id: scales(o_in, 1)}) < 1e-14


class TestTrial:
    def test_it_is_what_the_contract_says(self, tiny: TinyModel) -> None:
        assert isinstance(next(trials_of(tiny, scheme_of(tiny, "int4"))(32)), BlockTrial)

    def test_nothing_is_left_of_a_trial(self, tiny: TinyModel) -> None:
        made = trials_of(tiny, scheme_of(tiny, "int4", "int4-asym-token-sfp32"))
        graph, tried = tiny.subject.model.graph, [Shift(factors(24)), Diag(factors(24))]
        for trial in made(64):
            assert isinstance(trial, Trial)
            network, others = trial.stream.network, ("vo", "attn_in", "up_down")
            before = {name: value.clone() for name, value in network.blocks[trial.layer].named_parameters()}
            errors = [
                trial.error({f"layers.{trial.layer}.{one}": scales(graph.site(f"layers.{trial.layer}.{one}"))})
                for one in others
            ]
            alone = trial.error({f"layers.{trial.layer}.mlp_in": tried})
            again = [
                trial.error({f"layers.{trial.layer}.{one}": scales(graph.site(f"layers.{trial.layer}.{one}"))})
                for one in others
            ]
            assert again == errors
            assert trial.error({f"layers.{trial.layer}.mlp_in": tried}) == alone
            after = dict(network.blocks[trial.layer].named_parameters())
            assert before.keys() == after.keys()  # a shift gave linears biases for as long as it was tried
            for name, value in before.items():
                torch.testing.assert_close(after[name], value, rtol=0, atol=0)
            for site in network.sites[trial.layer].values():
                assert (site.operators, site.rounding) == ((), None)

    def test_nothing_is_left_of_a_trial_that_fails(self, tiny: TinyModel) -> None:
        trial = next(trials_of(tiny, scheme_of(tiny, "int4"))(32))
        expected = trial.error({"layers.0.attn_in": [Diag(factors(24))]})
        with pytest.raises(Exception, match="diag"):
            trial.error({"layers.0.mlp_in": [Diag(factors(24))], "layers.0.attn_in": [Diag(factors(7))]})
        assert trial.error({"layers.0.attn_in": [Diag(factors(24))]}) == expected

    def test_blocks_get_the_inputs_of_full_precision(self, tiny: TinyModel) -> None:
        """Whatever is tried in a block, the next starts from what the model computes."""
        made = trials_of(tiny, scheme_of(tiny, "int2"))
        site, errors = "layers.1.attn_in", []
        for tries in (0, 3):
            for trial in made(64):
                for seed in range(tries):
                    trial.error({f"layers.{trial.layer}.attn_in": [Diag(factors(24, seed))]})
                if trial.layer == 1:
                    errors.append(trial.error({site: []}))
        assert errors[0] == errors[1]

    def test_experts_each_round_their_own_rows(self) -> None:
        """Of an input that all experts read, an expert rounds its own tokens: their scale is one for each token."""
        with tiny_model("qwen2_moe") as tiny:
            scheme = scheme_of(tiny, "int8", "int3-asym-token")
            blocks = trials_of(tiny, scheme)(32)
            next(blocks)
            trial = next(blocks)
            alone = {site: trial.error({f"layers.1.{site}": []}) for site in ("mlp_in", "experts.0.up_down")}
            assert all(value > 1e-8 for value in alone.values())
            both = trial.error({"layers.1.mlp_in": [], "layers.1.experts.0.up_down": []})
            assert both > alone["experts.0.up_down"]

    def test_it_equals_the_quantized_model(self, tiny: TinyModel) -> None:
        """Tried at all sites at once, a block is that of the quantized model: scales in float32, which rows keep."""
        scheme = scheme_of(tiny, "int4-sfp32", "int4-asym-token-sfp32")
        graph = tiny.subject.model.graph
        trial = next(trials_of(tiny, scheme)(64))
        assert isinstance(trial, Trial)
        operators = {f"layers.0.{name}": scales(graph.site(f"layers.0.{name}")) for name in graph.input_sites_of(0)}
        plan = extend(Plan(), Proposal(operators), graph, method="x")
        subject = replace(tiny.subject, plan=plan, scheme=replace(scheme, weights=None))
        state = dict(fold_block(graph, plan, 0, tiny.subject.folded(0)))
        grids = replace(subject, scheme=scheme)
        for linear in graph.linears_of(0):
            name = f"{linear.spec.module}.weight"
            (state[name],) = round_siblings([state[name]], grids.weight_grid(linear))
        network = Network(subject, device=CPU, dtype=torch.float64)
        network.load(0, BlockContent(state))
        total = 0.0
        for rows in trial.stream.batches():
            found = network.run(0, trial.stream.states[rows], trial.stream.arguments_of(0))
            exact = trial.stream.network.run(0, trial.stream.states[rows], trial.stream.arguments_of(0))
            total += float((found - exact).square().sum())
        assert trial.error(operators) == pytest.approx(total / trial.stream.states.numel(), rel=1e-6)


class TestTokens:
    @pytest.mark.parametrize(
        ("tokens", "shape"), [(1, (1, 1)), (20, (1, 20)), (32, (1, 32)), (33, (2, 32)), (64, (2, 32)), (9999, (6, 32))]
    )
    def test_whole_windows(self, tiny: TinyModel, tokens: int, shape: tuple[int, int]) -> None:
        trial = next(trials_of(tiny, scheme_of(tiny, "int4"))(tokens))
        assert trial.stream.states.shape[:2] == shape

    def test_long_windows_are_cut(self, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trials_module, "LONGEST", 8)
        trial = next(trials_of(tiny, scheme_of(tiny, "int4"))(20))
        torch.testing.assert_close(trial.stream.windows, tiny.statistics.tensor(WINDOWS).long()[:3, :8])


class TestSiblings:
    def test_they_share_a_multiplier(self, tiny: TinyModel) -> None:
        """What engines fuse is rounded as one tensor: each row block of the stack."""
        scheme = scheme_of(tiny, "nvfp4")
        assert scheme.weights is not None
        from qtool.engine.grid import Grid

        grid = Grid.of(scheme.weights, tiny.workspace.plugins.format("nvfp4"))
        generator = torch.Generator().manual_seed(0)
        one, other = torch.randn(3, 32, generator=generator), 40 * torch.randn(5, 32, generator=generator)
        (stacked,) = round_siblings([torch.cat([one, other])], grid)
        torch.testing.assert_close(torch.cat(round_siblings([one, other], grid)), stacked, rtol=0, atol=0)
        assert not torch.equal(round_siblings([one], grid)[0], stacked[:3])


class TestRefusals:
    def test_weights_that_stay_as_they_are(self, tiny: TinyModel) -> None:
        with pytest.raises(UsageError, match="how weights are going to be quantized") as refused:
            trials_of(tiny, ModelScheme())(32)
        assert refused.value.hint == "--scheme W4A16"

    def test_groups_that_do_not_divide(self, tiny: TinyModel) -> None:
        with pytest.raises(SchemeError, match="128"):
            trials_of(tiny, scheme_of(tiny, "int4-g128"))(32)

    def test_no_tokens(self, tiny: TinyModel) -> None:
        with pytest.raises(UsageError, match="tokens"):
            trials_of(tiny, scheme_of(tiny, "int4"))(0)

    @pytest.mark.parametrize("site", ["layers.1.attn_in", "layers.0.qk_pre", "residual"])
    def test_sites_that_nothing_of_the_block_reads(self, tiny: TinyModel, site: str) -> None:
        trial = next(trials_of(tiny, scheme_of(tiny, "int4"))(32))
        with pytest.raises(UsageError, match="no quantized linear of block 0"):
            trial.error({site: []})


def test_a_stream_without_rounding(tiny: TinyModel) -> None:
    """The blocks' inputs are those of the model itself."""
    made = trials_of(tiny, scheme_of(tiny, "int2", "int2-asym-token"))
    network = Network(tiny.subject, device=CPU, dtype=torch.float64)
    stream = Stream(network, made.windows[:2], batch=2, spill=tiny.path)
    network.load(0)
    stream.run(0, keep=True)
    blocks = made(64)
    next(blocks)
    second = next(blocks)
    assert isinstance(second, Trial)
    torch.testing.assert_close(second.stream.states, stream.states)
