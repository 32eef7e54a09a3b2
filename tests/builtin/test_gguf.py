"""GGUF files hold the codes and scales that were quantized, byte for byte, and llama.cpp computes with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from qtool.artifacts.manifest import Manifest, Step
from qtool.artifacts.store import ArtifactWriter
from qtool.builtin.exporters.gguf import FILE, GGUF, GGUFHalf
from qtool.builtin.exporters.gguf_blocks import one_of_each_scale, stored_blocks
from qtool.builtin.exporters.gguf_types import choose_type
from qtool.builtin.exporters.gguf_vocabulary import add_vocabulary, split_name
from qtool.engine.packed import PackedLinear
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, ModelError, QtoolError, SchemeError, UsageError
from qtool.model.plan import Plan, Segment, SitePlan
from qtool.numerics.operators import Hadamard
from qtool.plugins import Plugins
from qtool.scheme import GroupParameters, ModelScheme, TensorScheme, parse_tensor_scheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from qtool.testing.tiny_models import save_tiny_model
from tests.builtin.layouts.conftest import changed
from tests.builtin.packed import packed, written

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 260, "head_dim": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama 3": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}},
    "llama linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": 16},
    "qwen3": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {
        **{"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 32},
        **{"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    },
    "gemma3_text": {
        **{"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 32, "num_hidden_layers": 6},
    },
}
HALF = "int8-sym-g32-sfp16"
Q4_0 = "int4-sym-g32-sfp16-signed_full"
Q4_1 = "int4-asym-g32-offset-sfp16"
Make = Callable[..., Subject]


def words(*, steps: Any = None, merges: Any = (("a", "b"), ("ab", "c"))) -> PreTrainedTokenizerFast:  # noqa: ANN401
    """A byte-level tokenizer with two merges."""
    texts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=list(merges)))
    tokenizer.pre_tokenizer = steps or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover()


@pytest.fixture(scope="module")
def workspace(plugins: Plugins, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Workspace:
    return Workspace(plugins, tmp_path_factory.mktemp("home"), cache)


@pytest.fixture(scope="module")
def make(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make a subject quantized by rounding to nearest; the same one is made once."""

    @lru_cache
    def folder(name: str, changes: tuple[tuple[str, Any], ...]) -> Path:
        config = {"tie_word_embeddings": False, **SIZES, **MODELS[name], **dict(changes)}
        path = tmp_path_factory.mktemp(name.replace(" ", "-"))
        save_tiny_model(path, AutoConfig.for_model(name.partition(" ")[0], **config))
        words().save_pretrained(path)
        return path

    @lru_cache
    def made(
        weights: str, model: str = "llama", kv: str = "", method: str = "rtn", changes: tuple[tuple[str, Any], ...] = ()
    ) -> Subject:
        parsed = (parse_tensor_scheme(text, workspace.plugins.format) if text else None for text in (weights, "", kv))
        request = MitigateRequest(str(folder(model, changes)), method, ModelScheme(*parsed), {}, dtype="float32")
        return open_subject(str(mitigate(request, workspace)[0].path), workspace).subject

    return made


def read(directory: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(directory / FILE).tensors}


def linear_of(
    codes: list[list[int]], scale: list[list[float]], *, bits: int = 4, **others: list[list[float]] | float
) -> PackedLinear:
    parameters = GroupParameters(torch.tensor(scale), **{name: torch.tensor(one) for name, one in others.items()})
    return packed(torch.tensor(codes, dtype=torch.uint8), parameters, bits)


ORDER = [(7 * i + 3) % 16 for i in range(32)]
"""Every nibble twice, in no order that a swap of halves or neighbours keeps."""


