"""A packed checkpoint is laid out in another way with the same codes and scales, or refused; never rounded again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from qtool.artifacts.store import CHECKPOINT_MANIFEST, open_artifact
from qtool.builtin.exporters.packed_layouts import check_reciprocal, is_reciprocal
from qtool.builtin.exporters.packed_source import open_packed
from qtool.errors import ArtifactError, NumericalError, QtoolError, SchemeError, UsageError
from qtool.scheme import GroupParameters
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from tests.steps.conftest import Quantize, save_llama

NAME = "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), hidden=64, inner=128)


def foreign(checkpoint: Path, folder: Path) -> Path:
    """Return a copy of a checkpoint as another tool leaves it, without a word of qtool's."""
    shutil.copytree(checkpoint, folder)
    for name in (CHECKPOINT_MANIFEST, "README.md"):
        (folder / name).unlink()
    return folder


def edited(folder: Path, **tensors: Tensor) -> Path:
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def same(one: Path, other: Path) -> None:
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(tensor.view(torch.uint8) if tensor.ndim else tensor, _bytes(theirs[name])), name


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.ndim else tensor


PATHS = [
    ("int4-asym-g32", "", "gptq-v2"),
    ("int8-sym-g32", "", "gptq"),
    ("int4-sym-channel", "", "awq"),
    ("int4-asym-g32", "", "hf"),
    ("int8-sym-channel", "int8-sym-token-sfp32-half", "hf"),
    ("mxfp6_e2m3", "mxfp8-rceil", "hf"),
    ("mxfp8", "", "hf"),
    ("fp8-b16x32", "fp8-g32", "hf"),
    ("nvfp4", "", "modelopt"),
    ("fp8-channel", "fp8-token", "modelopt"),
    ("fp8-tensor-sbf16", "fp8-tensor", "modelopt"),
]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("weights", "activations", "to"), PATHS)
def test_a_checkpoint_gives_what_its_artifact_gives(
    quantize: Quantize, workspace: Workspace, tmp_path: Path, weights: str, activations: str, to: str, own: bool
) -> None:
    """Byte for byte, if float32 holds the reciprocals of the artifact's global scales."""
    quantized = quantize(weights, activations)
    if weights == "nvfp4":
        quantized = with_invertible_scales(quantized, workspace, tmp_path)
    packed = pack(PackRequest(quantized, "compressed-tensors"), workspace)[0].path
    direct = pack(PackRequest(quantized, to, tmp_path / "direct"), workspace)[0]
    packed = packed if own else foreign(packed, tmp_path / "foreign")
    through = pack(PackRequest(str(packed), to, tmp_path / "through"), workspace)[0]
    same(through.path, direct.path)
    assert json.loads((through.path / "config.json").read_text()) == json.loads(
        (direct.path / "config.json").read_text()
    )
    said = through.manifest.details["labels"]
    assert said["mitigator"] == ("rtn" if own else "unknown")
    assert said["weights"].partition("-")[0] == weights.partition("-")[0]
    assert through.manifest.inputs.keys() == {"model", "checkpoint"}
    assert through.manifest.details["bits"] == direct.manifest.details["bits"]


@pytest.mark.parametrize(("between", "to"), [("compressed-tensors", "hf"), ("gptq", "compressed-tensors")])
def test_what_is_made_of_anothers_checkpoint_is_measured(
    workspace: Workspace, tmp_path: Path, between: str, to: str
) -> None:
    """With its own tokenizer, as there is no model in 16 bits behind it, and so nothing to compare it with."""
    source = save_llama(tmp_path / "model", hidden=64, inner=128)
    letters = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvw ")}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(source)
    (tmp_path / "text.txt").write_text("to be or not to be that is the question " * 4, encoding="utf-8")
    told: list[str] = []
    workspace = replace(workspace, warn=told.append)
    scheme = read_scheme("", {"weights": "int4-sym-g32"}, workspace.plugins)
    quantized = str(mitigate(MitigateRequest(str(source), "rtn", scheme), workspace)[0].path)

    def measured(checkpoint: Path, **options: bool) -> float:
        request = EvalRequest(str(checkpoint), perplexity=(str(tmp_path / "text.txt"),), seq_len=16, **options)
        (found,) = evaluate(request, workspace)[0].manifest.details["values"].values()
        return float(found)

    direct = measured(pack(PackRequest(quantized, to), workspace)[0].path)
    assert not told
    theirs = foreign(pack(PackRequest(quantized, between), workspace)[0].path, tmp_path / "foreign")
    made = pack(PackRequest(str(theirs), to, tmp_path / "made"), workspace)[0].path
    told.clear()
    assert measured(made) == direct
    assert told == ["the model behind `made` is not at hand: its own tokenizer is taken"]
    with pytest.raises(QtoolError, match="cannot be found"):
        measured(made, kl=True)
    told.clear()
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "unheard of"}}))
    with pytest.raises(QtoolError, match="cannot be found"):
        measured(made)
    assert not told
    with pytest.raises(QtoolError, match="nothing"):
        measured(tmp_path / "nothing.safetensors")


