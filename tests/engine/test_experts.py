"""Experts compute what transformers computes for them, whoever watches, and say how many tokens went where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from qtool.engine.execute import BlockExecutable
from qtool.engine.experts import ExecutedExperts, Mode
from qtool.engine.network import Network
from qtool.engine.problem import Adapter
from qtool.engine.subject import BlockContent, Subject
from qtool.errors import ModelError
from qtool.model.family import Family
from qtool.model.plan import Plan, SitePlan
from qtool.model.source import Model
from qtool.numerics.operators import Hadamard
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.testing import double_precision, save_tiny_model, tiny_config

CPU = torch.device("cpu")
EXACT = 1e-9
TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "llama4_text")

Open = Callable[[str], Subject]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Subjects of tiny random models with experts, by model type; their second blocks have them all."""
    root, plugins = tmp_path_factory.mktemp("models"), Plugins.discover()
    families: list[Family] = [plugins.load("families", name) for name in plugins.offers["families"]]

    def of(model_type: str) -> Subject:
        family = next(one for one in families if model_type in one.model_types)
        if not (root / model_type).is_dir():
            save_tiny_model(root / model_type, tiny_config(model_type, **family.tiny[0]))
        return Subject(Model(root / model_type, AutoConfig.from_pretrained(root / model_type), family, ""), plugins)

    return of


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(2, 256, (3, 12), generator=torch.Generator().manual_seed(3))


def network(subject: Subject, observed: Mode = "all") -> Network:
    one = Network(subject, device=CPU, dtype=torch.float64, observed=observed)
    one.load(1)
    return one


def reference(subject: Subject) -> Any:  # noqa: ANN401 - a model of transformers
    """Return a model as transformers loads it, with its own loop over experts."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        subject.model.path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    return model.train(mode=False)


def reference_experts(subject: Subject) -> Any:  # noqa: ANN401 - a module of transformers
    """Return the experts of the second block as transformers loads them."""
    return experts_of(subject, reference(subject).get_submodule(f"{subject.model.family.layers}.1"))


def experts_of(subject: Subject, block: nn.Module) -> Any:  # noqa: ANN401 - a module of transformers, or ours
    assert subject.model.family.experts is not None
    return block.get_submodule(subject.model.family.experts.module)


def inputs_of(module: nn.Module, call: Callable[[], object]) -> tuple[Any, ...]:
    """Return what a module is given while something runs."""
    seen: list[tuple[Any, ...]] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given))
    call()
    handle.remove()
    assert len(seen) == 1
    return seen[0]


def by_hand(original: Any, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - a module of transformers
    """Return an expert's inner values and outputs, from the three-dimensional parameters and the config."""
    first, last = original.gate_up_proj[expert], original.down_proj[expert]
    if first.shape[0] == x.shape[-1]:
        first, last = first.T, last.T
    gate_up = x @ first.T + getattr(original, "gate_up_proj_bias", torch.zeros(len(original.gate_up_proj), 1))[expert]
    if hasattr(original, "alpha"):
        gate, up = gate_up[..., 0::2].clamp(max=original.limit), gate_up[..., 1::2]
        inner = (up.clamp(-original.limit, original.limit) + 1) * gate * torch.sigmoid(original.alpha * gate)
    else:
        gate, up = gate_up.tensor_split(2, dim=-1)
        inner = gate * torch.sigmoid(gate) * up
    return inner, inner @ last.T + getattr(original, "down_proj_bias", torch.zeros(len(last)))[expert]


def routed_rows(subject: Subject, given: tuple[Any, ...], expert: int) -> tuple[Tensor, Tensor]:
    """Return the tokens that go to an expert, and what it multiplies, from what the experts of a block are given."""
    if len(given) == 1:  # Llama 4: a copy of the tokens for each expert
        copy = given[0].view(subject.model.graph.dims.experts, -1, given[0].shape[-1])[expert]
        tokens = (copy != 0).any(dim=-1).nonzero().flatten()
        return tokens, copy[tokens]
    tokens = (given[1] == expert).any(dim=-1).nonzero().flatten()
    return tokens, given[0][tokens]