def test_the_bytes_of_one_block_of_each_type() -> None:
    nibbles = bytes(ORDER[i] | ORDER[i + 16] << 4 for i in range(16))
    q4_0 = stored_blocks(linear_of([ORDER], [[-1.5]]), "Q4_0")
    assert bytes(q4_0[0].tolist()) == np.float16(-1.5).tobytes() + nibbles
    for others in ({"zero_point": [[5.0]]}, {"offset": [[-1.25]]}):
        q4_1 = stored_blocks(linear_of([ORDER], [[0.25]], **others), "Q4_1")
        assert bytes(q4_1[0].tolist()) == np.float16(0.25).tobytes() + np.float16(-1.25).tobytes() + nibbles
    wide = [(37 * i + 5) % 256 for i in range(32)]
    q8_0 = stored_blocks(linear_of([wide], [[0.75]], bits=8), "Q8_0")
    assert (
        bytes(q8_0[0].tolist())
        == np.float16(0.75).tobytes() + np.array(wide, np.int16).__sub__(128).astype(np.int8).tobytes()
    )
    mxfp4 = stored_blocks(linear_of([ORDER], [[2.0**-5]]), "MXFP4")
    assert bytes(mxfp4[0].tolist()) == bytes([122]) + nibbles
    codes = [(5 * i + i // 16) % 16 for i in range(64)]
    nvfp4 = stored_blocks(linear_of([codes], [[0.5, 1.0, 1.5, 448.0]], global_scale=3.0), "NVFP4")
    nibbles = [codes[16 * s + i] | codes[16 * s + 8 + i] << 4 for s in range(4) for i in range(8)]
    assert bytes(nvfp4[0].tolist()) == bytes([0x30, 0x38, 0x3C, 0x7E, *nibbles])


def test_one_block_of_each_scale_is_named_and_the_first_may_be_it() -> None:
    q4_0 = stored_blocks(linear_of([ORDER] * 4, [[0.5], [0.25], [-0.25], [0.25]]), "Q4_0")
    assert sorted(one_of_each_scale(q4_0, "Q4_0").tolist()) in ([0, 1, 2], [0, 2, 3])
    scales = [[1.0, 0.5, 0.5, 0.5], [0.5, 0.5, 2.0, 0.5], [0.5] * 4]
    nvfp4 = stored_blocks(linear_of([ORDER + ORDER] * 3, scales, global_scale=1.0), "NVFP4")
    found = one_of_each_scale(nvfp4, "NVFP4").tolist()
    assert len(found) == 3
    assert {0, 1} <= set(found)


@pytest.mark.parametrize("weights", [Q4_0, Q4_1, "int4-asym-g32-sfp16", HALF, "mxfp4", "nvfp4"])
def test_every_code_and_scale_is_decoded_by_the_official_package_as_by_qtool(plugins: Plugins, weights: str) -> None:
    scheme = parse_tensor_scheme(weights, plugins.format)
    form, kind = plugins.format(scheme.format), choose_type(scheme)
    levels, size = 2**form.bits, scheme.group_size or 0
    scales = {
        "mxfp4": 2.0 ** torch.arange(-127, 125).float(),
        "nvfp4": torch.arange(1, 0x7F).to(torch.uint8).view(torch.float8_e4m3fn).float(),
    }.get(weights, torch.tensor([-3.5, -(2.0**-24), 2.0**-20, 0.123, 1.0, 65504 / 256]).half().float())
    columns = max(levels, 64)
    codes = torch.arange(levels).repeat(columns // levels).to(torch.uint8).repeat(len(scales), 1)
    codes = torch.stack([row.roll(3 * i) for i, row in enumerate(codes)])
    scale = scales.reshape(-1, 1).expand(-1, columns // size).contiguous()
    zeros = (torch.arange(len(scales)) * 2.0).reshape(-1, 1).expand_as(scale)
    parameters = GroupParameters(scale)
    if scheme.offset:
        offsets = torch.tensor([0.0, 2.0**-24, -0.0123, 65504.0, -1.0, 1e-3]).half().float()
        parameters = GroupParameters(scale, offset=offsets.reshape(-1, 1).expand_as(scale))
    elif not scheme.symmetric:
        scale = torch.ones_like(scale) * torch.tensor([-3.5, 2.0**-20, 1, 5, 100, 0.5]).reshape(-1, 1)
        parameters = GroupParameters(scale, zeros)
    found = packed(codes, parameters, form.bits)
    blocks = stored_blocks(found, kind).numpy()
    ours = form.decode(codes.reshape(len(codes), -1, size), found.parameters).reshape(codes.shape)
    theirs = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(theirs.copy()), ours)


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        *((Q4_0, "Q4_0"), ("int4-sym-g64-sfp16", "Q4_0"), ("int4-sym-channel", "Q4_0"), ("int8-sym-tensor", "Q8_0")),
        *((Q4_1, "Q4_1"), ("int4-asym-channel-offset-sfp16", "Q4_1"), ("int4-asym-g64-offset-sbf16", "Q4_1")),
        *((HALF, "Q8_0"), ("mxfp4", "MXFP4"), ("fp4-g64-se8m0", "MXFP4"), ("nvfp4", "NVFP4")),
        ("fp4-g16-se4m3", "NVFP4"),
    ],
)
def test_the_file_holds_what_was_quantized_with_rows_in_the_order_of_llama_cpp(
    make: Make, tmp_path: Path, weights: str, kind: str
) -> None:
    subject = make(weights)
    exported = written(GGUF(), subject, tmp_path / "out")
    tensors = read(tmp_path / "out")
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"mlp.down_proj": "ffn_down"}
    for linear in subject.model.graph.linears:
        name = names.get(linear.spec.module)
        if name is None:
            continue
        stored = tensors[f"blk.{linear.layer}.{name}.weight"]
        assert stored.tensor_type.name == kind
        values = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
        scale = tensors.get(f"blk.{linear.layer}.{name}.scale")
        values = values * float(scale.data[0]) if scale is not None else values
        ours = subject.linear(linear).weight(subject.weight_grid(linear))
        if name in ("attn_q", "attn_k"):
            ours = torch.stack([ours[32 * head + half * 16 + i] for head, i, half in rows(len(ours) // 32)])
        torch.testing.assert_close(values, ours, rtol=3e-7 if kind == "NVFP4" else 0, atol=0)
    linears = sum(
        t.n_bytes for n, t in tensors.items() if ("_proj" in n or "attn_" in n or "ffn_" in n) and "norm" not in n
    )
    assert exported.details["bytes"]["linears"] == linears
    assert exported.details["bytes"]["model"] == sum(tensor.n_bytes for tensor in tensors.values())
    assert f"as {kind}; activations are NOT quantized" in exported.consumers["llama.cpp"]
    file_type = gguf.GGUFReader(tmp_path / "out" / FILE).fields["general.file_type"].contents()
    assert gguf.LlamaFileType(file_type).name in (f"MOSTLY_{kind}", f"MOSTLY_{kind}_MOE")


def rows(heads: int) -> list[tuple[int, int, int]]:
    return [(head, i, half) for head in range(heads) for i in range(16) for half in range(2)]


def test_zero_points_are_written_only_where_float16_has_them_as_offsets(make: Make, tmp_path: Path) -> None:
    subject = make("int4-asym-g32-sfp16")
    with pytest.raises(SchemeError, match="more digits") as refused:
        GGUF().check(subject)
    assert refused.value.hint == f"nearest that fits: --weights {Q4_1}"
    GGUF().check(make(Q4_1))
    assert subject.quantized is not None
    tensors = {name: subject.quantized.tensor(name) for name in subject.quantized.names()}
    for name, tensor in tensors.items():
        if name.endswith(".scale"):
            tensors[name] = (2.0 ** tensor.float().log2().round()).half()
    subject = with_tensors(subject, tensors, tmp_path)
    written(GGUF(), subject, tmp_path / "out")
    (stored,) = (one for name, one in read(tmp_path / "out").items() if name == "blk.1.ffn_up.weight")
    assert stored.tensor_type.name == "Q4_1"
    linear = subject.model.graph.linear("model.layers.1.mlp.up_proj")
    ours = subject.linear(linear).weight(subject.weight_grid(linear))
    assert np.array_equal(gguf.dequantize(stored.data, stored.tensor_type), ours.numpy())


def with_tensors(subject: Subject, tensors: dict[str, Tensor], folder: Path) -> Subject:
    manifest = Manifest("quantized", Step("test", "", 1, "test"), {}, subject.model.id, "x", subject.scheme.to_json())
    writer = ArtifactWriter(folder / "changed.safetensors", manifest)
    writer.begin()
    writer.add("all", tensors)
    return replace(subject, quantized=writer.finish(manifest))


def test_inputs_of_nvfp4_that_were_calibrated_have_their_scale_beside_the_weight(make: Make, tmp_path: Path) -> None:
    subject = make("nvfp4")
    assert subject.quantized is not None
    tensors = {name: subject.quantized.tensor(name) for name in subject.quantized.names()}
    tensors["layers.1.o_in.input_global_scale"] = torch.tensor(0.0125)
    subject = with_tensors(subject, tensors, tmp_path)
    written(GGUF(), subject, tmp_path / "out")
    stored = read(tmp_path / "out")
    assert stored["blk.1.attn_output.input_scale"].data.tolist() == [np.float32(0.0125)]
    assert (
        stored["blk.1.attn_output.scale"].data.tolist()
        == tensors["model.layers.1.self_attn.o_proj.global_scale"].reshape(-1).tolist()
    )
    assert [name for name in stored if name.endswith("input_scale")] == ["blk.1.attn_output.input_scale"]
    static = TensorScheme("fp4", strategy="tensor", static=True)  # whose scale is no multiplier of scales
    written(GGUF(), replace(subject, scheme=replace(subject.scheme, activations=static)), tmp_path / "static")
    assert not [name for name in read(tmp_path / "static") if name.endswith("input_scale")]


@pytest.mark.parametrize(
    ("weights", "message", "hint"),
    [
        ("int3-sym-g32", "no type for `int3`", "--weights int4-sym-g32-sfp16"),
        ("int6-sym-g32", "no type for `int6`", "--weights int8-sym-g32-sfp16"),
        ("fp8-channel", "no type for `fp8`", "--weights int8-sym-channel-sfp16"),
        ("int4-sym-g16-sfp16", "a scale for 32 values", "--weights int4-sym-g32-sfp16"),
        ("int8-asym-g32-sfp16", "Q8_0 has no zero points", "--weights int8-sym-g32-sfp16"),
        ("fp4-g16-sbf16", "MXFP4 or NVFP4 only", "--weights nvfp4"),
        ("int4-sym-g32-sfp32", "more digits", "--weights int4-sym-g32-sfp16"),
        ("int4-asym-g32-offset-sfp32", "more digits", f"--weights {Q4_1}"),
        ("int4-asym-g16-offset-sfp16", "a scale for 32 values", f"--weights {Q4_1}"),
        ("int4-asym-g32-real", "in place of a real zero point", f"--weights {Q4_1}"),
        ("int4-asym-g16-real", "in place of a real zero point", f"--weights {Q4_1}"),
        ("int4-asym-g32-scales4g16", "no type's scales are codes", f"--weights {Q4_1}"),
        ("int3-asym-g32", "no type for `int3`", f"--weights {Q4_1}"),
        ("int8-asym-g32-offset-sfp16", "Q8_0 has no zero points", "--weights int8-sym-g32-sfp16"),
        ("int8-asym-g16-sfp16", "Q8_0 has no zero points", "--weights int8-sym-g32-sfp16"),
    ],
)
def test_a_scheme_that_no_type_holds_is_met_with_the_nearest(
    make: Make, plugins: Plugins, weights: str, message: str, hint: str
) -> None:
    with pytest.raises(SchemeError, match=message) as refused:
        GGUF().check(make(weights))
    assert refused.value.hint.partition(";")[0] == f"nearest that fits: {hint}"
    choose_type(parse_tensor_scheme(hint.split()[-1], plugins.format))


def test_what_llama_cpp_does_not_run_is_refused(make: Make) -> None:
    plain = make(Q4_0)
    sites = {"layers.0.up_down": SitePlan((Hadamard(128),), 0)}
    apart = {"layers.0.up_down": SitePlan((), 0, (Segment(32, "int8"),))}
    cases: list[tuple[Subject, str]] = [
        (replace(plain, plan=Plan(sites)), "operators in the forward pass"),
        (replace(plain, plan=Plan(apart)), "sets channels apart"),
        (make(Q4_0, kv="fp8-tensor"), "how its KV cache"),
        (make("fp8-channel", kv="fp8-tensor"), "how its KV cache"),
        (make("nvfp4", "qwen2"), "NVFP4 of `qwen2`"),
        (make("nvfp4", "llama with biases"), "NVFP4 beside biases"),
        (make(Q4_0, "qwen2", changes=(("head_dim", 32),)), "not as wide as the residual"),
        (make(Q4_0, "qwen3", changes=(("attention_bias", True),)), "reads no bias at"),
        (make(Q4_0, "mistral", changes=(("sliding_window", 8),)), "sliding windows"),
        (make(Q4_0, "gemma2", changes=(("query_pre_attn_scalar", 16),)), "queries scaled by 16"),
        (make(Q4_0, "gemma2", changes=(("attn_logit_softcapping", None),)), "without a cap"),
        (make(Q4_0, "gemma2", changes=(("final_logit_softcapping", None),)), "without a cap"),
        (make(Q4_0, "gemma", changes=(("tie_word_embeddings", False),)), "a head beside the embedding"),
        (make(Q4_0, changes=(("hidden_act", "gelu"),)), "the activation `gelu`"),
    ]
    for subject, message in cases:
        with pytest.raises(UsageError, match=message):
            GGUF().check(subject)


def test_corrections_are_refused_beside_codes_and_merged_in_float16(make: Make, tmp_path: Path) -> None:
    subject = make(Q4_0)
    assert subject.quantized is not None
    name = "model.layers.0.mlp.up_proj"
    tensors = {one: subject.quantized.tensor(one) for one in subject.quantized.names()}
    up, down = torch.randn(128, 2), torch.randn(2, 64)
    subject = with_tensors(subject, tensors | {f"{name}.adapter.up": up, f"{name}.adapter.down": down}, tmp_path)
    with pytest.raises(UsageError, match="no low-rank corrections") as refused:
        GGUF().check(subject)
    assert "gguf-f16" in refused.value.hint
    written(GGUFHalf(), subject, tmp_path / "out")
    linear = subject.model.graph.linear(name)
    sum_ = subject.linear(linear).weight(subject.weight_grid(linear)).double() + up.double() @ down.double()
    stored = read(tmp_path / "out")["blk.0.ffn_up.weight"]
    assert np.array_equal(stored.data, sum_.float().half().numpy())


BLOCK = {Q4_0: 18, Q4_1: 20, HALF: 34, "mxfp4": 17, "nvfp4": 36}
ATTENTION = "blk.1.attn_q.weight"


def altered(directory: Path, name: str, change: Callable[[bytearray], object]) -> None:
    """Change the bytes of a tensor in a file."""
    tensor, content = read(directory)[name], bytearray((directory / FILE).read_bytes())
    own = content[tensor.data_offset : tensor.data_offset + tensor.n_bytes]
    change(own)
    content[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = own
    (directory / FILE).write_bytes(content)


@pytest.mark.parametrize("weights", [*BLOCK, "int4-sym-channel"])
def test_a_bit_of_a_code_a_scale_or_an_offset_is_noticed_anywhere(make: Make, tmp_path: Path, weights: str) -> None:
    subject, block = make(weights), BLOCK.get(weights, 18)
    written(GGUF(), subject, tmp_path / "out")
    blocks = read(tmp_path / "out")[ATTENTION].n_bytes // block
    places = {(0, 0), (0, 1), (0, block - 1), (blocks - 1, 0), *((5 * i % blocks, i) for i in range(block))}
    for number, (whole, place) in enumerate(sorted(places)):

        def flip(own: bytearray, at: int = whole * block + place, bit: int = 1 << number % 8) -> None:
            own[at] ^= bit

        altered(tmp_path / "out", ATTENTION, flip)
        with pytest.raises(
            ArtifactError, match=rf"`{re.escape(ATTENTION)}` that was written is not what was quantized"
        ):
            GGUF().verify(subject, tmp_path / "out")
        altered(tmp_path / "out", ATTENTION, flip)
    GGUF().verify(subject, tmp_path / "out")


@pytest.mark.parametrize("weights", [Q4_0, "nvfp4"])
def test_rows_blocks_and_tensors_in_another_order_are_noticed(make: Make, tmp_path: Path, weights: str) -> None:
    def swapped(size: int) -> Callable[[bytearray], None]:
        def swap(own: bytearray) -> None:
            own[: 2 * size] = own[size : 2 * size] + own[:size]

        return swap

    subject = make(weights)
    written(GGUF(), subject, tmp_path / "out")
    row = read(tmp_path / "out")[ATTENTION].data.shape[-1]
    other = "blk.0.attn_q.weight"
    for name, size in ((ATTENTION, row), (other, row), (ATTENTION, 3 * row), ("blk.1.ffn_down.weight", BLOCK[weights])):
        altered(tmp_path / "out", name, swapped(size))
        with pytest.raises(ArtifactError, match=f"`{re.escape(name)}` that was written"):
            GGUF().verify(subject, tmp_path / "out")
        altered(tmp_path / "out", name, swapped(size))
    found = read(tmp_path / "out")
    (first, second) = (bytes(found[name].data.tobytes()) for name in (other, ATTENTION))
    altered(tmp_path / "out", other, lambda own: own.__setitem__(slice(None), second))
    altered(tmp_path / "out", ATTENTION, lambda own: own.__setitem__(slice(None), first))
    with pytest.raises(ArtifactError, match=f"`{re.escape(other)}` that was written"):
        GGUF().verify(subject, tmp_path / "out")


def test_a_norm_that_reads_back_otherwise_is_an_error(make: Make, tmp_path: Path) -> None:
    subject = make(Q4_0)
    written(GGUF(), subject, tmp_path / "out")
    altered(tmp_path / "out", "blk.1.attn_norm.weight", lambda own: own.__setitem__(2, own[2] ^ 0x10))
    with pytest.raises(ArtifactError, match=r"`blk\.1\.attn_norm\.weight` that was written is not what was quantized"):
        GGUF().verify(subject, tmp_path / "out")


@pytest.mark.parametrize("weights", BLOCK)
def test_the_official_package_decodes_a_block_of_every_scale(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: str
) -> None:
    subject, decode, wide = make(weights), gguf.dequantize, {"mxfp4": 1, "nvfp4": 1}.get(weights, 2)
    written(GGUF(), subject, tmp_path / "out")
    blocks = read(tmp_path / "out")[ATTENTION].data.reshape(-1, BLOCK[weights])
    scales = {bytes(one) for one in blocks[:, : {"nvfp4": 4}.get(weights, wide)].reshape(-1, wide)}
    seen: set[bytes] = set()

    def watched(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        if kind.name != "F32" and data.dtype == np.uint8 and data.shape[-1] % BLOCK[weights] == 0:
            some = data.reshape(-1, BLOCK[weights])[:, : {"nvfp4": 4}.get(weights, wide)].reshape(-1, wide)
            seen.update(bytes(one) for one in some)
        return decode(data, kind)

    def wrong(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        values = decode(data, kind).copy()
        if data.dtype == np.uint8 and kind.name != "BF16":
            values.reshape(-1)[-1] += 1
        return values

    monkeypatch.setattr(gguf, "dequantize", watched)
    GGUF().verify(subject, tmp_path / "out")
    assert scales <= seen
    monkeypatch.setattr(gguf, "dequantize", wrong)
    with pytest.raises(ArtifactError, match="that was written is not what was quantized"):
        GGUF().verify(subject, tmp_path / "out")


@pytest.mark.parametrize("to", ["gguf", "gguf-f16"])
def test_a_full_disk_leaves_nothing_behind(
    make: Make, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, to: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    subject = make(Q4_0)
    assert subject.quantized is not None
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(QtoolError, match="no space left"):
        pack(PackRequest(str(subject.quantized.path), to, tmp_path / "out"), workspace)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


@pytest.mark.parametrize("to", ["gguf", "gguf-f16"])
def test_a_disk_that_fills_up_while_tensors_are_gathered(
    make: Make, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, to: str
) -> None:
    real, subject = Path.open, make(Q4_0)

    def opened(path: Path, *how: Any, **options: Any) -> Any:  # noqa: ANN401 - as Path.open has it
        return (
            real(Path("/dev/full"), "r+b", buffering=0)
            if path.name.endswith(".tensors")
            else real(path, *how, **options)
        )

    assert subject.quantized is not None
    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(QtoolError, match="no space left"):
        pack(PackRequest(str(subject.quantized.path), to, tmp_path / "out"), workspace)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


def test_a_packed_file_says_what_it_is(make: Make, workspace: Workspace, tmp_path: Path) -> None:
    subject = make(Q4_0)
    assert subject.quantized is not None
    request = PackRequest(str(subject.quantized.path), "gguf", tmp_path / "out")
    checkpoint, _ = pack(request, workspace)
    assert sorted(path.name for path in checkpoint.path.iterdir()) == ["README.md", FILE, "qtool.json"]
    assert checkpoint.manifest.details["bits"]["linears"] == 4.5
    fields = gguf.GGUFReader(checkpoint.path / FILE).fields
    assert fields["general.architecture"].contents() == "llama"
    assert fields["llama.attention.head_count_kv"].contents() == 2
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    assert pack(request, workspace)[1]


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(regex: str) -> Any:  # noqa: ANN401 - a pre-tokenizer of the library
    from tokenizers import Regex

    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), BYTES])


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
        (split(rf"{LETTERS}\p{{N}}{OTHERS}"), "qwen2"),
        (split(rf"{LETTERS}\p{{N}}{{1,2}}{OTHERS}"), ""),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), ""),
        (pre_tokenizers.Whitespace(), ""),
    ],
)
def test_the_split_into_words_is_named_or_refused(
    make: Make,
    tmp_path: Path,
    steps: Any,  # noqa: ANN401 - a pre-tokenizer of the library
    expected: str,
) -> None:
    model = replace(make(Q4_0).model, path=tmp_path)
    words(steps=steps).save_pretrained(tmp_path)
    described = json.loads(model.tokenizer().backend_tokenizer.to_str())
    if expected:
        assert split_name(model, described) == expected
        return
    with pytest.raises(ModelError, match="cannot read text"):
        split_name(model, described)


