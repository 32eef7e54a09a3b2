"""Outputs of linears are rounded behind bias and correction, in front of what is undone, by a scale of calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.builtin.formats.integer import Int8
from qtool.engine.execute import BlockExecutable
from qtool.engine.gather import Gathering
from qtool.engine.grid import Grid
from qtool.engine.linear import ExecutedLinear, Rounding, SiteInput
from qtool.engine.network import Network
from qtool.engine.problem import Adapter
from qtool.engine.storage import stored_bytes
from qtool.engine.subject import BlockContent, Subject
from qtool.errors import SchemeError, UsageError
from qtool.model.plan import Plan
from qtool.numerics.token_weights import TokenWeight, parse_token_weight
from qtool.scheme import ModelScheme, TensorScheme
from qtool.steps.demand import demand_of
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import check_scheme, read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from qtool.testing import TinyModel, tiny_model

CPU = torch.device("cpu")
WEIGHTS, STATIC, TOKEN = "int8-sym-channel-sbf16", "int8-tensor-static", "int8-asym-token-sfp32"


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("qwen2", num_hidden_layers=2) as model:  # its projections have biases
        yield model


@pytest.fixture(scope="module")
def sparse() -> Iterator[TinyModel]:
    with tiny_model("qwen3_moe") as model:
        yield model


def scheme_of(workspace: Workspace, outputs: str, **parts: str) -> ModelScheme:
    return read_scheme("", {"weights": WEIGHTS, "outputs": outputs, **parts}, workspace.plugins)


def made(tiny: TinyModel, outputs: str, method: str = "rtn", *, weights: str = WEIGHTS, **options: object) -> Subject:
    scheme = scheme_of(tiny.workspace, outputs, weights=weights)
    request = MitigateRequest(str(tiny.statistics.path), method, scheme, dtype="float32", **options)
    return open_subject(str(mitigate(request, tiny.workspace)[0].path), tiny.workspace).subject


def round_static(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-128, 127) * scale


class Doubled:
    """An operator that is no power of two away from commuting with a rounding."""

    def act(self, x: Tensor) -> Tensor:
        return 3 * x


def test_a_linear_rounds_behind_bias_and_correction_and_in_front_of_what_is_undone() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((6, 4), (6,), (2, 3, 4)))
    adapter = Adapter(torch.randn(2, 4, generator=generator), torch.randn(6, 2, generator=generator))
    linear = ExecutedLinear(weight, bias, SiteInput())
    linear.adapter, linear.undone = adapter, (Doubled(),)
    shown = list[Tensor]()
    linear.output.observer = shown.append
    plain = torch.nn.functional.linear(x, weight, bias) + x @ adapter.down.T @ adapter.up.T
    torch.testing.assert_close(linear(x), 3 * plain)
    scale = torch.tensor(0.05)
    linear.output.rounding = Rounding(
        Grid.of(TensorScheme("int8", strategy="tensor", static=True), Int8()), global_scales=(scale,)
    )
    rounded = round_static(plain, scale)
    assert not torch.equal(rounded, plain)
    torch.testing.assert_close(linear(x), 3 * rounded)
    torch.testing.assert_close(shown[-1], plain.flatten(0, 1))  # before it is rounded
    assert linear.output.recalled() is None  # nothing is held on to


def reference(subject: Subject, tokens: Tensor, *, rounds: bool) -> Tensor:
    """Run blocks with hooks of torch's own in place of what qtool rounds outputs with."""
    plain = replace(subject, scheme=replace(subject.scheme, outputs=None))
    network = Network(plain, device=CPU, dtype=torch.float32)
    network.load_all()
    assert subject.quantized is not None
    for linear in subject.model.graph.linears if rounds else ():
        name = f"layers.{linear.layer}.out.{linear.spec.module}.input_global_scale"
        scale = subject.quantized.tensor(name)
        module = network.linear(linear.layer, linear.spec.module)
        module.register_forward_hook(lambda _, given, y, scale=scale: round_static(y, scale))
    return network.module(input_ids=tokens, use_cache=False).logits.detach()