def with_invertible_scales(quantized: str, workspace: Workspace, folder: Path) -> str:
    """Return an artifact whose global scales are powers of two."""
    from qtool.artifacts.store import ArtifactWriter

    artifact = open_artifact(Path(quantized))
    tensors = {name: artifact.tensor(name) for name in artifact.names()}
    for name in tensors:
        if name.endswith(".global_scale"):
            tensors[name] = torch.full_like(tensors[name], 2.0**-12)
    writer = ArtifactWriter(folder / "powers.safetensors", artifact.manifest)
    writer.begin()
    writer.add("all", tensors)
    return str(writer.finish(replace(artifact.manifest, tensors={})).path)


GGUF = [("int4-sym-g32", "Q4_0"), ("int8-sym-channel", "Q8_0"), ("mxfp4", "MXFP4"), ("nvfp4", "NVFP4")]


@pytest.mark.parametrize(("weights", "kind"), GGUF)
def test_llama_cpps_types_hold_a_checkpoints_codes(
    quantize: Quantize, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: str, kind: str
) -> None:
    """The official reader decodes what the first reader decoded."""
    from qtool.builtin.exporters import gguf as exporter

    monkeypatch.setattr(exporter, "add_vocabulary", lambda *_: None)
    monkeypatch.setattr(exporter, "_check_model", lambda *_: None)
    quantized = quantize(weights)
    packed = pack(PackRequest(quantized, "compressed-tensors"), workspace)[0].path
    out = pack(PackRequest(str(packed), "gguf", tmp_path / "gguf"), workspace)[0].path
    (tensor,) = (one for one in gguf.GGUFReader(out / "model.gguf").tensors if one.name == "blk.1.ffn_gate.weight")
    assert tensor.tensor_type.name == kind
    read = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    subject = open_packed(packed, workspace.plugins, cache=workspace.cache)
    (linear,) = (one for one in subject.model.graph.linears if one.name == NAME)
    found = subject.linear(linear)
    alone = replace(found, parameters=(replace(found.parameters[0], global_scale=None),))
    assert torch.equal(read, alone.weight(subject.weight_grid(linear)))


def test_modelopt_and_back_is_the_same_checkpoint(quantize: Quantize, workspace: Workspace, tmp_path: Path) -> None:
    quantized = with_invertible_scales(quantize("nvfp4"), workspace, tmp_path)
    first = pack(PackRequest(quantized, "compressed-tensors"), workspace)[0].path
    second = pack(PackRequest(str(first), "modelopt"), workspace)[0].path
    third = pack(PackRequest(str(second), "compressed-tensors", tmp_path / "third"), workspace)[0].path
    same(third, first)


def test_a_divisor_whose_last_bit_is_lost_is_told_of(quantize: Quantize, workspace: Workspace, tmp_path: Path) -> None:
    """Of other tools' divisors some have a multiplier whose reciprocal is another one; qtool's own have not."""
    told: list[str] = []
    listening = replace(workspace, warn=told.append)
    packed = pack(PackRequest(quantize("nvfp4"), "compressed-tensors"), workspace)[0].path
    pack(PackRequest(str(packed), "modelopt", tmp_path / "own"), listening)
    assert told == []
    near = (torch.tensor([2.0**11 * (2 - step * 2.0**-23)]) for step in range(1, 100))
    odd = next(one for one in near if not is_reciprocal(one.reshape(())))
    names = [name for name in load_file(packed / "model.safetensors") if name.endswith(".weight_global_scale")]
    other = edited(foreign(packed, tmp_path / "odd"), **{name: odd.clone() for name in names})
    pack(PackRequest(str(other), "modelopt", tmp_path / "out"), listening)
    assert told == ["1 global scales have no exact reciprocal in float32: last bits may differ"]