def run(one: Network, windows: Tensor) -> Tensor:
    """Run the second block on what the model embeds."""
    hidden, arguments = one.embed(windows)
    return one.run(1, hidden, arguments[1])


def watch(one: Network, *names: str) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        one.sites[1][name].observer = seen[name].append
    return seen


@pytest.mark.parametrize("model_type", TYPES)
class TestOfEveryFamily:
    def test_they_compute_what_transformers_computes(self, opened: Open, windows: Tensor, model_type: str) -> None:
        subject = opened(model_type)
        with double_precision():
            one = network(subject)
            mine = experts_of(subject, one.blocks[1])
            given = inputs_of(mine, lambda: run(one, windows))
            expected = reference_experts(subject)(*given)
            received = mine(*given)
        assert isinstance(mine, ExecutedExperts)
        assert received.shape == expected.shape
        assert (received - expected).abs().max() < EXACT * expected.abs().max()

    @pytest.mark.parametrize("mode", ["all", "routed"])
    def test_observing_changes_not_one_bit(self, opened: Open, windows: Tensor, model_type: str, mode: Mode) -> None:
        one = network(opened(model_type), mode)
        expected = run(one, windows)
        counts = one.experts[1].routed.clone()
        one.experts[1].reset()
        seen = watch(one, *one.sites[1])
        assert torch.equal(run(one, windows), expected)
        assert torch.equal(one.experts[1].routed, counts)
        assert all(seen[name] for name in one.subject.model.graph.input_sites_of(1) if not name.startswith("experts"))

    def test_counts_are_the_routers(self, opened: Open, windows: Tensor, model_type: str) -> None:
        subject = opened(model_type)
        routed: list[Tensor] = []
        with double_precision():
            one, model = network(subject), reference(subject)
            block = model.get_submodule(f"{subject.model.family.layers}.1")
            (router,) = (m for name, m in block.named_modules() if name.endswith((".gate", ".router")))
            router.register_forward_hook(lambda *given: routed.append(given[2]))
            model(input_ids=windows, use_cache=False)
            one.load(0)
            for rows in torch.split(windows, 2):
                hidden, arguments = one.embed(rows)
                one.run(1, one.run(0, hidden, arguments[0]), arguments[1])
        ((first, *_, last),) = routed
        chosen = first.topk(subject.model.graph.dims.chosen).indices if model_type == "llama4_text" else last
        expected = torch.stack([(chosen == expert).sum() for expert in range(4)])
        assert torch.equal(one.experts[1].routed, expected)
        assert expected.sum() == windows.numel() * subject.model.graph.dims.chosen
        one.experts[1].reset()
        assert not one.experts[1].routed.any()

    def test_every_expert_sees_every_token(self, opened: Open, windows: Tensor, model_type: str) -> None:
        subject = opened(model_type)
        with double_precision():
            one, original = network(subject), reference_experts(subject)
            seen = watch(one, "mlp_in", *(f"experts.{e}.{kind}" for e in range(4) for kind in ("mlp_in", "up_down")))
            given = inputs_of(one.experts[1], lambda: run(one, windows))
            (x,) = seen["mlp_in"]
            assert len(x) == windows.numel()
            for expert in range(4):
                tokens, rows = routed_rows(subject, given, expert)
                shown = x.index_copy(0, tokens, rows)
                assert torch.equal(torch.cat(seen[f"experts.{expert}.mlp_in"]), shown)
                inner, _ = by_hand(original, expert, shown)
                (received,) = seen[f"experts.{expert}.up_down"]
                torch.testing.assert_close(received, inner, rtol=1e-9, atol=1e-12)

    def test_an_expert_sees_the_tokens_that_it_gets(self, opened: Open, windows: Tensor, model_type: str) -> None:
        subject = opened(model_type)
        with double_precision():
            one, original = network(subject, "routed"), reference_experts(subject)
            seen = watch(one, *(f"experts.{e}.{kind}" for e in range(4) for kind in ("mlp_in", "up_down")))
            given = inputs_of(one.experts[1], lambda: run(one, windows))
            for expert in range(4):
                tokens, rows = routed_rows(subject, given, expert)
                assert int(one.experts[1].routed[expert]) == len(tokens)
                shown = (seen[f"experts.{expert}.mlp_in"], seen[f"experts.{expert}.up_down"])
                if len(tokens) == 0:
                    assert shown == ([], [])
                    continue
                ((received,), (received_inner,)) = shown
                assert torch.equal(received, rows)
                inner, _ = by_hand(original, expert, rows)
                torch.testing.assert_close(received_inner, inner, rtol=1e-9, atol=1e-12)

    def test_operators_that_run_online(self, opened: Open, windows: Tensor, model_type: str) -> None:
        subject, generator = opened(model_type), torch.Generator().manual_seed(1)
        graph, plans = subject.model.graph, dict[str, SitePlan]()
        for layer in range(2):
            for name in graph.input_sites_of(layer):
                width = graph.width(name)
                signs = (1 - 2 * torch.randint(0, 2, (width,), generator=generator)).to(torch.int8)
                plans[f"layers.{layer}.{name}"] = SitePlan((Hadamard(width, signs),), 0)
        turned = replace(subject, plan=Plan(plans))
        with double_precision():
            logits = [
                torch.cat(
                    [x for _, x in BlockExecutable(one, device=CPU, dtype=torch.float64).forward_windows(windows)]
                )
                for one in (subject, turned)
            ]
        assert 0 < (logits[0] - logits[1]).abs().max() < EXACT
        assert (
            network(turned).experts[1].get_submodule("0.down_proj" if model_type != "mixtral" else "0.w2") is not None
        )

    def test_no_parameter_of_all_experts_is_left(self, opened: Open, model_type: str) -> None:
        one = network(opened(model_type))
        assert all(parameter.ndim <= 2 for parameter in one.module.parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in one.blocks[1].named_parameters()}
        one.drop(1)
        assert all(parameter.is_meta for parameter in one.blocks[1].parameters())
        fresh = Network(one.subject, device=CPU, dtype=torch.float64)
        assert shapes == {name: tuple(parameter.shape) for name, parameter in fresh.blocks[1].named_parameters()}

    @pytest.mark.parametrize("text", ["int8-tensor", "fp4-g4-se4m3"])
    def test_no_window_sees_which_others_run_beside_it(
        self, opened: Open, windows: Tensor, model_type: str, text: str
    ) -> None:
        subject = opened(model_type)
        scheme = ModelScheme(activations=parse_tensor_scheme(text, subject.plugins.format))
        one = network(replace(subject, scheme=scheme))
        with double_precision():
            alone = torch.cat([run(one, window) for window in torch.split(windows, 1)])
            torch.testing.assert_close(run(one, windows), alone, rtol=1e-11, atol=1e-11)
            assert (alone - run(network(subject), windows)).abs().max() > 1e-4