def test_a_model_is_executed_with_rounded_outputs(tiny: TinyModel) -> None:
    subject = made(tiny, STATIC)
    tokens = torch.randint(97, 123, (1, 12), generator=torch.Generator().manual_seed(1))
    ((_, ours),) = BlockExecutable(subject, device=CPU, dtype=torch.float32, batch=1).forward_windows(tokens)
    torch.testing.assert_close(ours, reference(subject, tokens, rounds=True), rtol=0, atol=1e-6)
    assert (ours - reference(subject, tokens, rounds=False)).abs().max() > 1e-2


def test_scales_are_of_the_range_that_linears_put_out_and_those_that_engines_fuse_share_one(tiny: TinyModel) -> None:
    subject = made(tiny, STATIC)
    assert subject.quantized is not None
    windows = tiny.statistics.tensor("windows").long()
    plain = Subject(subject.model, subject.plugins)
    network, seen = Network(plain, device=CPU, dtype=torch.float32), dict[str, float]()
    network.load_all()
    for linear in subject.model.graph.linears_of(0):

        def largest(_: object, given: object, y: Tensor, name: str = linear.spec.module) -> None:
            seen[name] = max(seen.get(name, 0.0), float(y.abs().max()))

        network.linear(0, linear.spec.module).register_forward_hook(largest)
    network.module(input_ids=windows, use_cache=False)
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    for names in groups:
        modules = [one for one in seen if one.endswith(names)]
        assert len(modules) == len(names)
        amax = max(seen[one] for one in modules)
        for module in modules:
            scale = subject.quantized.tensor(f"layers.0.out.{module}.input_global_scale")
            assert float(scale) == pytest.approx(amax / 127, rel=2**-7)
    assert len({float(subject.quantized.tensor(f"layers.0.out.{one}.input_global_scale")) for one in seen}) == 4


def test_asymmetric_ones_have_a_zero_point_within_the_range(tiny: TinyModel) -> None:
    subject = made(tiny, "int8-asym-tensor-static")
    assert subject.quantized is not None
    names = [name for name in subject.quantized.header.slots if name.endswith(".input_zero_point")]
    assert len(names) == len(subject.linears)
    assert {int(subject.quantized.tensor(name)) for name in names} - {128}


def test_what_is_stored_is_foreseen_and_is_not_of_the_linears(tiny: TinyModel) -> None:
    for outputs, each in ((STATIC, 4), ("int8-asym-tensor-static", 5), ("fp4-g8-se4m3", 4), (TOKEN, 0)):
        subject = made(tiny, outputs)
        assert subject.quantized is not None
        slots = subject.quantized.header.slots
        assert stored_bytes(slots).get("inputs", 0) == each * len(subject.linears)
        demand = demand_of(subject.quantized.manifest, subject.model, subject.plugins, tiny.statistics.manifest)
        assert demand is not None
        assert demand.disk == sum(slot.nbytes for slot in slots.values())


@pytest.mark.parametrize("outputs", [STATIC, TOKEN])
def test_what_propagates_is_rounded_where_that_is_asked_for(tiny: TinyModel, outputs: str) -> None:
    """The second block sees other inputs, so another is solved; the first has no quantized linears in front of it."""
    other, plain = (made(tiny, outputs, "gptq", round_activations=rounds) for rounds in (True, False))
    assert other.quantized is not None
    assert plain.quantized is not None
    differ = [
        name
        for name in plain.quantized.header.slots
        if name.endswith(".codes") and not torch.equal(other.quantized.tensor(name), plain.quantized.tensor(name))
    ]
    assert any(".layers.1." in name for name in differ)
    unrounded = made(tiny, "none", "gptq")
    assert unrounded.quantized is not None
    for name in (name for name in plain.quantized.header.slots if name.endswith(".codes")):
        assert torch.equal(unrounded.quantized.tensor(name), plain.quantized.tensor(name))