def test_what_is_read_is_the_artifact(quantize: Quantize, workspace: Workspace) -> None:
    for weights in ("int3-asym-channel", "int5-sym-g16", "int8-asym-g32", "mxfp4", "fp8-tensor-sfp32"):
        quantized = quantize(weights)
        packed = pack(PackRequest(quantized, "compressed-tensors"), workspace)[0].path
        ours, theirs = (
            open_subject(quantized, workspace).subject,
            open_packed(packed, workspace.plugins, cache=workspace.cache),
        )
        assert str(theirs.scheme.weights) == str(ours.scheme.weights)
        for linear in ours.model.graph.linears:
            one, other = ours.linear(linear), theirs.linear(linear)
            assert torch.equal(one.codes, other.codes)
            assert torch.equal(one.parameters[0].scale, other.parameters[0].scale)
            zero = one.parameters[0].zero_point
            assert zero is None or torch.equal(zero, other.parameters[0].zero_point)


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ("int8-sym-channel", "int8-sym-token-sfp32-half"),
        ("int4-sym-g32", "int8-asym-token-sfp32"),
        ("fp8-tensor", "fp8-tensor"),
        ("mxfp4", "mxfp4"),
        ("mxfp4", "fp8-g32"),
        ("mxfp8", "fp8-token"),
        ("int4-sym-g32", "fp8-token"),
        ("mxfp6_e2m3", "mxfp6_e2m3"),
        ("mxfp6_e2m3", "mxfp8-rceil"),
        ("mxfp8", "mxfp8-rceil"),
    ],
)
def test_activations_are_read_as_consumers_quantize_them(
    quantize: Quantize, workspace: Workspace, weights: str, activations: str
) -> None:
    quantized = quantize(weights, activations)
    packed = pack(PackRequest(quantized, "compressed-tensors"), workspace)[0].path
    read = open_packed(packed, workspace.plugins, cache=workspace.cache).scheme
    assert str(read.activations) == str(open_subject(quantized, workspace).subject.scheme.activations)


@pytest.mark.parametrize(
    ("weights", "activations"), [("fp8-channel", "fp8-token"), ("fp8-tensor", "fp8-tensor"), ("nvfp4", "")]
)
def test_modelopts_activations_are_read_as_its_algorithm_says(
    quantize: Quantize, workspace: Workspace, weights: str, activations: str
) -> None:
    quantized = quantize(weights, activations)
    packed = pack(PackRequest(quantized, "modelopt"), workspace)[0].path
    read = open_packed(packed, workspace.plugins, cache=workspace.cache).scheme
    ours = open_subject(quantized, workspace).subject.scheme
    assert (str(read.weights), str(read.activations)) == (str(ours.weights), str(ours.activations))


def test_scales_that_a_type_would_round_are_refused(quantize: Quantize, workspace: Workspace, tmp_path: Path) -> None:
    packed = pack(PackRequest(quantize("int4-sym-g32"), "compressed-tensors"), workspace)[0].path
    tiny = load_file(packed / "model.safetensors")[f"{NAME}.weight_scale"].clone()
    tiny[3, 1] = 2.0**-30
    odd = edited(foreign(packed, tmp_path / "odd"), **{f"{NAME}.weight_scale": tiny})
    with pytest.raises(QtoolError, match="float16"):
        pack(PackRequest(str(odd), "gptq", tmp_path / "out"), workspace)
    assert not (tmp_path / "out").exists()


def parameters_of(multiplier: float, scale: float) -> GroupParameters:
    return GroupParameters(torch.tensor([[scale]]), None, torch.tensor(multiplier))


def test_a_divisor_that_decodes_to_another_weight_is_refused() -> None:
    """``1.0625 m`` and ``1.0625 / d`` fall on two sides of the middle of two bfloat16 values."""
    m = torch.tensor((1 + 2.0**-8) / 0.5).float()  # 0.5 m is halfway between two values of bfloat16
    check_reciprocal("a", parameters_of(float(m), 1.0), 1 / m.double())
    below = torch.nextafter(1 / m, torch.tensor(2.0))
    with pytest.raises(NumericalError, match="no reciprocal") as refused:
        check_reciprocal("a", parameters_of(float(torch.nextafter(m, torch.tensor(9.0))), 1.0), below)
    assert ("scales that differ", 1) in refused.value.facts
    above = torch.nextafter(1 / m, torch.tensor(0.0))
    with pytest.raises(NumericalError, match="no reciprocal"):
        check_reciprocal("a", parameters_of(float(m), 1.0), above)


def test_reciprocals_that_do_not_invert_are_known() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        m = torch.rand((), generator=generator) * 1e-3 + 1e-6
        d = torch.tensor(1 / float(m), dtype=torch.float64).float()
        back = torch.tensor(1 / float(d), dtype=torch.float64).float()
        assert is_reciprocal(m) == bool(back == m)
    assert is_reciprocal(torch.tensor(2.0**-9))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "KV cache"),
        ({"transform_config": {"config_groups": {}, "x": 1}}, "transform_config"),
        ({"config_groups": {}}, "which no group names"),
    ],
)
def test_what_is_more_than_codes_is_refused(
    quantize: Quantize, workspace: Workspace, tmp_path: Path, edit: dict[str, object], reason: str
) -> None:
    packed = pack(PackRequest(quantize("int4-sym-g32"), "compressed-tensors"), workspace)[0].path
    odd = foreign(packed, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    config["quantization_config"] |= edit
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError, match=reason):
        pack(PackRequest(str(odd), "gptq"), workspace)


