"""Every architecture runs block by block as transformers runs it: its masks, its positions, its caps, its tail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from qtool.engine.attention import attend, executed_attention
from qtool.engine.execute import BlockExecutable, LoadedExecutable
from qtool.engine.network import Network
from qtool.engine.stubs import Stub, UnpackedError, stubs_for
from qtool.engine.subject import Subject
from qtool.model.family import Family, Linear, Norm
from qtool.model.plan import Plan, SitePlan
from qtool.model.source import Model
from qtool.numerics.operators import Hadamard
from qtool.plugins import Plugins
from qtool.testing import double_precision, save_tiny_model, tiny_config

CPU = torch.device("cpu")
EXACT = 1e-9

OPT = Family(
    name="opt",
    model_types=("opt",),
    final_norm=Norm("model.decoder.final_layer_norm", kind="layer"),
    norms={"attn_in": Norm("self_attn_layer_norm", kind="layer"), "mlp_in": Norm("final_layer_norm", kind="layer")},
    linears=(
        *(Linear(f"self_attn.{name}_proj", reads="attn_in") for name in "qkv"),
        Linear("self_attn.out_proj", reads="o_in", writes="residual"),
        Linear("fc1", reads="mlp_in"),
        Linear("fc2", reads="up_down", writes="residual"),
    ),
    backbone="model.decoder",
    layers="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
)
"""Learned positions beside the embedding, and the family of a stranger."""

SHARP: dict[str, dict[str, Any]] = {
    "gemma2-window": {"model_type": "gemma2", "sliding_window": 5, "attn_logit_softcapping": 0.7},
    "gemma2-caps": {"model_type": "gemma2", "final_logit_softcapping": 0.5, "attn_logit_softcapping": None},
    "gemma3_text-window": {"model_type": "gemma3_text", "sliding_window": 5, "layer_types": None},
    "gpt_oss-window": {"model_type": "gpt_oss", "sliding_window": 5},
    "llama4_text-chunks": {
        **{"model_type": "llama4_text", "attention_chunk_size": 5, "no_rope_layers": [1, 0]},
        **{"interleave_moe_layer_step": 2, "num_local_experts": 4, "intermediate_size_mlp": 48, "floor_scale": 4},
    },
    "qwen2_moe-mixed": {"model_type": "qwen2_moe", "mlp_only_layers": [0], "output_router_logits": True},
    "qwen3-window": {"model_type": "qwen3", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    "granite-scales": {"model_type": "granite", "logits_scaling": 3.0, "residual_multiplier": 0.3},
    "opt": {"model_type": "opt", "ffn_dim": 40, "word_embed_proj_dim": 24, "head_dim": 6, "num_key_value_heads": 4},
}

Open = Callable[[str], Subject]


def _cases() -> dict[str, tuple[Family, dict[str, Any]]]:
    """Return families with the changes to a tiny config, by a name."""
    plugins = Plugins.discover()
    families: list[Family] = [plugins.load("families", name) for name in plugins.offers["families"]]
    cases: dict[str, tuple[Family, dict[str, Any]]] = {}
    for family in families:
        for model_type in family.model_types:
            for number, changes in enumerate(family.tiny):
                cases[f"{family.name}:{model_type}:{number}"] = family, {"model_type": model_type, **changes}
    for name, changes in SHARP.items():
        of_type = [family for family in (*families, OPT) if changes["model_type"] in family.model_types]
        cases[name] = of_type[0], {**of_type[0].tiny[0], **changes}
    return cases


CASES = _cases()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Subjects of tiny random models by the names of ``CASES``."""
    root, plugins = tmp_path_factory.mktemp("models"), Plugins.discover()

    def of(name: str) -> Subject:
        family, changes = CASES[name]
        folder = root / name.replace(":", "-")
        if not folder.is_dir():
            save_tiny_model(folder, tiny_config(**changes), loader=family.loader)
        config = AutoConfig.from_pretrained(folder)
        return Subject(Model(folder, config, family, id=name), plugins)

    return of


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(2, 256, (3, 12), generator=torch.Generator().manual_seed(3))


def reference(subject: Subject) -> nn.Module:
    """Load a model as transformers does, with its own attention and experts, in float64."""
    loader = getattr(transformers, subject.model.family.loader)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: nn.Module = loader.from_pretrained(subject.model.path, dtype=torch.float64, **plain)
    return model.eval()