class TestRounding:
    def test_rows_are_rounded_and_the_router_reads_what_is_not(self, opened: Open, windows: Tensor) -> None:
        subject = opened("qwen2_moe")
        scheme = parse_tensor_scheme("int4-asym-token", subject.plugins.format)
        fmt = subject.plugins.format(scheme.format)
        one, original = network(replace(subject, scheme=ModelScheme(activations=scheme))), reference_experts(subject)
        seen = watch(one, "mlp_in")
        routed: list[tuple[Tensor, ...]] = []
        one.blocks[1].get_submodule("mlp.gate").register_forward_hook(
            lambda *given: routed.append((given[1][0], *given[2]))
        )
        gated = inputs_of(one.blocks[1].get_submodule("mlp.shared_expert_gate"), lambda: run(one, windows))
        (x,), ((read, _, weights, indices),) = seen["mlp_in"], routed
        assert torch.equal(read, x)
        assert torch.equal(gated[0], x)

        def rounded(values: Tensor) -> Tensor:
            return fmt.round(values, fmt.fit(values, scheme))

        received = one.experts[1](x, indices, weights)
        expected = torch.zeros_like(x)
        for token in range(len(x)):
            for expert, weight in zip(indices[token], weights[token], strict=True):
                inner, _ = by_hand(original, int(expert), rounded(x[token : token + 1]))
                expected[token] += weight * (rounded(inner) @ original.down_proj[expert].T)[0]
        torch.testing.assert_close(received, expected, rtol=1e-9, atol=1e-12)