def test_other_codes_and_linears_without_are_refused(quantize: Quantize, workspace: Workspace, tmp_path: Path) -> None:
    packed = pack(PackRequest(quantize("int4-sym-g32"), "compressed-tensors"), workspace)[0].path
    reasons = {
        "model.norm": "does not quantize",
        "lm_head": "scales and no codes",
        "model.embed_tokens": "which is tied to it",
    }
    for name, reason in reasons.items():
        odd = edited(foreign(packed, tmp_path / name), **{f"{name}.weight_scale": torch.ones(24, 2)})
        with pytest.raises(QtoolError, match=reason):
            pack(PackRequest(str(odd), "hf"), workspace)
    plain = foreign(packed, tmp_path / "plain")
    tensors = load_file(plain / "model.safetensors")
    del tensors[f"{NAME}.weight_packed"]
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    with pytest.raises(QtoolError, match="has scales and no codes"):
        pack(PackRequest(str(plain), "gptq"), workspace)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(NAME)}
    save_file(rest, plain / "model.safetensors", {"format": "pt"})
    with pytest.raises(QtoolError, match=f"lacks `{NAME}.weight`, and codes in its place"):
        pack(PackRequest(str(plain), "gptq"), workspace)


@pytest.mark.parametrize(
    ("weights", "layout", "mark", "says"),
    [
        (
            "int4-asym-g32",
            "compressed-tensors",
            f"{NAME}.weight_scale",
            f"codes of `{NAME}`, and lacks `{NAME}.weight_",
        ),
        ("fp8-channel", "compressed-tensors", f"{NAME}.weight_scale", f"codes of `{NAME}`, and lacks `{NAME}.weight_"),
        ("int4-asym-g32", "compressed-tensors", f"{NAME}.weight_zero", f"`{NAME}` is not stored as its config says"),
        ("nvfp4", "compressed-tensors", f"{NAME}.weight_global_scale", f"`{NAME}` is not stored as its config says"),
        ("nvfp4", "modelopt", f"{NAME}.weight_scale_2", f"`{NAME}` is not stored as its config says"),
        ("int4-asym-g32", "gptq-v2", f"{NAME}.scales", f"codes of `{NAME}`, and lacks `{NAME}.scales`"),
        ("int4-asym-g32", "gptq-v2", f"{NAME}.qzeros", f"codes of `{NAME}`, and lacks `{NAME}.qzeros`"),
        ("int4-asym-g32", "awq", f"{NAME}.qweight", "has scales and no codes"),
        ("int4-asym-g32", "awq", "layers.1.input_layernorm", r"lacks `model\.layers\.1\.input_layernorm\.weight`"),
        ("int4-asym-g32", "compressed-tensors", "model.norm", r"lacks `model\.norm\.weight`"),
        ("int4-asym-g32", "compressed-tensors", "embed_tokens", r"lacks `model\.embed_tokens\.weight`"),
    ],
)
def test_a_tensor_that_is_missing_is_named_before_any_work(
    quantize: Quantize,
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: str,
    layout: str,
    mark: str,
    says: str,
) -> None:
    packed = foreign(pack(PackRequest(quantize(weights), layout), workspace)[0].path, tmp_path / "whole")
    tensors = load_file(packed / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if mark not in name}
    assert len(rest) < len(tensors)
    save_file(rest, packed / "model.safetensors", {"format": "pt"})
    if "lacks" in says:  # before files are digested, too
        monkeypatch.setattr("qtool.model.files.digest_file", lambda file: pytest.fail(f"read {file}"))
    with pytest.raises(ArtifactError, match=says):
        pack(PackRequest(str(packed), "hf", tmp_path / "out"), workspace)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", [True, False])
def test_an_adapter_is_not_dropped_on_the_way(
    quantize: Quantize, workspace: Workspace, tmp_path: Path, *, own: bool
) -> None:
    artifact = quantize("int4-sym-g32", "", "rtn+lorc", **{"lorc.rank": "2"})
    packed = pack(PackRequest(artifact, "peft"), workspace)[0].path
    source = packed if own else foreign(packed, tmp_path / "other")
    with pytest.raises(SchemeError, match="a LoRA adapter beside its codes"):
        pack(PackRequest(str(source), "hf"), workspace)


def test_the_same_layout_is_refused(quantize: Quantize, workspace: Workspace) -> None:
    packed = pack(PackRequest(quantize("int4-sym-g32"), "compressed-tensors"), workspace)[0].path
    with pytest.raises(UsageError, match="already"):
        pack(PackRequest(str(packed), "compressed-tensors"), workspace)