def test_a_block_that_is_solved_passes_on_what_its_own_scales_make(tiny: TinyModel) -> None:
    """The range of the second block's first outputs follows from the first block as it is executed in the end."""
    subject = made(tiny, "int3-tensor-sfp32-static", round_activations=True)
    network, seen = Network(subject, device=CPU, dtype=torch.float32), list[float]()
    hidden, arguments = network.embed(tiny.statistics.tensor("windows").long())
    network.load(0)
    hidden = network.run(0, hidden, arguments[0])
    network.load(1, BlockContent(subject.folded(1, torch.float32)))
    for one in "qkv":
        network.sites[1][f"out.self_attn.{one}_proj"].observer = lambda y: seen.append(float(y.abs().max()))
    network.show(1, hidden, arguments[1])
    assert subject.quantized is not None
    scale = subject.quantized.tensor("layers.1.out.self_attn.q_proj.input_global_scale")
    assert float(scale) == pytest.approx(max(seen) / 3, rel=1e-5)


def test_methods_that_see_whole_blocks_see_it(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found, rounded_by = list[Tensor | None](), Network.rounded_by

    def told(network: Network, layer: int, rounding_of: Callable[[str], Rounding | None], cache: Any) -> Any:  # noqa: ANN401
        rounding = rounding_of("out.self_attn.q_proj")
        if rounding is not None and layer == 0:
            found.append(rounding.global_scales[0])
        return rounded_by(network, layer, rounding_of, cache)

    monkeypatch.setattr(Network, "rounded_by", told)
    options: dict[str, Any] = {"settings": {"autoround.steps": "20"}, "weights": "int2-sym-g8"}
    rounded, plain = (made(tiny, outputs, "autoround", **options) for outputs in ("int2-tensor-static", "none"))
    assert rounded.quantized is not None
    assert plain.quantized is not None
    codes = [name for name in plain.quantized.header.slots if name.endswith(".codes")]
    assert any(not torch.equal(rounded.quantized.tensor(one), plain.quantized.tensor(one)) for one in codes)
    (scale,) = found
    assert scale is not None
    assert torch.equal(scale, rounded.quantized.tensor("layers.0.out.self_attn.q_proj.input_global_scale"))


def test_a_block_in_full_precision_rounds_nothing(tiny: TinyModel) -> None:
    subject = made(tiny, "int8-tensor")
    network = Network(subject, device=CPU, dtype=torch.float32)
    state = subject.folded(0, torch.float32)
    network.load(0, BlockContent(state))
    plain = Network(Subject(subject.model, subject.plugins), device=CPU, dtype=torch.float32)
    plain.load(0, BlockContent(state))
    hidden, arguments = network.embed(torch.randint(97, 123, (2, 9), generator=torch.Generator().manual_seed(3)))
    with network.exact(0):
        assert torch.equal(network.run(0, hidden, arguments[0]), plain.run(0, hidden, arguments[0]))
    assert not torch.equal(network.run(0, hidden, arguments[0]), plain.run(0, hidden, arguments[0]))


class TestExperts:
    def test_each_linear_of_an_expert_has_a_scale(self, sparse: TinyModel) -> None:
        subject = made(sparse, STATIC, experts="all")
        tokens = torch.randint(97, 123, (1, 12), generator=torch.Generator().manual_seed(1))
        ((_, ours),) = BlockExecutable(subject, device=CPU, dtype=torch.float32, batch=1).forward_windows(tokens)
        torch.testing.assert_close(ours, reference(subject, tokens, rounds=True), rtol=0, atol=1e-6)
        assert (ours - reference(subject, tokens, rounds=False)).abs().max() > 1e-3

    def test_tokens_of_a_window_share_what_is_fitted_to_them(self, sparse: TinyModel) -> None:
        """Two windows side by side give what each gives alone."""
        subject = made(sparse, "int8-tensor")
        tokens = torch.randint(97, 123, (2, 12), generator=torch.Generator().manual_seed(1))
        executables = (BlockExecutable(subject, device=CPU, dtype=torch.float32, batch=batch) for batch in (2, 1))
        both, alone = (torch.cat([logits for _, logits in one.forward_windows(tokens)]) for one in executables)
        torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)

    def test_of_routed_ones_some_may_be_sent_nothing(self, sparse: TinyModel) -> None:
        with pytest.raises(UsageError, match="an expert may be sent none") as refused:
            made(sparse, STATIC, experts="routed", method="gptq")
        assert refused.value.hint == "--experts all"