class TestLoading:
    def test_a_missing_linear_of_an_expert_is_named(self, opened: Open) -> None:
        subject = opened("qwen3_moe")
        one = Network(subject, device=CPU, dtype=torch.float32)
        state = subject.folded(1)
        del state["mlp.experts.2.down_proj.weight"]
        with pytest.raises(ModelError, match=r"`model\.layers\.1\.mlp\.experts\.2\.down_proj\.weight`"):
            one.load(1, BlockContent(state))

    def test_a_missing_bias_of_an_expert_is_named(self, opened: Open) -> None:
        subject = opened("gpt_oss")
        state = subject.folded(1)
        del state["mlp.experts.1.gate_up_proj.bias"]
        with pytest.raises(ModelError, match=r"`model\.layers\.1\.mlp\.experts\.1\.gate_up_proj\.bias`"):
            Network(subject, device=CPU, dtype=torch.float32).load(1, BlockContent(state))

    def test_an_adapter_of_an_expert(self, opened: Open, windows: Tensor) -> None:
        subject = opened("mixtral")
        one, state = network(subject), subject.folded(1)
        plain = run(one, windows)
        generator = torch.Generator().manual_seed(0)
        down, up = torch.randn(2, 40, generator=generator), torch.randn(24, 2, generator=generator)
        name = "mlp.experts.2.w2"
        one.load(1, BlockContent(state, {name: Adapter(down, up)}))
        received = run(one, windows)
        one.load(1, BlockContent({**state, f"{name}.weight": state[f"{name}.weight"] + up.double() @ down.double()}))
        torch.testing.assert_close(received, run(one, windows), rtol=1e-10, atol=1e-10)
        assert (received - plain).abs().max() > 1e-2
        one.drop(1)
        assert one.linear(1, name).adapter is None


class TestOneExpert:
    """Experts that nobody was sent to, and tokens that were sent to nobody."""

    @pytest.mark.parametrize("mode", ["all", "routed"])
    def test_without_tokens(self, opened: Open, mode: Mode) -> None:
        one = network(opened("qwen3_moe"), mode)
        seen = watch(one, "experts.0.up_down", "experts.3.up_down")
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).double()
        index, weight = torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5).double()
        result = one.experts[1](x, index, weight)
        assert one.experts[1].routed.tolist() == [5, 5, 0, 0]
        assert [len(x) for x in seen["experts.3.up_down"]] == ([5] if mode == "all" else [])
        assert [len(x) for x in seen["experts.0.up_down"]] == [5]
        nobody = torch.tensor([[0, 4]] * 5)
        half = one.experts[1](x, nobody, weight)
        other = one.experts[1](x, torch.tensor([[1, 4]] * 5), weight)
        torch.testing.assert_close(half + other, result, rtol=1e-12, atol=1e-12)
        assert one.experts[1].routed.tolist() == [10, 10, 0, 0]

    def test_a_pass_for_observers_ends_with_the_last_of_them(self, opened: Open, windows: Tensor) -> None:
        one = network(opened("qwen3_moe"))
        hidden, arguments = one.embed(windows)
        ran: list[int] = []
        for expert in range(4):
            linear = one.linear(1, f"mlp.experts.{expert}.down_proj")
            linear.register_forward_hook(lambda *_, expert=expert: ran.append(expert))
        seen = watch(one, "mlp_in")
        one.show(1, hidden, arguments[1])
        assert (len(seen["mlp_in"]), ran) == (1, [])
        one.sites[1]["mlp_in"].observer = None
        seen = watch(one, "experts.1.up_down", "experts.2.up_down")
        one.show(1, hidden, arguments[1])
        assert [len(found) for found in seen.values()] == [1, 1]
        assert ran == [0, 1]
        assert one.sites[1]["experts.2.up_down"].observer is not None
