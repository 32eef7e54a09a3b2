"""A cache with calibrated scales: found, evaluated and written as transformers' own attention and torch's FP8 say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.modelopt import ModelOpt
from qtool.builtin.exporters.packed_source import open_packed
from qtool.consumers.checkpoint import read_checkpoint
from qtool.consumers.table import answer
from qtool.engine.cache import CacheRounding
from qtool.engine.execute import BlockExecutable
from qtool.engine.exporter import Exporter
from qtool.engine.network import Network
from qtool.engine.storage import stored_bytes
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, QtoolError, SchemeError, UsageError
from qtool.steps.calibrate import WINDOWS, CalibrateRequest, calibrate
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.foresee import foresee
from qtool.steps.inspect import inspect
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.transform import TransformRequest, transform
from qtool.testing import TinyModel, tiny_model
from qtool.testing.tiny_models import decoded_logits, double_precision, exact_logits
from tests.builtin.packed import written

STATIC, PER_HEAD = "fp8-tensor-static", "fp8-head-static"
ATTENTION, OF = "queries={0},keys={0},values={0}", ("tensor", "head")
LAYERS, HEADS = 2, 2
Seen = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model() as model:
        yield model


def request(tiny: TinyModel, weights: str = "int4-g8", kv: str = STATIC, **options: Any) -> MitigateRequest:  # noqa: ANN401
    scheme = read_scheme("", {"weights": weights, "kv": kv}, tiny.workspace.plugins)
    source = str(options.pop("source", tiny.statistics.path))
    return MitigateRequest(source, options.pop("method", "rtn"), scheme, dtype="float32", **options)


def rounded(tiny: TinyModel, weights: str = "int4-g8", kv: str = STATIC, **options: Any) -> Subject:  # noqa: ANN401
    artifact, _ = mitigate(request(tiny, weights, kv, **options), tiny.workspace)
    return open_subject(str(artifact.path), tiny.workspace).subject


def scales_of(subject: Subject) -> list[list[float]]:
    """The stored scales of keys, and behind them of values, by layer; each may be of several heads."""
    held = subject.quantized
    assert held is not None
    names = [[f"layers.{i}.{part}.input_global_scale" for part in ("keys", "values")] for i in range(LAYERS)]
    return [[one for name in own for one in held.tensor(name).flatten().tolist()] for own in names]


def logits_of(subject: Subject, windows: Tensor) -> Tensor:
    runs = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float32)
    return torch.cat([logits for _, logits in runs.forward_windows(windows)])


class Theirs:
    """The model in transformers, whose attention shows its keys, behind the rotary positions, and its values.

    Args:
        tiny: The model.
        subject: Whose decoded weights stand in it.
    """

    def __init__(self, tiny: TinyModel, subject: Subject) -> None:
        self.subject, self.see = subject, self.leave
        AttentionInterface.register("shown", self.attend)
        AttentionMaskInterface.register("shown", sdpa_mask)
        self.module = AutoModelForCausalLM.from_pretrained(
            tiny.path, dtype=torch.float32, attn_implementation="shown"
        ).eval()

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:  # noqa: ANN401
        key, value = self.see(int(module.layer_idx), key, value)
        return sdpa_attention_forward(module, query, key, value, mask, **given)

    @staticmethod
    def leave(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        del layer
        return key, value

    def quantize(self, layer: int, modules: tuple[str, ...] = ("",)) -> None:
        """Put decoded weights in a layer, of all linears or of those that are named."""
        for linear in self.subject.linears_of(layer):
            if linear.name.endswith(modules):
                weight = self.subject.linear(linear).weight(self.subject.weight_grid(linear))
                self.module.get_submodule(linear.name).weight.data = weight

    @torch.no_grad()
    def run(self, windows: Tensor, see: Seen) -> Tensor:
        self.see = see
        logits: Tensor = self.module(windows, use_cache=False).logits
        return logits

    def largest(self, layer: int, windows: Tensor, kv: str = STATIC) -> list[Tensor]:
        """The largest magnitudes of a layer's keys and values, of each head where those have scales."""
        found: list[Tensor] = []

        def see(own: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            for states in (key, value) if own == layer else ():
                found.extend(states.abs().amax((0, 2, 3)) if "head" in kv else [states.abs().amax()])
            return key, value

        self.run(windows, see)
        return found


def by_hand(scales: list[list[float]]) -> Seen:
    """Round keys and values with torch's FP8, which does not saturate by itself."""

    def see(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        def fp8(x: Tensor, scale: Tensor) -> Tensor:
            return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

        keys, values = torch.tensor(scales[layer]).view(2, -1, 1, 1)
        return fp8(key, keys), fp8(value, values)

    return see


@pytest.mark.parametrize("kv", [STATIC, PER_HEAD])
@pytest.mark.parametrize("sequential", [False, True])
def test_scales_are_those_of_what_attention_caches(tiny: TinyModel, sequential: bool, kv: str) -> None:
    """Blocks before are quantized; where linears see each other quantized, so are the projections of the block."""
    subject = rounded(tiny, kv=kv, true_sequential=sequential)
    theirs, windows = Theirs(tiny, subject), tiny.statistics.tensor(WINDOWS).long()
    for layer, found in enumerate(scales_of(subject)):
        if sequential:
            theirs.quantize(layer, ("k_proj", "v_proj"))
        expected = [float(largest / 448) for largest in theirs.largest(layer, windows, kv)]
        assert len(set(found)) == 2 * (HEADS if kv == PER_HEAD else 1)
        assert found == pytest.approx(expected, rel=1e-5)
        theirs.quantize(layer)


@pytest.mark.parametrize("kv", [STATIC, PER_HEAD])
def test_the_loss_is_that_of_a_cache_rounded_by_hand(tiny: TinyModel, tmp_path: Path, kv: str) -> None:
    """On text beyond the calibrated range, so that some values saturate."""
    subject = rounded(tiny, kv=kv)
    theirs = Theirs(tiny, subject)
    for layer in range(LAYERS):
        theirs.quantize(layer)
    generator = torch.Generator().manual_seed(5)
    windows = torch.randint(0, 256, (20, 32), generator=generator)
    scales, beyond = scales_of(subject), 0
    exact = theirs.run(windows, Theirs.leave)
    for layer in range(LAYERS):
        beyond += sum(
            float(largest) > 448 * scale
            for largest, scale in zip(theirs.largest(layer, windows, kv), scales[layer], strict=True)
        )
    assert beyond > 0
    expected, ours = theirs.run(windows, by_hand(scales)), logits_of(subject, windows)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert (ours - exact).abs().mean() > 100 * (ours - expected).abs().mean()

    text = tmp_path / "own.txt"
    text.write_bytes(bytes(torch.randint(97, 123, (320,), generator=generator).tolist()))
    assert subject.quantized is not None
    asked = EvalRequest(str(subject.quantized.path), perplexity=(str(text),), seq_len=32, dtype="float32")
    (value,) = evaluate(asked, tiny.workspace)[0].manifest.details["values"].values()
    tokens = torch.tensor(subject.model.tokenizer()(text.read_text())["input_ids"]).view(10, 32)
    losses = torch.nn.functional.cross_entropy(
        theirs.run(tokens, by_hand(scales))[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()
    )
    assert value == pytest.approx(float(losses.exp()), rel=1e-6)
    without = torch.nn.functional.cross_entropy(
        theirs.run(tokens, Theirs.leave)[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()
    )
    assert abs(float((without - losses).exp()) - 1) > 1e-5


def test_keys_are_seen_behind_their_rotation(tiny: TinyModel) -> None:
    """A rotation of the heads of keys (R3) spreads their outliers; that of values is folded into the weights."""
    scheme = read_scheme("", {"weights": "int8-g8", "kv": STATIC}, tiny.workspace.plugins)
    asked = TransformRequest(str(tiny.statistics.path), "quarot", scheme=scheme, settings={"r2": "false"})
    plan, _ = transform(asked, tiny.workspace)
    subject = rounded(tiny, "int8-g8", source=plan.path)
    (operator,) = subject.plan.at("layers.0.qk_post").operators
    keys: list[Tensor] = []

    def see(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys.extend([key] if layer == 0 else [])
        return key, value

    plain = rounded(tiny, "int8-g8")
    Theirs(tiny, plain).run(tiny.statistics.tensor(WINDOWS).long(), see)
    expected = float(operator.act(keys[0]).abs().amax() / 448)
    (found, values), (before, same) = scales_of(subject)[0], scales_of(plain)[0]
    assert found == pytest.approx(expected, rel=1e-4)
    assert abs(found / before - 1) > 0.01
    assert values == pytest.approx(same, rel=1e-4)


@pytest.mark.parametrize(
    ("kv", "factors"),
    [("int8-tensor-sfp32-static", (1 / 127, 1 / 127)), (f"{STATIC}-c0.5", (0.5 / 448, 0.5 / 448))],
)
def test_integers_and_a_part_of_the_range(tiny: TinyModel, kv: str, factors: tuple[float, float]) -> None:
    subject = rounded(tiny, kv=kv)
    largest = Theirs(tiny, subject).largest(0, tiny.statistics.tensor(WINDOWS).long())
    expected = [float(one) * factor for one, factor in zip(largest, factors, strict=True)]
    found = scales_of(subject)[0]
    assert found == pytest.approx(expected, rel=1e-5)
    _, cache = subject.kv_path(0, torch.device("cpu"))
    assert cache is not None
    x = torch.linspace(-2, 2, 64).view(1, 2, 4, 8) * float(largest[0])
    keys, _ = cache.by_token(x, x)
    steps = keys / found[0]
    if kv.startswith("int"):
        assert torch.equal(steps.round(), steps.round().clamp(-128, 127))
        torch.testing.assert_close(keys, (x / found[0]).round().clamp(-128, 127) * found[0])
    else:
        assert float(steps.abs().max()) == pytest.approx(448)


def test_one_of_the_two_alone(tiny: TinyModel) -> None:
    subject = rounded(tiny, kv=f"keys=none,values={STATIC}")
    assert subject.quantized is not None
    names = [name for name in subject.quantized.header.slots if name.endswith("input_global_scale")]
    assert names == [f"layers.{layer}.values.input_global_scale" for layer in range(LAYERS)]
    both = scales_of(rounded(tiny))
    assert [float(subject.quantized.tensor(name)) for name in names] == [values for _, values in both]


def test_a_block_whose_linears_stay_has_scales_too(tiny: TinyModel) -> None:
    subject = rounded(tiny, weights="int4-g8,layers.0=none")
    assert not subject.linears_of(0)
    largest = Theirs(tiny, subject).largest(0, tiny.statistics.tensor(WINDOWS).long())
    assert scales_of(subject)[0] == pytest.approx([float(one / 448) for one in largest], rel=1e-5)


def test_a_cache_that_is_propagated_is_rounded_by_what_was_found(tiny: TinyModel) -> None:
    subject = rounded(tiny, round_activations=True)
    theirs, windows = Theirs(tiny, subject), tiny.statistics.tensor(WINDOWS).long()
    first, second = scales_of(subject)
    theirs.quantize(0)
    seen: list[Tensor] = []

    def see(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer == 0:
            return by_hand([first])(layer, key, value)
        seen.extend((key.abs().amax(), value.abs().amax()))
        return key, value

    theirs.run(windows, see)
    assert second == pytest.approx([float(one / 448) for one in seen], rel=1e-5)
    assert second != pytest.approx(scales_of(rounded(tiny))[1], rel=1e-5)


def test_methods_of_a_block_learn_with_what_was_found(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, CacheRounding | None]] = []
    inner = Network.rounded_by

    def rounded_by(self: Network, layer: int, rounding_of: Any, of_cache: CacheRounding | None) -> Any:  # noqa: ANN401
        given.append((layer, of_cache))
        return inner(self, layer, rounding_of, of_cache)

    monkeypatch.setattr(Network, "rounded_by", rounded_by)
    subject = rounded(tiny, method="autoround", settings={"steps": "1"}, seed=3)
    found = scales_of(subject)
    learned = {layer: cache for layer, cache in given if cache is not None}
    assert set(learned) == {0, 1}
    for layer, cache in learned.items():
        assert cache.keys is not None
        assert cache.values is not None
        scales = [*cache.keys.global_scales, *cache.values.global_scales]
        assert [None if scale is None else float(scale) for scale in scales] == found[layer]


def test_tokens_weigh_the_same_for_the_range(tiny: TinyModel) -> None:
    """What errors cost is known of linears, and of keys and values it is not asked."""
    windows = CalibrateRequest(
        str(tiny.path), data="speeches", num_samples=4, seq_len=32, gather=("hessian", "saliency")
    )
    statistics, _ = calibrate(windows, tiny.workspace)
    plain, weighed = (
        rounded(tiny, source=statistics.path, method="gptq", token_weight=rule) for rule in ("uniform", "gradient")
    )
    assert scales_of(plain)[0] == pytest.approx(scales_of(weighed)[0], rel=1e-6)


@pytest.mark.parametrize("kv", [STATIC, PER_HEAD])
def test_token_by_token_is_as_all_at_once(tiny: TinyModel, kv: str) -> None:
    subject = rounded(tiny, kv=kv)
    with double_precision():
        torch.testing.assert_close(decoded_logits(subject), exact_logits(subject), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["gptq", "gptaq", "autoround"])
def test_other_methods_find_the_same_scales_of_the_first_block(tiny: TinyModel, method: str) -> None:
    """What stands in front of the first block is the same, and its own projections are not quantized yet."""
    settings = {"steps": "2"} if method == "autoround" else {}
    subject = rounded(tiny, method=method, settings=settings, true_sequential=False, round_activations=True)
    assert scales_of(subject)[0] == pytest.approx(scales_of(rounded(tiny))[0], rel=1e-5)


@pytest.mark.parametrize(("kv", "scales"), [(STATIC, 2 * LAYERS), (PER_HEAD, 2 * LAYERS * HEADS)])
def test_they_are_counted_and_foreseen(tiny: TinyModel, kv: str, scales: int) -> None:
    asked = request(tiny, kv=kv, seed=1)
    seen = foresee(mitigate, asked, tiny.workspace).to_json()
    made, _ = mitigate(asked, tiny.workspace)
    assert stored_bytes(made.header.slots)["inputs"] == scales * 4
    assert seen["disk_bytes_at_least"] == sum(slot.nbytes for slot in made.header.slots.values())
    assert seen["passes_over_the_data"] == 2
    told = inspect(str(made.path), tiny.workspace)
    bits = {row["cache"]: row["bits_per_value"] for row in told.tables["cache"].to_json()}
    assert bits == {"keys": 8, "values": 8, "both": 8}
    (inputs,) = [row for row in told.tables["storage"].to_json() if row["part"] == "inputs"]
    assert (inputs["linears_bytes"], inputs["model_bytes"]) == (0, scales * 4)


def test_without_passes_or_a_text_there_is_nothing_to_find_them_in(tiny: TinyModel) -> None:
    with pytest.raises(UsageError, match="found in passes") as refused:
        rounded(tiny, propagate="none")
    assert refused.value.hint == "--propagate quantized"
    with pytest.raises(UsageError, match=r"needs statistics(.|\n)*absmax") as refused:
        rounded(tiny, source=tiny.path)
    assert refused.value.hint.startswith("qtool calibrate MODEL")


@pytest.mark.parametrize(
    ("kv", "nearest"),
    [
        ("fp8-static", "fp8-sym-tensor-sfp32-static"),
        ("int8-asym-static", "int8-asym-tensor-sbf16-static"),
        ("int8-asym-head-real-static", "int8-asym-head-sbf16-static"),
        ("fp8-token-head-static", "fp8-sym-tensor-sfp32-static"),
        ("keys=fp8-channel-g16-static,values=none", "fp8-sym-tensor-sfp32-static"),
    ],
)
def test_combinations_that_mean_nothing_name_the_nearest(tiny: TinyModel, kv: str, nearest: str) -> None:
    with pytest.raises(SchemeError) as refused:
        read_scheme("", {"weights": "int4-g8", "kv": kv}, tiny.workspace.plugins)
    assert refused.value.hint == f"nearest that works: {nearest}"


@pytest.mark.parametrize(
    ("part", "scheme", "nearest"),
    [
        ("weights", "int4-head", "--weights int4-sym-channel-sbf16"),
        ("activations", "int8-head", "--activations int8-sym-token-sbf16"),
        ("activations", "fp8-g32-head-static", "fp8-sym-tensor-sfp32-static"),
    ],
)
def test_heads_are_of_caches(tiny: TinyModel, part: str, scheme: str, nearest: str) -> None:
    with pytest.raises(SchemeError) as refused:
        read_scheme("", {"weights": "int4-g8", part: scheme}, tiny.workspace.plugins)
    assert refused.value.hint == f"nearest that works: {nearest}"


CT, INT4, OF_CT = CompressedTensors(), "int4-sym-g8-sbf16", ("self_attn.k_scale", "self_attn.v_scale")
OF_MODELOPT = ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale")
CASES = [
    (CT, INT4, "", STATIC, "fp8-tensor", *OF_CT, (1,)),
    (CT, INT4, "", PER_HEAD, "fp8-attn_head", *OF_CT, (HEADS, 1, 1)),
    (CT, INT4, "", "int8-tensor-sfp32-static", "int8-tensor", *OF_CT, (1,)),
    (CT, INT4, "", "int8-head-sfp32-static", "int8-attn_head", *OF_CT, (HEADS, 1, 1)),
    (ModelOpt(), "fp8-channel", "fp8-token", STATIC, "fp8-tensor", *OF_MODELOPT, ()),
]


@pytest.mark.parametrize(("exporter", "weights", "inputs", "kv", "told", "keys", "values", "shape"), CASES)
def test_checkpoints_hold_and_say_it(
    tiny: TinyModel,
    tmp_path: Path,
    exporter: Exporter,
    weights: str,
    inputs: str,
    kv: str,
    told: str,
    keys: str,
    values: str,
    shape: tuple[int, ...],
) -> None:
    scheme = read_scheme("", {"weights": weights, "activations": inputs, "kv": kv}, tiny.workspace.plugins)
    artifact, _ = mitigate(MitigateRequest(str(tiny.statistics.path), "rtn", scheme), tiny.workspace)
    subject, out = open_subject(str(artifact.path), tiny.workspace).subject, tmp_path / "out"
    exported = written(exporter, subject, out)
    stored = load_file(out / "model.safetensors")
    for layer, found in enumerate(scales_of(subject)):
        own = [stored[f"model.layers.{layer}.{name}"] for name in (keys, values)]
        assert [one.dtype for one in own] == [torch.float32] * 2
        assert [tuple(one.shape) for one in own] == [shape] * 2
        assert torch.cat([one.flatten() for one in own]).tolist() == found
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    said = config["kv_cache_scheme"]
    assert (said["num_bits"], said["type"], said["dynamic"]) == (8, "int" if kv.startswith("int") else "float", False)
    if isinstance(exporter, ModelOpt):
        beside = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
        assert beside["kv_cache_quant_algo"] == "FP8"
    else:
        assert (said["strategy"], said["symmetric"], said["group_size"]) == (told.partition("-")[2], True, None)
    assert exported.details["bytes"]["parts"]["inputs"] == 2 * LAYERS * 4 * (HEADS if "head" in kv else 1)
    (case,) = read_checkpoint(out, lambda _: 8)
    assert (case.cache, f"{case.cache_format}-{case.cache_strategy}") == ("static", told)
    for consumer, device in (("vllm", "sm90"), ("vllm", "cpu")):
        answered = answer([case], consumer, device)
        assert answered.verdict in ("executes-other", "refuses")  # the smallest groups have no kernel
        assert answered.verdict == "refuses" or answered.says.partition("FP8 KV cache with the ")[2].startswith(
            ("scales that are stored", "largest")
        )
    packed = open_packed(out, subject.plugins, cache=tmp_path)
    assert packed.scheme.kv == subject.scheme.kv
    assert scales_of(packed) == scales_of(subject)
    again = {place: tmp_path / place for place in ("packed", "subject")}
    for source, folder in zip((packed, subject), again.values(), strict=True):
        written(CompressedTensors(), source, folder)
    one, two = (load_file(folder / "model.safetensors") for folder in again.values())
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one if key.endswith(("k_scale", "v_scale")))
    assert one["model.layers.0.self_attn.k_scale"].dtype == torch.float32

    name = f"model.layers.1.{values}"
    save_file(stored | {name: stored[name] * 2}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="v_scale"):
        exporter.verify(subject, out)
    save_file({key: one for key, one in stored.items() if key != name}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="v_scale"):
        exporter.verify(subject, out)
    with pytest.raises(SchemeError, match="a stored scale for keys and one for values"):
        open_packed(out, subject.plugins, cache=tmp_path)


@pytest.mark.parametrize(
    "kv",
    [
        *(STATIC, PER_HEAD, ATTENTION.format(STATIC), ATTENTION.format(PER_HEAD), ATTENTION.format("fp8-tensor")),
        *(ATTENTION.format(kv) for kv in ("int8-head-sfp32-static", "int8-asym-head-sfp32", "fp8-token-head")),
        *(f"int{bits}{sign}-{of}-sfp32-static" for bits in range(2, 9) for sign in ("", "-asym") for of in OF),
    ],
)
def test_transformers_rounds_the_cache_as_qtool_does(tiny: TinyModel, tmp_path: Path, kv: str) -> None:
    subject = rounded(tiny, "int8-sym-g8-sbf16", kv)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    windows = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(3))
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for name, own in module.named_parameters():  # what the checkpoint has in 16 bits, as qtool computes with it
        if name.endswith("weight") and name in subject.model.places and "_proj" not in name:
            own.data = subject.model.tensor(name).float()
    with torch.no_grad():
        theirs = torch.cat([module(window[None]).logits for window in windows])
    ours = logits_of(subject, windows)
    plain = logits_of(rounded(tiny, "int8-sym-g8-sbf16", "none"), windows)
    assert (theirs - ours).abs().mean() < 0.02 * (theirs - plain).abs().mean()
    one = str(subject.scheme.keys)
    word, per = one.partition("-")[0].upper(), " per head" if "head" in one else ""
    per, asymmetric = " per group of 8" if "token-head" in one else per, ", asymmetric" if "asym" in one else ""
    said = f"; {'queries and ' if 'queries' in kv else ''}KV cache in {word} with "
    said += (
        f"the scale that is stored{per}{asymmetric}, rounded" if "static" in kv else f"a dynamic scale{per}{asymmetric}"
    )
    assert said in exported.consumers["transformers"]
    if "queries" in kv:
        keys = logits_of(replace(subject, scheme=replace(subject.scheme, kv=subject.scheme.keys)), windows)
        assert (theirs - ours).abs().mean() < 0.1 * (keys - ours).abs().mean()


def test_transformers_leaves_the_cache_beside_asymmetric_weights(tiny: TinyModel, tmp_path: Path) -> None:
    """It decodes those on loading, and leaves out all that is quantized as the model runs."""
    subject = rounded(tiny, "int4-asym-g8-sbf16")
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    windows = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(3))
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert not hasattr(module.model.layers[0].self_attn, "k_scale")
    plain = rounded(tiny, "int4-asym-g8-sbf16", "none")
    with torch.no_grad():
        theirs, ours = module(windows).logits, logits_of(subject, windows)
    assert (theirs - logits_of(plain, windows)).abs().mean() < (theirs - ours).abs().mean()
    assert "; the KV cache is NOT quantized (" in exported.consumers["transformers"]


@pytest.mark.parametrize(
    ("exporter", "kv", "reason", "hint"),
    [
        (ModelOpt(), "fp8-tensor", "no other", f"--kv {STATIC.replace('tensor', 'sym-tensor-sfp32')}"),
        (ModelOpt(), "int8-tensor-static", "no other", "--kv fp8-sym-tensor-sfp32-static"),
        (ModelOpt(), PER_HEAD, "no other", "--kv fp8-sym-tensor-sfp32-static"),
        (CompressedTensors(), f"keys={STATIC},values={PER_HEAD}", "one scheme", f"--kv {PER_HEAD}"),
        (CompressedTensors(), "fp6_e3m2-head-static", "FP4 or integers", f"--kv {PER_HEAD}"),
        (CompressedTensors(), f"keys={STATIC},values=int8-tensor-static", "one scheme", f"--kv {STATIC}"),
        (CompressedTensors(), "nf4-tensor-static", "FP4 or integers", f"--kv {STATIC}"),
        (
            CompressedTensors(),
            ATTENTION.format("int8-asym-head-sfp32-static"),
            "float16 where zero points",
            f"--kv {ATTENTION.format('int8-sym-head-sfp32-static')}",
        ),
        (CompressedTensors(), "queries=none,keys=fp8-tensor,values=none", "one scheme", "--kv fp8-tensor"),
        (
            CompressedTensors(),
            f"queries=int8-sfp32-tensor-half,keys={STATIC},values={STATIC}",
            "queries may share",
            f"--kv {ATTENTION.format(STATIC)}",
        ),
        (CompressedTensors(), "int8-tensor-static-narrow", "all codes", "--kv int8-sym-tensor-sbf16-full-static"),
    ],
)
def test_exporters_refuse_other_caches_and_name_the_nearest(
    tiny: TinyModel, exporter: Exporter, kv: str, reason: str, hint: str
) -> None:
    scheme = read_scheme("", {"weights": "fp8-channel", "activations": "fp8-token", "kv": kv}, tiny.workspace.plugins)
    artifact, _ = mitigate(MitigateRequest(str(tiny.statistics.path), "rtn", scheme), tiny.workspace)
    with pytest.raises(SchemeError, match=reason) as refused:
        exporter.check(open_subject(str(artifact.path), tiny.workspace).subject)
    assert hint in refused.value.hint


@pytest.mark.parametrize("exporter", [ModelOpt(), CompressedTensors()])
def test_what_is_cached_as_a_latent_has_no_scales_of_keys(exporter: Exporter) -> None:
    with tiny_model("deepseek_v2") as latent:
        scheme = {"weights": "fp8-channel", "activations": "fp8-token", "kv": STATIC}
        asked = read_scheme("", scheme, latent.workspace.plugins)
        artifact, _ = mitigate(MitigateRequest(str(latent.statistics.path), "rtn", asked), latent.workspace)
        with pytest.raises(SchemeError, match="latent"):
            exporter.check(open_subject(str(artifact.path), latent.workspace).subject)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"strategy": None}, ""),
        ({"strategy": "attn_head"}, "another number of scales"),
        ({"strategy": "channel"}, "scales that qtool does not have there"),
        ({"symmetric": False}, "has no zero point"),
        ({"symmetric": False, "type": "int"}, "calibrated zero points, and the checkpoint lacks one"),
        ({"dynamic": True}, "does not say that it is quantized with those"),
    ],
)
def test_what_configs_say_of_a_cache_is_held_against_the_files(
    tiny: TinyModel, tmp_path: Path, said: dict[str, Any], reason: str
) -> None:
    subject = rounded(tiny, INT4)
    CT.write(subject, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] |= said
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not reason:
        assert open_packed(tmp_path, subject.plugins, cache=tmp_path).scheme.kv == subject.scheme.kv
        return
    with pytest.raises(QtoolError, match=reason):
        open_packed(tmp_path, subject.plugins, cache=tmp_path)