class TestRefusals:
    @pytest.mark.parametrize(
        ("outputs", "message", "hint"),
        [
            ("int8-token-o6", "outputs have no outlier columns", "--outputs int8-sym-token-sbf16"),
            ("int8-head", "`token-head` means nothing for outputs", "--outputs int8-sym-token-sbf16"),
            ("fp8-b32", "blocks are of weights", "--outputs fp8-sym-g32-sfp32"),
            ("int8-channel", "`channel` means nothing for outputs", "--outputs int8-sym-token-sbf16"),
        ],
    )
    def test_what_means_nothing_there(self, tiny: TinyModel, outputs: str, message: str, hint: str) -> None:
        with pytest.raises(SchemeError, match=message) as refused:
            scheme_of(tiny.workspace, outputs)
        assert hint in refused.value.hint

    def test_a_group_that_does_not_divide_an_output(self, tiny: TinyModel) -> None:
        with pytest.raises(SchemeError, match="does not divide the output of `model") as refused:
            check_scheme(scheme_of(tiny.workspace, "int8-g17"), Subject(tiny.subject.model, tiny.workspace.plugins))
        assert refused.value.facts[0][0] == "output size"

    @pytest.mark.parametrize("outputs", ["lm_head=int8-token", "int8-token,lm_head=fp8", "model.embed_tokens=fp8"])
    @pytest.mark.parametrize("weights", [WEIGHTS, f"{WEIGHTS},lm_head={WEIGHTS},model.embed_tokens={WEIGHTS}"])
    def test_head_and_embedding(self, tiny: TinyModel, outputs: str, weights: str) -> None:
        subject = Subject(tiny.subject.model, tiny.workspace.plugins)
        with pytest.raises(SchemeError, match="puts out is not rounded") as refused:
            check_scheme(scheme_of(tiny.workspace, outputs, weights=weights), subject)
        end = refused.value.hint.rpartition(",")[2]
        check_scheme(scheme_of(tiny.workspace, f"{outputs},{end}", weights=weights), subject)

    def test_static_ones_want_passes(self, tiny: TinyModel) -> None:
        with pytest.raises(UsageError, match="no statistics hold outputs") as refused:
            made(tiny, STATIC, propagate="none")
        assert refused.value.hint == "--propagate quantized"
        made(tiny, TOKEN, propagate="none")


def test_a_linear_in_16_bits_rounds_no_output(tiny: TinyModel) -> None:
    scheme = scheme_of(tiny.workspace, "int8-token,v_proj=fp8-token", weights=f"{WEIGHTS},down_proj=none")
    name = "model.layers.0.{}".format
    assert str(scheme.of(name("self_attn.q_proj")).outputs) == "int8-sym-token-sbf16"
    assert str(scheme.of(name("self_attn.v_proj")).outputs) == "fp8-sym-token-sfp32"
    assert scheme.of(name("mlp.down_proj")).outputs is None
    assert ModelScheme.from_json(scheme.to_json()) == scheme
    assert str(scheme).endswith("outputs int8-sym-token-sbf16 (v_proj fp8-sym-token-sfp32)")
    assert scheme.parts()["outputs"] == "int8-sym-token-sbf16 (v_proj fp8-sym-token-sfp32)"
    assert "outputs" not in scheme_of(tiny.workspace, "none").parts()
    subject = Subject(tiny.subject.model, tiny.workspace.plugins, Plan(), scheme)
    assert subject.rounding(0, "out.mlp.down_proj", CPU) is None
    assert subject.rounding(0, "out.self_attn.q_proj", CPU) is not None


def test_ranges_weigh_no_tokens() -> None:
    """What errors cost is known of what linears read, and the range of an output is of all tokens alike."""
    gathering = Gathering(8, parse_token_weight("inverse-norm:0.5"))
    assert gathering.at(0, "attn_in").token_weight != TokenWeight()
    assert gathering.at(0, "out.self_attn.q_proj").token_weight == TokenWeight()