def difference(received: Tensor, expected: Tensor) -> float:
    return float((received - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_blocks_and_the_whole_are_what_transformers_computes(opened: Open, windows: Tensor, name: str) -> None:
    subject = opened(name)
    with double_precision():
        expected = reference(subject)(input_ids=windows, use_cache=False).logits
        run = BlockExecutable(subject, device=CPU, dtype=torch.float64, batch=2)
        received = torch.cat([logits for _, logits in run.forward_windows(windows)])
        whole = run.whole()(input_ids=windows, use_cache=False).logits
    assert difference(received, expected) < EXACT
    assert difference(whole, expected) < EXACT
    assert expected.std() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("gemma2-window", "sliding_window"),
        ("gemma2-window", "attn_logit_softcapping"),
        ("gemma2-caps", "final_logit_softcapping"),
        ("gemma3_text-window", "sliding_window"),
        ("gpt_oss-window", "sliding_window"),
        ("llama4_text-chunks", "attention_chunk_size"),
        ("llama4_text-chunks", "floor_scale"),
        ("qwen3-window", "sliding_window"),
        ("granite-scales", "logits_scaling"),
    ],
)
def test_what_makes_an_architecture_special_is_at_work_here(
    opened: Open, windows: Tensor, name: str, option: str
) -> None:
    subject, (family, changes) = opened(name), CASES[name]
    without = tiny_config(**{key: value for key, value in changes.items() if key != option})
    model = getattr(transformers, family.loader).from_config(without, dtype=torch.float64, attn_implementation="eager")
    expected = reference(subject)
    model.load_state_dict(expected.state_dict())
    model.set_experts_implementation("eager")
    received = model.train(mode=False)(input_ids=windows, use_cache=False).logits
    assert difference(received, expected(input_ids=windows, use_cache=False).logits) > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2-window", "gpt_oss-window", "deepseek:deepseek_v3:0", "gpt-neox:gpt_neox:0"])
