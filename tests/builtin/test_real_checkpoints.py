"""Checkpoints that other tools wrote: they decode as those tools decode them, and are laid out again or refused.

They lie in ``checkpoints/``, each with what the tool's own library decodes, beside the scripts that made them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.builtin.exporters.packed_source import open_packed
from qtool.consumers.checkpoint import read_checkpoint
from qtool.consumers.table import answer
from qtool.engine.subject import Subject
from qtool.errors import ModelError, QtoolError
from qtool.plugins import Plugins
from qtool.steps.pack import PackRequest, pack
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from tests.builtin.checkpoints.model import digest, tensors_of

HOME = Path(__file__).with_name("checkpoints")
MADE = sorted(str(found.parent.relative_to(HOME)) for found in HOME.glob("*/*/expected.json"))
GATE = "model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    home = tmp_path_factory.mktemp("real")
    return Workspace(Plugins.discover(), home, home / "cache")


def opened(folder: Path, workspace: Workspace) -> Subject:
    return open_packed(folder, workspace.plugins, cache=workspace.cache)


def weights_of(subject: Subject) -> dict[str, Tensor]:
    return {one.name: subject.linear(one).weight(subject.weight_grid(one)) for one in subject.linears}


def expected(name: str) -> dict[str, dict[str, Any]]:
    held: dict[str, dict[str, Any]] = json.loads((HOME / name / "expected.json").read_text())["weights"]
    return held


def test_they_are_all_there() -> None:
    assert len(MADE) == 13
    tools = {name: json.loads((HOME / name / "expected.json").read_text())["made_with"] for name in MADE}
    assert {tool for made in tools.values() for tool in made} >= {"llmcompressor", "nvidia-modelopt"}


@pytest.mark.parametrize("name", MADE)
def test_every_value_is_what_the_tool_decodes(name: str, workspace: Workspace) -> None:
    found, wanted = weights_of(opened(HOME / name, workspace)), expected(name)
    assert found.keys() == wanted.keys()
    for linear, weight in found.items():
        own = weight.to(getattr(torch, wanted[linear]["dtype"]))
        assert own[0, :8].tolist() == wanted[linear]["first"], linear
        assert digest(own) == wanted[linear]["sha256"], linear


SCHEMES = {
    "llm_compressor/fp8-small-block": ("fp8-sym-b32-sbf16", "fp8-sym-g32-sfp32"),
    "llm_compressor/mixed-apart": ("int4-sym-g32-sbf16", "16 bits"),
    "llm_compressor/mxfp4": ("mxfp4-sym-g32-se8m0", "mxfp4-sym-g32-se8m0"),
    "llm_compressor/nvfp4": ("nvfp4-sym-g16-se4m3", "nvfp4-sym-g16-se4m3"),
    "llm_compressor/nvfp4a16": ("nvfp4-sym-g16-se4m3", "16 bits"),
    "llm_compressor/w3a16-asym-g32": ("int3-asym-g32-sbf16", "16 bits"),
    "llm_compressor/w4a16-asym-g32": ("int4-asym-g32-sbf16", "16 bits"),
    "llm_compressor/w4a8": ("int4-sym-g32-sbf16", "int8-sym-token-sfp32-half"),
    "llm_compressor/w8a8-asym": ("int8-asym-channel-sbf16", "int8-sym-token-sfp32-half"),
    "modelopt/fp8": ("fp8-sym-tensor-sfp32", "fp8-sym-tensor-sfp32-static"),
    "modelopt/nvfp4": ("nvfp4-sym-g16-se4m3", "nvfp4-sym-g16-se4m3"),
}


@pytest.mark.parametrize(("name", "parts"), SCHEMES.items())
def test_the_scheme_is_what_the_config_says(name: str, parts: tuple[str, str], workspace: Workspace) -> None:
    scheme = opened(HOME / name, workspace).scheme
    assert (str(scheme.weights), str(scheme.activations or "16 bits")) == parts


def test_linears_of_several_groups_have_what_their_names_match(workspace: Workspace) -> None:
    subject = opened(HOME / "llm_compressor/mixed", workspace)
    assert {name for name in subject.kept if name.endswith("down_proj")} == subject.kept
    assert len(subject.kept) == 1
    gate, query = (subject.scheme.of(name) for name in (GATE, "model.layers.0.self_attn.q_proj"))
    assert (str(gate.weights), str(gate.activations)) == ("fp8-sym-channel-sbf16", "fp8-sym-token-sfp32")
    assert (str(query.weights), query.activations) == ("int4-sym-g32-sbf16", None)
    kept = subject.model.tensor("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(kept, tensors_of(HOME / "llm_compressor/mixed")["model.layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize("name", MADE)
def test_dense_weights_are_what_the_tool_decodes(name: str, workspace: Workspace, tmp_path: Path) -> None:
    out = pack(PackRequest(str(HOME / name), "hf", tmp_path / "hf"), workspace)[0].path
    written, held = load_file(out / "model.safetensors"), tensors_of(HOME / name)
    for linear, wanted in expected(name).items():
        if wanted["dtype"] == "bfloat16":
            assert digest(written[f"{linear}.weight"]) == wanted["sha256"]
    plain = [one for one in held if one in written and f"{one}_scale" not in held]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(plain)
    assert all(torch.equal(written[one], held[one]) for one in plain)


LAID_OUT = [
    ("llm_compressor/nvfp4", "modelopt"),
    ("llm_compressor/nvfp4a16", "modelopt"),
    ("llm_compressor/w4a16-asym-g32", "gptq-v2"),
    ("llm_compressor/w4a16-asym-g32", "awq"),
    ("llm_compressor/mixed-apart", "gptq"),
    ("modelopt/fp8", "compressed-tensors"),
    ("modelopt/nvfp4", "compressed-tensors"),
    ("modelopt/mixed", "compressed-tensors"),
]


@pytest.mark.parametrize(("name", "to"), LAID_OUT)
def test_another_layout_holds_the_same_values(name: str, to: str, workspace: Workspace, tmp_path: Path) -> None:
    """Each exporter reads back what it wrote with a decoder of its consumer; those that are read again, by us too."""
    out = pack(PackRequest(str(HOME / name), to, tmp_path / "out"), workspace)[0].path
    if to in ("modelopt", "compressed-tensors"):
        first, again = opened(HOME / name, workspace), opened(out, workspace)
        assert again.scheme == first.scheme
        one, other = weights_of(first), weights_of(again)
        assert all(torch.equal(weight.bfloat16(), other[linear].bfloat16()) for linear, weight in one.items())


@pytest.mark.parametrize(("name", "kind"), [("llm_compressor/mxfp4", "MXFP4"), ("llm_compressor/w4a8", "Q4_0")])
def test_llama_cpps_reader_decodes_the_same_values(
    name: str, kind: str, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtool.builtin.exporters import gguf as exporter

    monkeypatch.setattr(exporter, "add_vocabulary", lambda *_: None)
    monkeypatch.setattr(exporter, "_check_model", lambda *_: None)
    out = pack(PackRequest(str(HOME / name), "gguf", tmp_path / "gguf"), workspace)[0].path
    (tensor,) = (one for one in gguf.GGUFReader(out / "model.gguf").tensors if one.name == "blk.0.ffn_gate.weight")
    assert tensor.tensor_type.name == kind
    read = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    assert digest(read.bfloat16()) == expected(name)[GATE]["sha256"]


REFUSED = [
    ("llm_compressor/w8a8-asym", "modelopt", "NVFP4 and FP8 weights"),
    ("llm_compressor/nvfp4", "gptq", "for weights only"),
    ("llm_compressor/w3a16-asym-g32", "awq", "codes of 4 bits"),
    ("llm_compressor/fp8-small-block", "gguf", "no type for `fp8`"),
    ("llm_compressor/mixed", "awq", "16 bits"),
    ("modelopt/fp8", "modelopt", "already"),
]


@pytest.mark.parametrize(("name", "to", "reason"), REFUSED)
def test_what_a_layout_does_not_hold_is_refused(name: str, to: str, reason: str, workspace: Workspace) -> None:
    with pytest.raises(QtoolError, match=reason) as refused:
        pack(PackRequest(str(HOME / name), to), workspace)
    assert refused.value.hint


def copied(
    name: str, folder: Path, edit: Callable[[dict[str, Any]], object] = lambda _: None, **tensors: Tensor
) -> Path:
    """Copy a checkpoint with another ``quantization_config`` and more tensors."""
    shutil.copytree(HOME / name, folder)
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def weights_say(**said: object) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(said)


ASYM = "llm_compressor/w4a16-asym-g32"
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.mark.parametrize(
    ("edit", "tensors", "reason"),
    [
        (weights_say(actorder="group"), {}, "order of their own"),
        (lambda _: None, {f"{GATE}.weight_g_idx": torch.arange(64, dtype=torch.int32) // 32}, "more than codes"),
        (lambda _: None, {f"{GATE}.pre_quant_scale": torch.ones(64)}, "more than codes"),
        (lambda _: None, {"model.norm.weight_scale": torch.ones(24, 2)}, "does not quantize"),
        (lambda _: None, {"model.embed_tokens.weight_scale": torch.ones(24, 2)}, "scales and no codes"),
        (lambda _: None, {"lm_head.weight_scale": torch.ones(24, 2)}, "scales and no codes"),
        (lambda config: config.update(kv_cache_scheme=CACHE), {}, "KV cache"),
        (lambda config: config["config_groups"]["group_0"].update(targets=["re:.*self_attn.*"]), {}, "no group names"),
        (weights_say(num_bits=8), {}, "is not stored as its config says"),
        (
            lambda config: config.update(config_groups={"W5A5": ["Linear"]}),
            {},
            "`W5A5` of `config_groups` is no",
        ),
        (
            lambda config: config.update(config_groups={"W4A16": "Linear"}),
            {},
            "no preset with the names of its",
        ),
        (lambda config: config.update(config_groups={"UNQUANTIZED": ["Linear"]}), {}, "a group without weights"),
        (lambda config: config.update(config_groups=["W4A16"]), {}, "cannot understand `config_groups`"),
    ],
)
def test_more_than_codes_and_scales_is_refused(
    edit: Callable[[dict[str, Any]], object],
    tensors: dict[str, Tensor],
    reason: str,
    workspace: Workspace,
    tmp_path: Path,
) -> None:
    folder = copied(ASYM, tmp_path / "odd", edit, **tensors)
    with pytest.raises(QtoolError, match=reason):
        pack(PackRequest(str(folder), "hf"), workspace)


@pytest.mark.parametrize(("name", "preset"), [("nvfp4", "nvfp4"), ("mxfp4", "MXFP4")])
def test_a_preset_with_its_linears_is_what_the_library_says(
    name: str, preset: str, workspace: Workspace, tmp_path: Path
) -> None:
    name = f"llm_compressor/{name}"
    folder = copied(name, tmp_path / "named", lambda config: config.update(config_groups={preset: ["Linear"]}))
    first, other = (opened(one, workspace) for one in (HOME / name, folder))
    assert other.scheme == first.scheme
    weights = weights_of(other)
    assert all(torch.equal(weight, weights[linear]) for linear, weight in weights_of(first).items())


def test_an_order_that_only_calibration_had_changes_nothing(workspace: Workspace, tmp_path: Path) -> None:
    folder = copied(ASYM, tmp_path / "static", weights_say(actorder="static"))
    first, other = (weights_of(opened(one, workspace)) for one in (HOME / ASYM, folder))
    assert all(torch.equal(weight, other[name]) for name, weight in first.items())


def test_words_that_each_begin_with_a_code_are_read(workspace: Workspace, tmp_path: Path) -> None:
    """compressed-tensors before 0.20 left two bits of a word of ten codes of 3 bits, also of zero points."""
    name = "llm_compressor/w3a16-asym-g32"
    first = opened(HOME / name, workspace)
    tensors = {}
    for linear in first.linears:
        found = first.linear(linear)
        zeros = found.parameters[0].zero_point
        assert zeros is not None
        tensors[f"{linear.name}.weight_packed"] = apart(found.codes)
        tensors[f"{linear.name}.weight_zero_point"] = apart(zeros.to(torch.uint8).T.contiguous()).T.contiguous()
    again = weights_of(opened(copied(name, tmp_path / "older", **tensors), workspace))
    assert all(torch.equal(weight, again[linear]) for linear, weight in weights_of(first).items())


def apart(codes: Tensor) -> Tensor:
    """Pack codes of 3 bits, ten to a word, one by one."""
    words = torch.zeros(len(codes), -(-codes.shape[1] // 10), dtype=torch.int32)
    for column in range(codes.shape[1]):
        words[:, column // 10] |= codes[:, column].to(torch.int32) << 3 * (column % 10)
    return words


def test_codes_beyond_their_bits_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    name = "llm_compressor/w4a8"
    weight = tensors_of(HOME / name)[f"{GATE}.weight"].clone()
    weight[3, 5] = 8
    folder = copied(name, tmp_path / "odd", **{f"{GATE}.weight": weight})
    with pytest.raises(QtoolError, match="cannot read the codes"):
        weights_of(opened(folder, workspace))


DOCTOR = [
    ("llm_compressor/nvfp4", "vllm", "sm90", "executes-other", "W4A16"),
    ("llm_compressor/w4a8", "vllm", "sm90", "unknown", "unknown: no rule speaks of these linears"),
    (
        "llm_compressor/w4a16-asym-g32",
        "transformers",
        "any",
        "refuses",
        "cannot be read: it makes room for zero points",
    ),
    ("llm_compressor/w4a16-asym-g32", "vllm", "sm90", "loads", "W4A16: activations are not quantized"),
    ("llm_compressor/mixed", "vllm", "sm90", "loads", "W4A16: activations are not quantized; W8A8: dynamic FP8"),
    ("llm_compressor/mixed-apart", "vllm", "sm90", "refuses", "refused: q, k and v, and gate and up, are one linear"),
    ("llm_compressor/mxfp4", "sglang", "sm100", "refuses", "refused: it reads MXFP4 of experts only"),
    ("modelopt/fp8", "sglang", "sm90", "loads", "W8A8: static FP8 activations per tensor"),
    ("modelopt/mixed", "tensorrt-llm", "any", "loads", "W8A8: static FP8 activations per tensor"),
]


@pytest.mark.parametrize(("name", "consumer", "device", "verdict", "says"), DOCTOR)
def test_what_consumers_make_of_them(name: str, consumer: str, device: str, verdict: str, says: str) -> None:
    found = answer(read_checkpoint(HOME / name, lambda _: 8), consumer, device)
    assert (found.verdict, found.says[: len(says)]) == (verdict, says)


def test_bits_of_inputs_are_told() -> None:
    (case,) = read_checkpoint(HOME / "modelopt/fp8", lambda _: 8)
    assert (case.bits, case.input_bits, case.inputs) == (8, 8, "static")


@pytest.mark.parametrize("name", ["llm_compressor/nvfp4", "modelopt/nvfp4"])
def test_a_packed_checkpoint_is_no_model_and_the_way_is_named(name: str, workspace: Workspace) -> None:
    with pytest.raises(ModelError, match="is quantized already") as refused:
        open_subject(str(HOME / name), workspace)
    assert f"qtool pack {HOME / name} --to hf" in refused.value.hint
