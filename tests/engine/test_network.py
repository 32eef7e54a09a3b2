"""The engine's block-by-block execution is transformers' own forward, plus what a subject adds to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.engine import network as network_module
from qtool.engine.execute import BlockExecutable, LoadedExecutable
from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding, SiteInput
from qtool.engine.network import Network
from qtool.engine.online import KernelHadamard, Turns
from qtool.engine.problem import Adapter
from qtool.engine.stream import Stream
from qtool.engine.subject import BlockContent, Subject
from qtool.errors import ModelError
from qtool.model.plan import Plan, SitePlan
from qtool.numerics.hadamard import hadamard_matrix
from qtool.numerics.operators import Diag, Hadamard, Operator, Perm
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from qtool.testing import save_tiny_model, tiny_config, tiny_model

CPU = torch.device("cpu")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
}

Open = Callable[[str], Subject]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Subjects of tiny random models by the names of ``MODELS``."""
    root, plugins = tmp_path_factory.mktemp("models"), Plugins.discover()
    (root / "home").mkdir()
    workspace = Workspace(plugins, root / "home", root / "cache")

    def of(name: str) -> Subject:
        if not (root / name).is_dir():
            model_type, changes = MODELS[name]
            save_tiny_model(root / name, tiny_config(model_type, **changes))
        return open_subject(str(root / name), workspace).subject

    return of


@pytest.fixture
def windows() -> Tensor:
    """Five windows, which no batch but one and five divides."""
    return torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(3))


def network(subject: Subject, dtype: torch.dtype = torch.float32) -> Network:
    return Network(subject, device=CPU, dtype=dtype)


def block_logits(subject: Subject, windows: Tensor, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    runs = BlockExecutable(subject, device=CPU, dtype=dtype, batch=batch).forward_windows(windows)
    return torch.cat([logits for _, logits in runs])


def transformers_logits(path: Path, windows: Tensor, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=rows, use_cache=False).logits for rows in windows.split(batch)])