def test_zero_points_that_are_0_are_left_out(tiny: TinyModel, tmp_path: Path) -> None:
    """Older libraries write them beside the scales of a symmetric cache."""
    subject = rounded(tiny, INT4)
    CT.write(subject, tmp_path)
    file = tmp_path / "model.safetensors"
    name, zero = "model.layers.1.self_attn.v_zero_point", torch.zeros(1, dtype=torch.float8_e4m3fn)
    save_file(load_file(file) | {name: zero}, file, {"format": "pt"})
    source = open_packed(tmp_path, subject.plugins, cache=tmp_path)
    written(CT, source, tmp_path / "again")
    assert name not in load_file(tmp_path / "again" / "model.safetensors")
    save_file(load_file(file) | {name: torch.ones(1, dtype=torch.int8)}, file, {"format": "pt"})
    with pytest.raises(ArtifactError, match="a KV cache with zero points") as refused:
        open_packed(tmp_path, subject.plugins, cache=tmp_path)
    assert ("first", name) in refused.value.facts


def test_stored_scales_that_no_config_speaks_of_are_not_dropped(tiny: TinyModel, tmp_path: Path) -> None:
    subject = rounded(tiny)
    CompressedTensors().write(subject, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="has scales of a KV cache and does not say that it is quantized"):
        open_packed(tmp_path, subject.plugins, cache=tmp_path)
