"""GGUF files are laid out in another way with the same codes, scales and offsets, or refused; never rounded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from qtool.builtin.exporters.gguf import FILE, GGUF
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, ModelError, QtoolError, UsageError
from qtool.model.gguf import convert_gguf, describe_gguf
from qtool.plugins import Plugins
from qtool.scheme import TensorScheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from qtool.testing.tiny_models import save_tiny_model
from tests.builtin.layouts.conftest import changed
from tests.builtin.packed import written
from tests.builtin.test_gguf import HALF, Q4_0, Q4_1, SIZES, words

WINDOWS = {"query_pre_attn_scalar": 32, "sliding_window": 8}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
FAMILIES: dict[str, dict[str, Any]] = {
    **{"llama": {}, "qwen2": {"head_dim": 16}, "qwen3": {}},
    **{"gemma2": WINDOWS | CAPS, "gemma3_text": WINDOWS | {"num_hidden_layers": 6}},
}
Quantize = Callable[..., str]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Workspace:
    return Workspace(Plugins.discover(), tmp_path_factory.mktemp("home"), cache)


@pytest.fixture(scope="module")
def quantize(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    """Round a tiny model of a family to nearest, in 16 bits, tied or not; return the path of the artifact."""

    @lru_cache
    def folder(family: str, dtype: torch.dtype, *, tied: bool) -> Path:
        path = tmp_path_factory.mktemp(family)
        config = {**SIZES, **FAMILIES[family], "tie_word_embeddings": tied}
        save_tiny_model(path / "wide", AutoConfig.for_model(family, **config))
        AutoModelForCausalLM.from_pretrained(path / "wide", dtype=dtype).save_pretrained(path / "model")
        tokenizer = words()
        tokenizer.add_special_tokens(dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"))
        tokenizer.save_pretrained(path / "model")
        return path / "model"

    @lru_cache
    def made(weights: str, family: str = "llama", dtype: torch.dtype = torch.float16, *, tied: bool = False) -> str:
        scheme = read_scheme("", {"weights": weights}, workspace.plugins)
        source = str(folder(family, dtype, tied=tied or family.startswith("gemma")))
        return str(mitigate(MitigateRequest(source, "rtn", scheme, {}, dtype="float32"), workspace)[0].path)

    return made


def opened(file: Path, workspace: Workspace) -> Subject:
    return GGUF().open(file, workspace.plugins, cache=workspace.cache)


def file_of(quantized: str, workspace: Workspace) -> Path:
    return pack(PackRequest(quantized, "gguf"), workspace)[0].path / FILE


def foreign(file: Path, folder: Path) -> Path:
    """Copy a file from beside what qtool says of it."""
    folder.mkdir()
    return Path((folder / "other.gguf").write_bytes(file.read_bytes()) and folder / "other.gguf")


def assert_same(one: Subject, other: Subject) -> None:
    """Say that all codes, scales, offsets and floats are the same, and what decodes them."""
    assert [linear.name for linear in one.coded] == [linear.name for linear in other.coded]
    for linear in one.coded:
        ours, theirs = one.packed(linear), other.packed(linear)
        assert torch.equal(ours.stream, theirs.stream), linear.name
        for leaf in ("scale", "offset", "zero_point", "global_scale"):
            mine, yours = (getattr(each.parameters, leaf) for each in (ours, theirs))
            assert mine is None if yours is None else torch.equal(mine, yours), (linear.name, leaf)
        assert one.scheme.of(linear.name).weights == other.scheme.of(linear.name).weights
    places = {name for name in one.model.places if name.removesuffix(".weight") not in {c.name for c in one.coded}}
    for name in places:
        torch.testing.assert_close(
            other.model.tensor(name).double(), one.model.tensor(name).double(), rtol=0, atol=3e-8
        )


@pytest.mark.parametrize(
    ("weights", "family", "dtype"),
    [
        *((weights, "llama", torch.float16) for weights in (Q4_0, Q4_1, HALF, "mxfp4", "nvfp4")),
        ("int4-sym-g32-sbf16", "llama", torch.bfloat16),
        (f"{HALF},down_proj={Q4_1},o_proj=none,k_proj=none", "llama", torch.float16),
        *((Q4_0, family, torch.float16) for family in FAMILIES),
        ("mxfp4,q_proj=none", "qwen3", torch.bfloat16),
        (f"{Q4_0},lm_head={HALF},embed_tokens={Q4_1}", "llama", torch.float16),
    ],
)
def test_what_is_read_is_the_artifact(
    quantize: Quantize, workspace: Workspace, tmp_path: Path, weights: str, family: str, dtype: torch.dtype
) -> None:
    quantized = quantize(weights, family, dtype)
    ours = open_subject(quantized, workspace).subject
    written(GGUF(), ours, tmp_path / "out")
    read = opened(tmp_path / "out" / FILE, workspace)
    assert_same(without_range_rules(ours), read)


def without_range_rules(subject: Subject) -> Subject:
    """A file does not tell how scales were fitted."""

    def plain(one: TensorScheme | None) -> TensorScheme | None:
        return None if one is None else replace(one, range_rule="tight")

    rules = tuple(replace(rule, scheme=plain(rule.scheme)) for rule in subject.scheme.rules)
    return replace(subject, scheme=replace(subject.scheme, weights=plain(subject.scheme.weights), rules=rules))


# What a file goes into, and what the artifact behind it has to be for the very same tensors.
PATHS = [
    ("int4-sym-g32-sfp16", "compressed-tensors"),
    ("int4-sym-g32-sfp16", "gptq"),
    ("int4-sym-g32-sfp16", "awq"),
    ("int4-sym-g32-sfp16", "hf"),
    ("int4-sym-g32-sfp16", "gguf-f16"),
    (HALF, "compressed-tensors"),
    (HALF, "gptq"),
    ("mxfp4", "compressed-tensors"),
    ("nvfp4", "modelopt"),
    (Q4_1, "hf"),
    (f"int4-sym-g32-sfp16,down_proj={HALF},o_proj=none", "compressed-tensors"),
    (f"int4-sym-g32-sfp16,lm_head={HALF},embed_tokens={HALF}", "compressed-tensors"),
]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("weights", "to"), PATHS)
def test_a_file_gives_what_its_artifact_gives(
    quantize: Quantize, workspace: Workspace, tmp_path: Path, weights: str, to: str, own: bool
) -> None:
    quantized = quantize(weights)
    file = file_of(quantized, workspace)
    source = file.parent if own else foreign(file, tmp_path / "foreign")
    direct = pack(PackRequest(quantized, to, tmp_path / "direct"), workspace)[0]
    through = pack(PackRequest(str(source), to, tmp_path / "through"), workspace)[0]
    assert through.manifest.details["labels"]["mitigator"] == ("rtn" if own else "unknown")
    if to == "gguf-f16":
        ours, theirs = (
            {one.name: one.data for one in gguf.GGUFReader(each.path / FILE).tensors} for each in (direct, through)
        )
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(one, theirs[name]) for name, one in ours.items())
        return
    mine, yours = (load_file(each.path / "model.safetensors") for each in (direct, through))
    assert mine.keys() == yours.keys()
    for name, tensor in mine.items():
        if "norm" in name:  # in float32, as the file has them
            assert torch.equal(tensor, yours[name].to(tensor.dtype)), name
            continue
        assert tensor.dtype == yours[name].dtype, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), yours[name].reshape(-1).view(torch.uint8)), name
    AutoConfig.from_pretrained(through.path)
    config = json.loads((through.path / "config.json").read_text())
    assert config["quantization_config"] if to != "hf" else True
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_zero_points_come_out_of_offsets_only_where_all_are_some(
    quantize: Quantize, workspace: Workspace, tmp_path: Path
) -> None:
    ours = open_subject(quantize("int4-asym-g32-sfp16"), workspace).subject
    assert ours.quantized is not None
    held = {key: ours.quantized.tensor(key) for key in ours.quantized.names() if key.endswith(".scale")}
    scales = {key: (2.0 ** scale.float().log2().round()).half() for key, scale in held.items()}
    name = "model.layers.0.mlp.up_proj.zero_point"
    zeros = ours.quantized.tensor(name).clone()
    zeros[0, 0] = 0xF0  # the least and the largest
    subject = changed(ours, tmp_path / "changed", **scales, **{name: zeros})
    written(GGUF(), subject, tmp_path / "out")
    read = opened(tmp_path / "out" / FILE, workspace)
    assert str(read.scheme.weights) == "int4-asym-g32-sfp16"
    assert_same(subject, read)
    pack(PackRequest(str(tmp_path / "out" / FILE), "gptq-v2", tmp_path / "gptq"), workspace)
    tensors = [one for one in gguf.GGUFReader(tmp_path / "out" / FILE).tensors if one.tensor_type.name == "Q4_1"]
    content = bytearray((tmp_path / "out" / FILE).read_bytes())
    at = int(tensors[3].data_offset) + 20 * 5
    scale = np.frombuffer(content[at : at + 2], np.float16)
    for offset in (scale * np.float16(-16), scale * np.float16(1), scale * np.float16(-2.5)):
        content[at + 2 : at + 4] = offset.astype(np.float16).tobytes()
        (tmp_path / "out" / FILE).write_bytes(content)
        read = opened(tmp_path / "out" / FILE, workspace)
        assert {str(one) for one in read.scheme.every("weights")} == {Q4_1}
    for to in ("compressed-tensors", "gptq-v2", "awq"):
        with pytest.raises(QtoolError, match=r"zero points of .* are whole numbers") as refused:
            pack(PackRequest(str(tmp_path / "out" / FILE), to, tmp_path / "refused"), workspace)
        assert "nearest that fits: --weights int4-asym-g32" in refused.value.hint


def test_an_embedding_of_codes_stands_for_the_head(quantize: Quantize, workspace: Workspace, tmp_path: Path) -> None:
    quantized = quantize(f"{HALF},lm_head={HALF},embed_tokens={HALF}", tied=True)
    file = foreign(file_of(quantized, workspace), tmp_path / "foreign")
    assert "output.weight" not in {one.name for one in gguf.GGUFReader(file).tensors}
    read = opened(file, workspace)
    assert_same(open_subject(quantized, workspace).subject, read)
    for source, name in ((quantized, "direct"), (str(file), "through")):
        pack(PackRequest(source, "compressed-tensors", tmp_path / name), workspace)
    mine, yours = (load_file(tmp_path / name / "model.safetensors") for name in ("direct", "through"))
    assert mine.keys() == yours.keys()
    assert "lm_head.weight_scale" in mine
    assert torch.equal(mine["lm_head.weight_packed"], yours["lm_head.weight_packed"])


def rewritten(file: Path, folder: Path, *, kinds: dict[str, gguf.GGMLQuantizationType], **keys: Any) -> Path:  # noqa: ANN401
    """Copy a file as others write it, with some tensors quantized by the official package and some keys changed."""
    reader, path = gguf.GGUFReader(file), folder / "theirs.gguf"
    folder.mkdir()
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(
                name, keys.get(name.replace(".", "_"), field.contents()), field.types[0], sub_type=inner
            )
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = next((kind for part, kind in kinds.items() if tensor.name.startswith(part)), None)
        if kind is None:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TYPES = gguf.GGMLQuantizationType


@pytest.mark.parametrize("kind", [TYPES.Q4_0, TYPES.Q4_1, TYPES.Q8_0, TYPES.MXFP4])
def test_codes_of_the_official_package_decode_to_its_values(
    quantize: Quantize, workspace: Workspace, tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    half = pack(PackRequest(quantize(HALF), "gguf-f16"), workspace)[0].path / FILE
    file = rewritten(half, tmp_path / "theirs", kinds={"blk.1.ffn": kind, "blk.0.attn_q": kind, "output.w": kind})
    read = opened(file, workspace)
    stored = {one.name: one for one in gguf.GGUFReader(file).tensors}
    assert {linear.name for linear in read.coded} == {
        "lm_head",
        "model.layers.0.self_attn.q_proj",
        *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    for linear in read.coded:
        own = stored[read.model.names[f"{linear.name}.weight"]]  # type: ignore[attr-defined]
        values = torch.from_numpy(gguf.dequantize(own.data, own.tensor_type).copy())
        if "q_proj" in linear.name:
            values = values.reshape(4, 16, 2, 64).transpose(1, 2).reshape(128, 64)
        assert torch.equal(read.linear(linear).weight(read.weight_grid(linear)), values)


def test_types_and_keys_that_are_not_read_are_refused(quantize: Quantize, workspace: Workspace, tmp_path: Path) -> None:
    half = pack(PackRequest(quantize(HALF), "gguf-f16"), workspace)[0].path / FILE
    odd = rewritten(half, tmp_path / "q5", kinds={"blk.0.ffn": TYPES.Q4_0, "blk.1.attn_output": TYPES.Q5_0})
    with pytest.raises(ArtifactError, match="codes of a type that is not read") as refused:
        opened(odd, workspace)
    assert ("first", "blk.1.attn_output.weight") in refused.value.facts
    assert ("type", "Q5_0") in refused.value.facts
    odd = rewritten(half, tmp_path / "keys", kinds={"blk.0.ffn": TYPES.Q4_0}, llama_feed_forward_length=64)
    with pytest.raises(ArtifactError, match="other shapes than its model"):
        opened(odd, workspace)
    with pytest.raises(ArtifactError, match="holds nothing to pack"):
        pack(PackRequest(str(half), "hf"), workspace)
    linear = pack(PackRequest(quantize(Q4_0, "llama"), "gguf"), workspace)[0].path
    with pytest.raises(UsageError, match="is laid out for gguf already"):
        pack(PackRequest(str(linear), "gguf", tmp_path / "out"), workspace)


def test_caps_and_frequencies_that_transformers_leaves_out_are_refused(
    quantize: Quantize, workspace: Workspace, tmp_path: Path
) -> None:
    file = file_of(quantize(Q4_0), workspace)
    content = gguf.GGUFReader(file)
    assert "rope_freqs.weight" not in {one.name for one in content.tensors}
    scaled = tmp_path / "scaled.gguf"
    writer = gguf.GGUFWriter(scaled, "llama")
    for name, field in content.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_attn_logit_softcapping(3.0)
    for tensor in content.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="says what transformers does not read") as refused:
        opened(scaled, workspace)
    assert ("llama.attn_logit_softcapping", 3.0) in refused.value.facts


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_files_that_are_decoded_are_compared_too(
    quantize: Quantize, workspace: Workspace, tmp_path: Path, family: str
) -> None:
    file = file_of(quantize(Q4_0, family), workspace)
    convert_gguf(file, tmp_path / "model")
    for name, cap in CAPS.items() if family == "gemma2" else ():
        odd = rewritten(file, tmp_path / name, kinds={}, **{f"gemma2_{name}": 20.0})
        for read in (convert_gguf, describe_gguf):
            with pytest.raises(ModelError, match="says what transformers does not read") as refused:
                read(odd, tmp_path / name / "model")
            assert refused.value.facts == ((f"gemma2.{name}", 20.0), ("read", cap))
            assert [*(tmp_path / name).iterdir()] == [odd]


def test_scales_that_a_bfloat16_model_would_round_are_refused_by_who_casts_them(
    quantize: Quantize, workspace: Workspace, tmp_path: Path
) -> None:
    file = foreign(file_of(quantize("int4-sym-g32-sfp16", "llama", torch.bfloat16), workspace), tmp_path / "foreign")
    assert opened(file, workspace).model.dtype == torch.bfloat16
    with pytest.raises(QtoolError, match="float16 scales would make a bfloat16 model compute in float16"):
        pack(PackRequest(str(file), "compressed-tensors", tmp_path / "refused"), workspace)
    out = pack(PackRequest(str(file), "gptq", tmp_path / "out"), workspace)[0].path
    stored = load_file(out / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