class TestWholeModels:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("batch", [1, 2, 3, 8])
    def test_blocks_are_the_whole_model_bit_for_bit(self, opened: Open, windows: Tensor, name: str, batch: int) -> None:
        subject = opened(name)
        expected = transformers_logits(subject.model.path, windows, batch)
        assert torch.equal(block_logits(subject, windows, batch), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_in_other_dtypes_too(self, opened: Open, windows: Tensor, dtype: torch.dtype) -> None:
        subject = opened("qwen3")
        expected = transformers_logits(subject.model.path, windows, 2, dtype)
        received = block_logits(subject, windows, 2, dtype)
        assert received.dtype == dtype
        assert torch.equal(received, expected)

    @pytest.mark.parametrize("name", MODELS)
    def test_the_batch_does_not_matter(self, opened: Open, windows: Tensor, name: str) -> None:
        subject = opened(name)
        whole = block_logits(subject, windows, 5, torch.float64)
        for batch in (1, 2, 4):
            torch.testing.assert_close(
                block_logits(subject, windows, batch, torch.float64), whole, rtol=1e-11, atol=1e-11
            )

    @pytest.mark.parametrize("name", ["llama-tied", "mistral", "qwen3"])
    def test_the_module_that_is_handed_out_whole(self, opened: Open, windows: Tensor, name: str) -> None:
        subject = opened(name)
        module: Any = BlockExecutable(subject, device=CPU, dtype=torch.float32).whole()
        with torch.no_grad():
            received = torch.cat([module(input_ids=rows, use_cache=False).logits for rows in windows.split(2)])
        assert torch.equal(received, transformers_logits(subject.model.path, windows))
        assert not any(parameter.is_meta for parameter in module.parameters())

    def test_a_checkpoint_is_run_as_transformers_loads_it(self, opened: Open, windows: Tensor) -> None:
        path = opened("qwen2").model.path
        runs = dict(enumerate(LoadedExecutable(path, device=CPU, batch=2).forward_windows(windows)))
        assert [rows for rows, _ in runs.values()] == [slice(0, 2), slice(2, 4), slice(4, 5)]
        expected = transformers_logits(path, windows, 2, torch.float64)
        assert torch.equal(torch.cat([logits for _, logits in runs.values()]), expected)

    def test_shards_and_one_file_are_alike(self, opened: Open, windows: Tensor, tmp_path: Path) -> None:
        subject = opened("llama")
        AutoModelForCausalLM.from_pretrained(subject.model.path).save_pretrained(tmp_path / "m", max_shard_size="20KB")
        assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
        (tmp_path / "home").mkdir()
        workspace = Workspace(subject.plugins, tmp_path / "home", tmp_path / "cache")
        sharded = open_subject(str(tmp_path / "m"), workspace).subject
        assert torch.equal(block_logits(sharded, windows), block_logits(subject, windows))


class TestMemory:
    def test_only_the_ends_are_there_until_a_block_is_loaded(self, opened: Open) -> None:
        subject = opened("llama")
        one = network(subject)
        assert all(parameter.is_meta for parameter in one.blocks.parameters())
        assert not one.module.get_submodule("model.embed_tokens").weight.is_meta  # type: ignore[union-attr]
        one.load(1)
        assert not any(parameter.is_meta for parameter in one.blocks[1].parameters())
        assert all(parameter.is_meta for parameter in one.blocks[0].parameters())
        one.drop(1)
        assert all(parameter.is_meta for parameter in one.blocks.parameters())

    def test_at_most_one_block_is_there_while_a_model_is_measured(
        self, opened: Open, windows: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[set[int]] = []
        run = Stream.run

        def watched(self: Stream, layer: int, **arguments: Any) -> None:  # noqa: ANN401 - passed through
            blocks = self.network.blocks
            seen.append({i for i, one in enumerate(blocks) if not all(p.is_meta for p in one.parameters())})
            run(self, layer, **arguments)

        monkeypatch.setattr(Stream, "run", watched)
        block_logits(opened("llama"), windows)
        assert seen == [{0}, {1}]

    def test_a_dropped_block_remembers_no_activations_and_no_adapters(self, opened: Open, windows: Tensor) -> None:
        one = network(opened("llama"))
        one.load(0)
        hidden, arguments = one.embed(windows[:2])
        one.run(0, hidden, arguments[0])
        one.linear(0, "self_attn.q_proj")(hidden)
        assert one.sites[0]["attn_in"]._seen is not None
        one.linear(0, "mlp.up_proj").adapter = Adapter(torch.zeros(1, 24), torch.zeros(40, 1))
        one.drop(0)
        assert all(site._seen is None for site in one.sites[0].values())
        assert one.linear(0, "mlp.up_proj").adapter is None

    @pytest.mark.parametrize(
        ("watched", "runs"),
        [
            (["attn_in"], []),
            (["mlp_in", "attn_in"], ["self_attn.o_proj"]),
            (["attn_in", "o_in", "mlp_in", "up_down"], ["self_attn.o_proj", "mlp.gate_proj"]),
            ([], ["self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]),
        ],
    )
    def test_a_pass_for_observers_ends_with_the_last_that_is_watched(
        self, opened: Open, windows: Tensor, watched: list[str], runs: list[str]
    ) -> None:
        one = network(opened("llama"))
        one.load(0)
        ran: list[str] = []
        for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            one.linear(0, name).register_forward_hook(lambda *_, name=name: ran.append(name))
        seen: dict[str, list[Tensor]] = {name: [] for name in watched}
        for name in watched:
            one.sites[0][name].observer = seen[name].append
        stream = Stream(one, windows[:1], batch=1, spill=Path())
        before = stream.states.clone()
        stream.run(0, keep=False)
        assert ran == runs
        assert torch.equal(stream.states, before)
        stream.run(0, keep=True)
        assert not torch.equal(stream.states, before)
        assert all(torch.equal(*inputs) for inputs in seen.values())

    def test_the_states_move_to_a_file_where_memory_does_not_suffice(
        self, opened: Open, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        subject = opened("llama")
        expected = block_logits(subject, windows)
        monkeypatch.setattr("qtool.engine.stream.free_memory", lambda: 1)
        one = network(subject)
        stream = Stream(one, windows, batch=2, spill=tmp_path / "spill")
        for layer in range(2):
            one.load(layer)
            stream.run(layer, keep=True)
        assert torch.equal(torch.cat([one.logits(stream.states[rows]) for rows in stream.batches()]), expected)
        assert list((tmp_path / "spill").iterdir()) == [], "the file has no name, so nothing is left behind"


class TestLoading:
    def test_what_is_loaded_again_keeps_nothing_of_before(self, opened: Open, windows: Tensor) -> None:
        subject = opened("llama")
        one = network(subject)
        hidden, arguments = one.embed(windows)
        one.load(0)
        expected = one.run(0, hidden, arguments[0])
        state = subject.folded(0)
        adapter = Adapter(torch.randn(2, 24), torch.randn(40, 2))
        one.load(0, BlockContent(state, {"mlp.up_proj": adapter}))
        assert not torch.equal(one.run(0, hidden, arguments[0]), expected)
        one.load(0, BlockContent(state))
        assert torch.equal(one.run(0, hidden, arguments[0]), expected)

    def test_an_adapter_is_put_on_the_device_once(
        self, opened: Open, windows: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = network(opened("qwen2"))
        hidden, arguments = one.embed(windows)
        moved: list[torch.device] = []

        def on(adapter: Adapter, device: torch.device) -> Adapter:
            moved.append(device)
            return adapter

        monkeypatch.setattr(Adapter, "on", on)
        adapter = Adapter(torch.randn(2, 24), torch.randn(40, 2))
        one.load(0, BlockContent(one.subject.folded(0), {"mlp.up_proj": adapter}))
        one.run(0, hidden, arguments[0])
        assert moved == [one.device]

    def test_an_adapter_adds_its_product_to_the_weight(self, opened: Open, windows: Tensor) -> None:
        subject = opened("qwen2")
        generator = torch.Generator().manual_seed(0)
        one = network(subject, torch.float64)
        hidden, arguments = one.embed(windows)
        state = subject.folded(1)
        down, up = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((3, 40), (24, 3)))
        one.load(1, BlockContent(state, {"mlp.down_proj": Adapter(down, up)}))
        received = one.run(1, hidden, arguments[1])
        merged = {**state, "mlp.down_proj.weight": state["mlp.down_proj.weight"] + up.double() @ down.double()}
        one.load(1, BlockContent(merged))
        torch.testing.assert_close(received, one.run(1, hidden, arguments[1]), rtol=1e-10, atol=1e-10)

    def test_a_tensor_that_no_file_has_is_named(self, opened: Open, tmp_path: Path) -> None:
        subject = opened("qwen2")
        (tmp_path / "home").mkdir()
        folder = tmp_path / "model"
        folder.mkdir()
        for file in subject.model.path.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.self_attn.k_proj.bias"]
        save_file(tensors, folder / "model.safetensors")
        workspace = Workspace(subject.plugins, tmp_path / "home", tmp_path / "cache")
        one = network(open_subject(str(folder), workspace).subject)
        one.load(0)
        with pytest.raises(ModelError, match=r"lacks the tensor `model\.layers\.1\.self_attn\.k_proj\.bias`"):
            one.load(1)

    def test_only_linears_of_the_family_are_found(self, opened: Open) -> None:
        with pytest.raises(TypeError, match="input_layernorm"):
            network(opened("llama")).linear(0, "input_layernorm")


class TestRounding:
    """What a scheme says of activations happens in front of the linears, to the last bit."""

    def test_one_linear_by_hand(self, opened: Open) -> None:
        subject = opened("llama-tied")
        scheme = ModelScheme(activations=parse_tensor_scheme("int4-asym-token", subject.plugins.format))
        one = network(replace(subject, scheme=scheme))
        one.load(0)
        linear = one.linear(0, "mlp.gate_proj")
        x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1)) + 0.3
        received = linear(x)
        for row, result in zip(x.reshape(-1, 24), received.reshape(-1, 40), strict=True):
            low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
            step = torch.tensor((high - low) / 15).bfloat16().float()
            zero = (-low / step).round().clamp(0, 15)
            codes = ((row / step).round() + zero).clamp(0, 15)
            expected = ((codes - zero) * step) @ linear.weight.T + linear.bias
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        assert (received - torch.nn.functional.linear(x, linear.weight, linear.bias)).abs().max() > 1e-2

    @pytest.mark.parametrize("text", ["int8-sym-token", "int4-asym-g8", "fp8-token", "fp4-g8-se8m0"])
    def test_a_whole_model_by_hooks(self, opened: Open, windows: Tensor, text: str) -> None:
        subject = opened("qwen3")
        scheme = parse_tensor_scheme(text, subject.plugins.format)
        fmt = subject.plugins.format(scheme.format)

        def rounded(_: torch.nn.Module, inputs: tuple[Tensor]) -> Tensor:
            groups = inputs[0].unflatten(-1, (-1, scheme.group_size or inputs[0].shape[-1]))
            parameters = fmt.fit(groups, scheme)
            return fmt.decode(fmt.encode(groups, parameters), parameters).flatten(-2)

        model = AutoModelForCausalLM.from_pretrained(
            subject.model.path, dtype=torch.float32, attn_implementation="sdpa"
        )
        names = {linear.name for linear in subject.model.graph.linears}
        for name, module in model.named_modules():
            if name in names:
                module.register_forward_pre_hook(rounded)
        with torch.no_grad():
            expected = torch.cat([model(input_ids=rows, use_cache=False).logits for rows in windows.split(2)])
        received = block_logits(replace(subject, scheme=ModelScheme(activations=scheme)), windows)
        assert torch.equal(received, expected)

    def test_a_calibrated_multiplier_is_used_instead_of_one_from_the_batch(self, opened: Open) -> None:
        fmt = opened("llama").plugins.format("nvfp4")
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
        calibrated = Rounding(Grid.of(fmt.defaults, fmt), (torch.tensor(0.01),))
        assert torch.equal(calibrated(x)[:1], calibrated(x[:1])), "no token sees its neighbours"
        groups = x.unflatten(-1, (-1, 16))
        parameters = fmt.fit(groups, fmt.defaults, global_scale=torch.tensor(0.01))
        assert torch.equal(calibrated(x), fmt.decode(fmt.encode(groups, parameters), parameters).flatten(-2))
        assert not torch.equal(calibrated(x), Rounding(Grid.of(fmt.defaults, fmt))(x))

    @pytest.mark.parametrize("part", ["activations", "kv"])
    @pytest.mark.parametrize("text", ["fp8-tensor", "int8-tensor", "int4-asym-tensor", "fp4-g8-se4m3"])
    def test_what_is_shared_is_shared_within_a_window(
        self, opened: Open, windows: Tensor, part: str, text: str
    ) -> None:
        subject = opened("llama")
        scheme = ModelScheme(**{part: parse_tensor_scheme(text, subject.plugins.format)})
        rounded = replace(subject, scheme=scheme)
        alone = block_logits(rounded, windows, 1, torch.float64)
        for batch in (3, 5):
            received = block_logits(rounded, windows, batch, torch.float64)
            torch.testing.assert_close(received, alone, rtol=1e-12, atol=1e-12)
        assert (alone - block_logits(subject, windows, 1, torch.float64)).abs().max() > 1e-4

    def test_the_scale_of_a_tensor_is_that_of_one_window(self, opened: Open) -> None:
        fmt = opened("llama").plugins.format("int8")
        rounding = Rounding(Grid.of(replace(fmt.defaults, strategy="tensor", scale="fp32", range_rule="full"), fmt))
        x = torch.tensor([[[127.0, 0.4], [1.0, -2.6]], [[12.7, 0.44], [0.06, 0.04]]])
        expected = torch.tensor([[[127.0, 0.0], [1.0, -3.0]], [[12.7, 0.4], [0.1, 0.0]]])
        torch.testing.assert_close(rounding(x), expected)
        torch.testing.assert_close(rounding(x[1]), expected[1])

    def test_online_operators_come_before_rounding(self, opened: Open, windows: Tensor) -> None:
        subject = opened("llama")
        order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        scheme = ModelScheme(activations=parse_tensor_scheme("int4-sym-g8", subject.plugins.format))
        plan = Plan({f"layers.{i}.up_down": SitePlan((Perm(order),), 0) for i in range(2)})
        one = network(replace(subject, plan=plan, scheme=scheme))
        one.load(0)
        site = one.sites[0]["up_down"]
        x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
        rounding = site.rounding
        assert rounding is not None
        assert torch.equal(site(x), rounding(x[:, order]))
        assert not torch.equal(site(x), rounding(x)[:, order])

    @pytest.mark.parametrize("name", ["llama", "mistral"])
    def test_a_cache_in_16_bits_is_no_wrapper_at_all(self, opened: Open, windows: Tensor, name: str) -> None:
        subject = opened(name)
        one = network(subject)
        one.load(0)
        path = one.blocks[0].get_submodule("self_attn").kv_path  # type: ignore[union-attr]
        q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
        assert all(left is right for left, right in zip(path(q, k, v), (q, k, v), strict=True))  # type: ignore[operator]
        assert torch.equal(block_logits(subject, windows), transformers_logits(subject.model.path, windows))

    def test_a_quantized_cache_by_hand(self, opened: Open) -> None:
        subject = opened("llama")
        scheme = parse_tensor_scheme("int4-asym-token", subject.plugins.format)
        fmt = subject.plugins.format("int4")
        plan = Plan({"layers.0.qk_post": SitePlan((Diag(s := torch.linspace(0.5, 2, 8)),), 0)})
        one = network(replace(subject, plan=plan, scheme=ModelScheme(kv=scheme)))
        path = one.blocks[0].get_submodule("self_attn").kv_path  # type: ignore[union-attr]
        generator = torch.Generator().manual_seed(1)
        q, k, v = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2, 2))
        query, key, value = path(q, k, v)  # type: ignore[operator]
        torch.testing.assert_close(query, q / s)
        for received, x in ((key, k * s), (value, v)):
            for head in range(2):
                for token in range(3):
                    row = x[0, head, token]
                    expected = fmt.round(row, fmt.fit(row, scheme))
                    assert torch.equal(received[0, head, token], expected)

    def test_queries_and_keys_turn_through_a_kernel_where_there_is_one(
        self, opened: Open, windows: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = list[tuple[int, ...]]()

        class Watched:
            operation = "sylvester"
            preference = 0

            def supports(self, device: torch.device) -> bool:
                return True

            def run(self, x: Tensor) -> Tensor:
                seen.append(tuple(x.shape))
                return x @ hadamard_matrix(x.shape[-1]).to(x) / x.shape[-1] ** 0.5

        def replaced(operators: Sequence[Operator], plugins: Plugins, device: torch.device) -> tuple[Turns, ...]:
            return tuple(KernelHadamard(one, Watched()) if isinstance(one, Hadamard) else one for one in operators)

        subject = opened("llama")
        turn = Hadamard(8, torch.tensor([1, -1, 1, 1, -1, -1, 1, -1], dtype=torch.int8))
        turned = replace(subject, plan=Plan({f"layers.{i}.qk_post": SitePlan((turn,), 0) for i in range(2)}))
        expected = block_logits(turned, windows, 5)
        monkeypatch.setattr(network_module, "with_kernels", replaced)
        torch.testing.assert_close(block_logits(turned, windows, 5), expected, rtol=1e-5, atol=1e-5)
        assert seen == 2 * [(5, 4, 12, 1, 8), (5, 2, 12, 1, 8)], "queries and keys of two blocks"


class TestSiteInput:
    class Doubling:
        """Counts how often it acts."""

        def __init__(self) -> None:
            self.calls = 0

        def act(self, x: Tensor) -> Tensor:
            self.calls += 1
            return 2 * x

    def test_work_for_siblings_is_done_once(self, opened: Open, windows: Tensor) -> None:
        one = network(opened("qwen3"))
        doubling, seen = self.Doubling(), list[Tensor]()
        one.load(0)
        one.sites[0]["attn_in"].operators = (doubling,)
        one.sites[0]["attn_in"].observer = seen.append
        for rows in windows.split(2):
            hidden, arguments = one.embed(rows)
            one.run(0, hidden, arguments[0])
        assert doubling.calls == 3
        assert [len(x) for x in seen] == [24, 24, 12]

    @pytest.fixture
    def site(self) -> SiteInput:
        site = SiteInput()
        site.operators = (self.Doubling(),)
        site.readers = 100
        return site

    def test_the_same_tensor_is_remembered(self, site: SiteInput) -> None:
        x = torch.ones(2, 3)
        assert site(x) is site(x)

    def test_another_tensor_is_never_mistaken_for_the_last(self, site: SiteInput) -> None:
        for value in range(50):
            # Each tensor may lie where the one before it lay.
            assert site(torch.full((2, 3), float(value))).eq(2.0 * value).all()
        x = torch.ones(2, 3)
        assert site(x).eq(2).all()
        assert site(x.clone().mul_(3)).eq(6).all()
        assert site(x[:1]).shape == (1, 3)

    def test_a_tensor_that_was_changed_in_place_is_another(self, site: SiteInput) -> None:
        x = torch.ones(2, 3)
        assert site(x).eq(2).all()
        assert site(x.mul_(5)).eq(10).all()

    def test_a_block_that_is_loaded_again_forgets(self, opened: Open) -> None:
        subject = opened("llama")
        one = network(subject)
        one.load(0)
        site = one.sites[0]["mlp_in"]
        x = torch.ones(2, 24)
        site.operators = (self.Doubling(),)
        assert site(x).eq(2).all()
        one.load(0)
        assert site(x).eq(1).all()


class TestTinyModels:
    def test_nothing_in_them_is_left_at_a_default(self) -> None:
        with tiny_model("qwen3") as tiny:
            tensors = load_file(tiny.path / "model.safetensors")
            assert all(float(tensor.std()) > 0.05 for tensor in tensors.values())
            assert {name.split(".")[-2] for name in tensors} >= {"q_norm", "k_norm", "input_layernorm", "norm"}
        assert not tiny.path.exists()


def test_batches_cover_every_window_once_and_in_order(opened: Open, windows: Tensor) -> None:
    rows = Stream(network(opened("llama")), windows, batch=2, spill=Path("unused")).batches()
    assert [(one.start, one.stop) for one in rows] == [(0, 2), (2, 4), (4, 5)]


def test_a_scale_per_head_at_the_output_projection_only() -> None:
    with tiny_model() as tiny:
        model = tiny.workspace.model(str(tiny.path))
        plugins = tiny.workspace.plugins
        scheme = parse_tensor_scheme("int4-asym-token-sfp32", plugins.format)
        subject = Subject(model, plugins, scheme=ModelScheme(activations=scheme, scale_per_head=True))
        by_head, by_token = (subject.rounding(0, site, torch.device("cpu")) for site in ("o_in", "attn_in"))
        assert by_head is not None
        assert by_token is not None
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        x[:, :8] *= 50
        heads = torch.cat([by_token(head) for head in x.split(8, dim=-1)], dim=-1)
        assert torch.equal(by_head(x), heads)
        assert not torch.equal(by_token(x), heads)