def test_queries_and_keys_turn_in_every_attention(opened: Open, windows: Tensor, name: str) -> None:
    subject = opened(name)
    dim = subject.model.graph.site("layers.0.qk_post").dim
    turn = Hadamard(dim, torch.tensor([1, -1] * (dim // 2), dtype=torch.int8))
    plan = Plan({f"layers.{i}.qk_post": SitePlan((turn,), 0) for i in range(2)})
    with double_precision():
        logits = [
            torch.cat([x for _, x in BlockExecutable(one, device=CPU, dtype=torch.float64).forward_windows(windows)])
            for one in (subject, replace(subject, plan=plan))
        ]
    assert 0 < difference(*logits) < EXACT


@torch.no_grad()
def test_greedy_generation_with_a_cache(opened: Open, windows: Tensor) -> None:
    for name in ("gemma2-window", "gpt_oss-window", "llama4_text-chunks"):
        subject = opened(name)
        amount = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        with double_precision():
            whole: Any = BlockExecutable(subject, device=CPU, dtype=torch.float64).whole()
            expected: Any = reference(subject)
            assert torch.equal(whole.generate(windows, **amount), expected.generate(windows, **amount))


def test_a_checkpoint_with_images_is_loaded_as_such(opened: Open, windows: Tensor) -> None:
    subject = opened("qwen2-vl:qwen2_vl:0")
    received = [logits for _, logits in LoadedExecutable(subject.model.path, device=CPU).forward_windows(windows)]
    with torch.no_grad():
        model = transformers.AutoModelForImageTextToText.from_pretrained(subject.model.path, dtype="auto")
        expected = model.train(mode=False)(input_ids=windows, use_cache=False).logits
    assert torch.equal(torch.cat(received), expected)


def test_towers_of_images_are_never_loaded(opened: Open) -> None:
    one = Network(opened("qwen2-vl:qwen2_vl:0"), device=CPU, dtype=torch.float32)
    loaded = {name for name, parameter in one.module.named_parameters() if not parameter.is_meta}
    assert loaded == {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_a_model_keeps_wide_stays_wide(opened: Open, dtype: torch.dtype) -> None:
    one = Network(opened("deepseek:deepseek_v3:0"), device=CPU, dtype=dtype)
    one.load(1)
    bias = one.blocks[1].get_buffer("mlp.gate.e_score_correction_bias")
    assert bias.dtype == torch.promote_types(dtype, torch.float32)
    assert bias.any()
    assert one.blocks[1].get_parameter("mlp.gate.weight").dtype == dtype
    one.drop(1)
    assert one.blocks[1].get_buffer("mlp.gate.e_score_correction_bias").is_meta
    one.load(1)
    assert torch.equal(one.blocks[1].get_buffer("mlp.gate.e_score_correction_bias"), bias)


class TestAttend:
    """Against a loop over every query, in float64."""

    @pytest.mark.parametrize("softcap", [None, 0.8])
    @pytest.mark.parametrize("sunk", [False, True])
    @pytest.mark.parametrize("masked", ["none", "bool", "float"])
    def test_against_a_loop(self, softcap: float | None, sunk: bool, masked: str) -> None:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, h, 5, d, generator=generator).double() for h, d in ((4, 6), (2, 6), (2, 3)))
        sinks = torch.randn(4, generator=generator).double() if sunk else None
        seen = torch.stack([torch.ones(5, 5, dtype=torch.bool).tril().triu(-reach) for reach in (2, 1)])
        mask = {
            "none": None,
            "bool": seen[:, None],
            "float": torch.where(seen, 0.0, -torch.inf)[:, None].double(),
        }
        received = attend(q, k, v, mask[masked], scaling=0.3, softcap=softcap, sinks=sinks)
        for window in range(2):
            for head in range(4):
                for token in range(5):
                    total, weighted = (0.0 if sinks is None else float(sinks[head].exp())), torch.zeros(3).double()
                    for past in range(5):
                        if masked != "none" and not seen[window, token, past]:
                            continue
                        score = float(q[window, head, token] @ k[window, head // 2, past]) * 0.3
                        score = score if softcap is None else softcap * float(torch.tensor(score / softcap).tanh())
                        weight = float(torch.tensor(score).double().exp())
                        total, weighted = total + weight, weighted + weight * v[window, head // 2, past]
                    torch.testing.assert_close(received[window, token, head], weighted / total, rtol=1e-6, atol=1e-7)

    def test_without_a_mask_tokens_see_what_came_before(self) -> None:
        module: Any = nn.Module()
        q, k, v = (torch.randn(1, 2, 4, 6, generator=torch.Generator().manual_seed(i)) for i in range(3))
        mask = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
        for arguments in ({"softcap": 0.5}, {"s_aux": torch.tensor([0.3, -1.0])}):
            given, _ = executed_attention(module, q, k, v, mask, scaling=0.4, **arguments)
            assert torch.equal(executed_attention(module, q, k, v, None, scaling=0.4, **arguments)[0], given)
            last, _ = executed_attention(module, q[:, :, 3:], k, v, None, scaling=0.4, **arguments)
            torch.testing.assert_close(last, given[:, 3:])
            free, _ = executed_attention(module, q, k, v, None, scaling=0.4, is_causal=False, **arguments)
            assert not torch.allclose(free, given)
        module.is_causal = False
        both = executed_attention(module, q, k, v, None, scaling=0.4, softcap=0.5)[0]
        assert torch.equal(both, attend(q, k, v, None, scaling=0.4, softcap=0.5))


class Block(nn.Module):
    """Takes arguments in every way that there is."""

    attention_type = "sliding"

    def forward(self, x: Tensor, mask: Tensor, *, scale: float = 1.0, use_cache: bool = False, **more: float) -> Tensor:
        del mask, scale, use_cache, more
        return x


class TestStubs:
    def test_arguments_are_known_by_name_wherever_they_stood(self) -> None:
        block, x, mask = Block(), torch.ones(2, 3, 4), torch.zeros(3)
        (stub,) = stubs_for([block], tuples=False)
        assert stub(x, mask, scale=2.0, use_cache=True, other=5.0) is x
        assert stub.hidden is x
        assert stub.arguments == {"mask": mask, "scale": 2.0, "other": 5.0}
        assert stub(mask=mask, x=x) is x
        assert stub.arguments == {"mask": mask}
        assert stub.attention_type == "sliding"
        assert not hasattr(stub, "nothing")
        assert list(stub.parameters()) == list(stub.children()) == []

    def test_a_model_that_unpacks_is_noticed(self) -> None:
        x, mask = torch.ones(2, 3, 4), torch.zeros(3)
        first, second = stubs_for([Block(), Block()], tuples=False)
        with pytest.raises(UnpackedError):
            second(first(x, mask)[0], mask)
        first, second = stubs_for([Block(), Block()], tuples=True)
        assert second(first(x, mask)[0], mask) == (x,)

    def test_a_model_whose_blocks_return_tuples(
        self, opened: Open, windows: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        subject = opened("llama:llama:0")
        expected = Network(subject, device=CPU, dtype=torch.float64)
        hidden, arguments = expected.embed(windows)
        one = Network(subject, device=CPU, dtype=torch.float64)

        def forward(input_ids: Tensor, **_: object) -> None:
            states = one.module.get_submodule("model.embed_tokens")(input_ids)
            for layer in one.module.get_submodule("model.layers"):  # type: ignore[attr-defined]
                states = layer(states, position_embeddings=None)[0]

        monkeypatch.setattr(one.backbone, "forward", forward)
        assert torch.equal(one.embed(windows)[0], hidden)
        assert not isinstance(one.module.get_submodule("model.layers.0"), Stub)
        expected.load(0)
        one.load(0)
        block = one.blocks[0]
        plain = block.forward
        monkeypatch.setattr(block, "forward", lambda *given, **named: (plain(*given, **named), None))
        assert torch.equal(one.run(0, hidden, arguments[0]), expected.run(0, hidden, arguments[0]))