def test_norms_and_biases_are_float32_as_llama_cpp_reads_them(make: Make, tmp_path: Path) -> None:
    subject = make(Q4_0, "gemma")
    written(GGUF(), subject, tmp_path / "gemma")
    stored = read(tmp_path / "gemma")
    ours = subject.model.tensor("model.layers.1.post_attention_layernorm.weight")
    assert np.array_equal(stored["blk.1.ffn_norm.weight"].data, (1 + ours).float().numpy())
    assert "output.weight" not in stored
    subject = make(HALF, "llama with biases")
    written(GGUF(), subject, tmp_path / "llama")
    stored = read(tmp_path / "llama")
    bias = subject.model.tensor("model.layers.0.self_attn.k_proj.bias").float()
    ordered = torch.stack([bias[32 * head + half * 16 + i] for head, i, half in rows(2)])
    assert np.array_equal(stored["blk.0.attn_k.bias"].data, ordered.numpy())
    ours = subject.model.tensor("model.layers.0.mlp.up_proj.bias").float()
    assert np.array_equal(stored["blk.0.ffn_up.bias"].data, ours.numpy())
    assert np.array_equal(stored["output.weight"].data, subject.model.tensor("lm_head.weight").half().numpy())


def test_a_vocabulary_of_pieces_has_scores_in_the_order_of_its_merges(make: Make, tmp_path: Path) -> None:
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    vocabulary = {text: i for i, text in enumerate(texts)}
    merges = [("a", "b"), ("▁", "ab")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    model = make(Q4_0, changes=(("vocab_size", 264),)).model
    writer = gguf.GGUFWriter(None, "llama")
    add_vocabulary(writer, replace(model, path=tmp_path))
    keys = {name.removeprefix("tokenizer.ggml."): one.value for name, one in writer.kv_data[0].items()}
    assert keys["model"] == "llama"
    assert keys["tokens"] == [*texts, "[PAD262]", "[PAD263]"]
    assert keys["add_space_prefix"]
    scores = dict(zip(keys["tokens"], keys["scores"], strict=True))
    assert scores["ab"] > scores["▁ab"] > scores["a"]
    kinds = dict(zip(keys["tokens"], keys["token_type"], strict=True))
    assert [kinds[text] for text in ("<unk>", "<0x41>", "ab", "[PAD262]")] == [2, 6, 1, 5]


@pytest.mark.parametrize(("model", "offset"), [("llama", 0.0), ("gemma2", 1.0)])
def test_norms_that_a_mitigator_changed_are_those_in_the_file(
    make: Make, tmp_path: Path, model: str, offset: float
) -> None:
    """llama.cpp multiplies by what it reads, so what Gemma adds is in it."""
    second = "pre_feedforward_layernorm" if model == "gemma2" else "post_attention_layernorm"
    names = {"output_norm.weight": "model.norm.weight"}
    for layer in range(2):
        names[f"blk.{layer}.attn_norm.weight"] = f"model.layers.{layer}.input_layernorm.weight"
        names[f"blk.{layer}.ffn_norm.weight"] = f"model.layers.{layer}.{second}.weight"
    generator = torch.Generator().manual_seed(9)
    norms = {name: torch.rand(64, generator=generator) for name in names.values()}
    plain = make(HALF, model)
    subject = changed(plain, tmp_path / "artifact", **{f"norms.{name}": norm for name, norm in norms.items()})
    exported, before = (written(GGUF(), one, tmp_path / f"{i}") for i, one in enumerate((subject, plain)))
    found, was = read(tmp_path / "0"), read(tmp_path / "1")
    assert found.keys() == was.keys()
    for name, tensor in was.items():
        expected = norms[names[name]].numpy() + np.float32(offset) if name in names else tensor.data
        assert found[name].tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(found[name].data, expected, err_msg=name)
    assert exported.details["bytes"] == before.details["bytes"]


@pytest.mark.parametrize(
    ("merges", "step", "says"),
    [
        ([("a", "b"), ("b", "c"), ("ab", "c")], None, "pieces `a` and `bc` that it does not merge"),
        ([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")], normalizers.NFKC(), "behind steps of its own: NFKC"),
        ([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")], None, ""),
    ],
)
def test_pieces_that_sentencepiece_reads_otherwise_are_refused(
    make: Make,
    tmp_path: Path,
    merges: list[tuple[str, str]],
    step: Any,  # noqa: ANN401 - a normalizer of the library
    says: str,
) -> None:
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "ab", "bc", "abc"]
    vocabulary = {text: i for i, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([*([step] if step else []), normalizers.Replace(" ", "▁")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    model = replace(make(Q4_0, changes=(("vocab_size", 264),)).model, path=tmp_path)
    if not says:
        add_vocabulary(gguf.GGUFWriter(None, "llama"), model)
        return
    with pytest.raises(ModelError, match="cannot read text") as refused:
        add_vocabulary(gguf.GGUFWriter(None, "llama"), model)
    assert says in str(dict(refused.value.facts)["it has"])
