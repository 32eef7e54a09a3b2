"""Checkpoints of models with experts, stacked tensors, towers and further heads hold what their loaders look for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qtool.artifacts.manifest import Manifest, Step
from qtool.artifacts.store import ArtifactWriter
from qtool.builtin.exporters import checkpoint, hf
from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.hf import HuggingFace
from qtool.builtin.exporters.shards import Shards
from qtool.engine.execute import BlockExecutable
from qtool.engine.exporter import Exporter
from qtool.engine.planner import extend
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, UsageError
from qtool.model.plan import Plan, Proposal
from qtool.numerics.hadamard import random_signs
from qtool.numerics.operators import Hadamard, Operator
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from tests.builtin.packed import written
from tests.model.conftest import CHANGES, SIZES

WEIGHTS = "model.safetensors"
MTP = {"model.layers.2.eh_proj.weight": (64, 128), "model.layers.2.mlp.gate_proj.weight": (96, 64), "mtp.norm": (64,)}
LARGER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32}
Make = Callable[..., Subject]


def saved(folder: Path, model_type: str, dtype: torch.dtype) -> Path:
    """Save a random model with experts that differ, and whatever else its family's checkpoints hold."""
    torch.manual_seed(1)
    sizes = {**SIZES, **CHANGES[model_type], **LARGER, **(LATENT if model_type == "deepseek_v3" else {})}
    if model_type == "qwen2_vl":
        text = {**CHANGES[model_type]["text_config"], **LARGER}
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [2, 3, 3]}
        vision = {**CHANGES[model_type]["vision_config"], "hidden_size": 64}
        sizes = {"text_config": text, "vision_config": vision}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    loader = "AutoModelForImageTextToText" if model_type == "qwen2_vl" else "AutoModelForCausalLM"
    model = getattr(transformers, loader).from_config(config, dtype=dtype)
    for name, tensor in model.state_dict().items():
        noise = torch.rand(tensor.shape)
        spread = torch.linspace(0.4, 0.8, len(tensor)).reshape(-1, 1, 1) if tensor.ndim == 3 else 0.6
        tensor.copy_(noise + 0.5 if "norm" in name else (noise - 0.5) * spread)
    model.save_pretrained(folder)
    if model_type == "deepseek_v3":
        tensors = load_file(folder / WEIGHTS) | {name: torch.rand(shape) for name, shape in MTP.items()}
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        tensors[name] = torch.rand(tensors[name].shape)  # float32 beside a model in bfloat16, as the real one is
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover()


@pytest.fixture(scope="module")
def make(plugins: Plugins, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Make:
    """Make a subject quantized by rounding to nearest; the same one is made once."""
    workspace = Workspace(plugins, tmp_path_factory.mktemp("home"), cache)

    @lru_cache
    def folder(model_type: str, dtype: torch.dtype) -> Path:
        return saved(tmp_path_factory.mktemp(model_type), model_type, dtype)

    @lru_cache
    def made(
        model_type: str, weights: str = "int4-sym-g32", activations: str = "", *, dtype: torch.dtype = torch.bfloat16
    ) -> Subject:
        parts = (parse_tensor_scheme(text, plugins.format) if text else None for text in (weights, activations))
        request = MitigateRequest(str(folder(model_type, dtype)), "rtn", ModelScheme(*parts), dtype="float32")
        artifact, _ = mitigate(request, workspace)
        return open_subject(str(artifact.path), workspace).subject

    return made


def tokens() -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(5))


def measured(subject: Subject, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=dtype, batch=2)
    return torch.cat([logits for _, logits in executable.forward_windows(tokens())]).double()


def loaded(subject: Subject, directory: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Load a checkpoint as its users do, and let nothing be missing or too much."""
    loader = getattr(transformers, subject.model.family.loader)
    module, report = loader.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    further = {name for name in report.pop("unexpected_keys") if name not in MTP}
    assert not further
    assert not any(report.values()), report
    return module.eval()


def executed(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(input_ids=window[None]).logits for window in tokens()]).double()


def expert_weights(subject: Subject, module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each expert's linears: ours, and what the loaded model multiplies with."""
    graph, scheme = subject.model.graph, subject.scheme.weights
    assert scheme is not None
    assert graph.family.experts is not None
    pairs = {}
    for linear in graph.linears:
        if linear.expert is None:
            continue
        owner = module.get_submodule(f"{graph.block_name(linear.layer)}.{graph.family.experts.module}")
        ours = subject.linear(linear).weight(subject.weight_grid(linear))
        leaf = linear.spec.module.rpartition(".")[2]
        fused = owner.gate_up_proj[linear.expert]
        halves = dict.fromkeys(("w1", "gate_proj"), fused[: len(fused) // 2])
        halves |= dict.fromkeys(("w3", "up_proj"), fused[len(fused) // 2 :])
        theirs = owner.down_proj[linear.expert] if leaf in ("w2", "down_proj") else halves.get(leaf, fused)
        stacked = graph.family.experts.stacked
        pairs[linear.name] = (ours, (theirs.T if stacked else theirs).detach())
    assert len(pairs) >= 12
    return pairs


FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "gpt_neox", "qwen2_vl")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_dequantized_checkpoints_have_the_names_of_the_original_and_load(
    make: Make, tmp_path: Path, model_type: str
) -> None:
    subject = make(model_type)
    written(HuggingFace(), subject, tmp_path / "out")
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in load_file(folder / WEIGHTS).items()}
        for folder in (subject.model.path, tmp_path / "out")
    ]
    assert shapes[0] == shapes[1]
    module = loaded(subject, tmp_path / "out")
    if subject.model.graph.dims.experts:
        assert all(torch.equal(ours.bfloat16(), theirs) for ours, theirs in expert_weights(subject, module).values())
    if model_type != "gpt_oss":  # its attention with sinks runs in another order there
        assert torch.equal(executed(module), measured(subject))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "qwen2_vl"])
def test_packed_checkpoints_have_tensors_for_every_expert_and_load(make: Make, tmp_path: Path, model_type: str) -> None:
    subject = make(model_type)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    stored, original = load_file(tmp_path / "out" / WEIGHTS), load_file(subject.model.path / WEIGHTS)
    quantized = {subject.model.stored_name(f"{linear.name}.weight") for linear in subject.model.graph.linears}
    assert {name.removesuffix("_packed") for name in stored if name.endswith("_packed")} == quantized
    assert {name for name in stored if not name.endswith(("_packed", "_scale", "_shape"))} == set(original) - quantized
    module = loaded(subject, tmp_path / "out")
    if subject.model.graph.dims.experts:
        assert all(torch.equal(ours.bfloat16(), theirs) for ours, theirs in expert_weights(subject, module).values())
        assert "experts are decoded on loading (" in exported.consumers["transformers"]
    assert torch.equal(executed(module), measured(subject))


def test_linears_that_are_not_quantized_are_named(make: Make, tmp_path: Path) -> None:
    expected = {
        "mixtral": {"model.layers.0.block_sparse_moe.gate", "model.layers.1.mlp.gate", "lm_head"},
        "qwen2_moe": {"model.layers.0.mlp.shared_expert_gate", "model.layers.1.mlp.gate", "lm_head"},
        "deepseek_v3": {"model.layers.1.mlp.gate", "model.layers.2.eh_proj", "model.layers.2.mlp.gate_proj"},
        "qwen2_vl": {"visual.blocks.0.attn.qkv", "model.visual.merger.mlp.2", "lm_head"},
    }
    for model_type, names in expected.items():
        written(CompressedTensors(), make(model_type), tmp_path / model_type)
        config = json.loads((tmp_path / model_type / "config.json").read_text())
        ignored = config["quantization_config"]["ignore"]
        assert names <= set(ignored)
        assert not [name for name in ignored if "experts" in name or "k_proj" in name]


@pytest.mark.parametrize(
    ("weights", "activations", "readable", "vllm"),
    [
        ("int3-sym-g32", "", True, "W3A16: activations are not quantized; the kernel `humming`"),
        ("int8-sym-channel", "", True, "W8A16"),
        ("int4-sym-g32", "int8-sym-token", True, "refused: it has experts in INT4 with INT8 activations"),
        ("int4-sym-g32", "int4-sym-token", True, "refused: experts with packed weights"),
        ("fp8-tensor", "", True, "refused: experts in FP8 have FP8 activations"),
        ("fp8-channel-sbf16", "fp8-token", True, "W8A8"),
        ("mxfp4", "", True, "W4A4 from SM100 on"),
        ("nvfp4", "", False, "W4A16"),
        ("int8-sym-channel", "int8-sym-token", False, "W8A8"),
        ("int4-asym-g32", "", False, "W4A16"),
    ],
)
def test_what_transformers_makes_of_experts_is_said(
    make: Make, tmp_path: Path, weights: str, activations: str, readable: bool, vllm: str
) -> None:
    subject = make("qwen3_moe", weights, activations)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    said = exported.consumers["transformers"]
    assert said.startswith("cannot be read: ") != readable
    assert ("their activations NOT quantized" in said) == (readable and bool(activations))
    assert exported.consumers["vllm"].startswith(vllm)
    try:
        module = loaded(subject, tmp_path / "out")
    except RuntimeError:
        assert not readable
        return
    pairs = expert_weights(subject, module).values()
    scaled = {"fp8-tensor": torch.float32}.get(weights, torch.bfloat16)
    fits = all(torch.equal(ours.to(scaled).bfloat16(), theirs) for ours, theirs in pairs)
    assert fits == readable


def test_a_checkpoint_that_transformers_misreads_is_not_measured_with_it(
    make: Make, plugins: Plugins, tmp_path: Path, cache: Path
) -> None:
    subject, workspace = make("qwen3_moe", "nvfp4"), Workspace(plugins, tmp_path, cache)
    assert subject.quantized is not None
    packed, _ = pack(PackRequest(str(subject.quantized.path), "compressed-tensors"), workspace)
    with pytest.raises(UsageError, match="transformers does not read it") as refused:
        evaluate(EvalRequest(str(packed.path), perplexity=("speeches",)), workspace)
    assert "experts without their global scales" in str(refused.value.facts)


@pytest.mark.parametrize("exporter", [HuggingFace(), CompressedTensors()])
def test_what_is_left_alone_is_copied_and_what_is_kept_wide_stays_so(
    make: Make, tmp_path: Path, exporter: Exporter
) -> None:
    subject = make("deepseek_v3")
    exported = written(exporter, subject, tmp_path / "out")
    assert list(exported.details["left_alone"].values()) == [len(MTP)]
    stored, original = load_file(tmp_path / "out" / WEIGHTS), load_file(subject.model.path / WEIGHTS)
    for name in (*MTP, "model.layers.1.mlp.gate.e_score_correction_bias"):
        assert stored[name].dtype == torch.float32
        assert torch.equal(stored[name], original[name])
    assert stored["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


def test_what_loaders_keep_in_float32_is_written_so_from_a_wide_model_too(make: Make, tmp_path: Path) -> None:
    subject = make("deepseek_v3", dtype=torch.float32)
    written(HuggingFace(), subject, tmp_path / "out")
    stored = load_file(tmp_path / "out" / WEIGHTS)
    wide = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert wide == {*MTP, "model.layers.1.mlp.gate.e_score_correction_bias"}


def test_towers_are_copied_and_what_writes_the_residual_is_rotated(make: Make, tmp_path: Path) -> None:
    subject = rotated(make("qwen2_vl"))
    written(HuggingFace(), subject, tmp_path / "out")
    stored, original = load_file(tmp_path / "out" / WEIGHTS), load_file(subject.model.path / WEIGHTS)
    writer = "visual.merger.mlp.2."
    tower = [name for name in original if name.startswith("visual.") and not name.startswith(writer)]
    assert all(torch.equal(stored[name], original[name]) for name in tower)
    (rotation,) = subject.plan.at("residual").operators
    expected = rotation.weight_out(original[f"{writer}weight"].double())
    assert torch.equal(stored[f"{writer}weight"], expected.bfloat16())
    assert not torch.equal(stored[f"{writer}bias"], original[f"{writer}bias"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["torch_dtype"] == config["torch_dtype"] == "bfloat16"


def rotated(subject: Subject, *, online: bool = False) -> Subject:
    """Return the subject with a rotation of the residual, and perhaps with one in front of the experts."""
    dims = subject.model.graph.dims
    signs = random_signs(dims.hidden, torch.Generator().manual_seed(2))
    proposal: dict[str, list[Operator]] = {"residual": [Hadamard(dims.hidden, signs=signs)]}
    for layer in range(dims.num_layers) if online else ():
        proposal[f"layers.{layer}.mlp_in"] = [Hadamard(dims.hidden)]
        for site in subject.model.graph.of_kind("up_down", layer):
            proposal[site.id] = [Hadamard(site.dim)]
    return replace(subject, plan=extend(Plan(), Proposal(proposal), subject.model.graph, method="test"))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_online_operators_are_undone_in_experts_and_routers(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_type: str
) -> None:
    """Stored in float32 instead of 16 bits, the folder computes the same function, routing included."""
    monkeypatch.setattr(hf, "_dtype", lambda _: torch.float32)
    subject = make(model_type, dtype=torch.float32)
    subject = rotated(subject, online=True)
    assert subject.plan.at("layers.1.mlp_in").online
    written(HuggingFace(), subject, tmp_path / "out")
    ours = measured(subject, torch.float32)
    torch.testing.assert_close(executed(loaded(subject, tmp_path / "out", torch.float32)), ours, rtol=0, atol=2e-4)
    assert (ours - measured(replace(subject, plan=Plan()), torch.float32)).abs().mean() > 0.01


def test_float8_models_become_checkpoints_like_any_other(plugins: Plugins, tmp_path: Path, cache: Path) -> None:
    folder = saved(tmp_path / "model", "qwen3_moe", torch.bfloat16)
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        codes = (tensors[name].float() * 400).to(torch.float8_e4m3fn)
        scale = torch.full((-(-codes.shape[0] // 32), codes.shape[1] // 32), 1 / 512)
        tensors |= {name: codes, f"{name}_scale_inv": scale}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (folder / "config.json").write_text(json.dumps(config))
    scheme = ModelScheme(parse_tensor_scheme("int8-sym-channel", plugins.format))
    workspace = Workspace(plugins, tmp_path, cache)
    artifact, _ = mitigate(MitigateRequest(str(folder), "rtn", scheme, dtype="float32"), workspace)
    subject = open_subject(str(artifact.path), workspace).subject
    written(HuggingFace(), subject, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not [name for name in load_file(tmp_path / "out" / WEIGHTS) if "scale" in name]
    assert torch.equal(executed(loaded(subject, tmp_path / "out")), measured(subject))


@pytest.mark.parametrize(
    ("exporter", "model_type", "name"),
    [
        (HuggingFace(), "gpt_oss", "model.layers.1.mlp.experts.gate_up_proj"),
        (HuggingFace(), "mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight"),
        (CompressedTensors(), "mixtral", "model.layers.0.block_sparse_moe.experts.1.w2.weight_packed"),
    ],
)
def test_one_wrong_value_in_one_expert_is_found(
    make: Make, tmp_path: Path, exporter: Exporter, model_type: str, name: str
) -> None:
    subject = make(model_type)
    written(exporter, subject, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, tmp_path / "out" / WEIGHTS, {"format": "pt"})
    expert = 2 if model_type == "gpt_oss" or "w3" in name else 1
    with pytest.raises(ArtifactError, match=rf"experts\.{expert}\.\w+` that was written is not"):
        exporter.verify(subject, tmp_path / "out")
    del tensors[name]
    save_file(tensors, tmp_path / "out" / WEIGHTS, {"format": "pt"})
    with pytest.raises(ArtifactError, match=f"does not fit .* `{name}"):
        exporter.verify(subject, tmp_path / "out")


def test_experts_of_one_tensor_are_refused_by_name(make: Make) -> None:
    with pytest.raises(UsageError, match="no layout for one tensor of all experts") as refused:
        CompressedTensors().check(make("gpt_oss"))
    assert ("family", "gpt-oss") in refused.value.facts
    assert "--to hf" in refused.value.hint


@pytest.mark.parametrize("odd", ["gate_proj", ""])
def test_global_scales_are_shared_inside_an_expert_only(make: Make, tmp_path: Path, odd: str) -> None:
    subject = make("qwen3_moe", "nvfp4")
    assert subject.quantized is not None
    tensors = {name: subject.quantized.tensor(name) for name in subject.quantized.names()}
    expert = "model.layers.1.mlp.experts.2"
    scales = {tensors[f"model.layers.1.mlp.experts.{e}.up_proj.global_scale"].item() for e in range(3)}
    assert len(scales) == 3
    for leaf in (odd,) if odd else ("gate_proj", "up_proj"):
        tensors[f"{expert}.{leaf}.global_scale"] = tensors[f"{expert}.{leaf}.global_scale"] * 2
    manifest = Manifest("quantized", Step("test", "", 1, "test"), {}, subject.model.id, "x", subject.scheme.to_json())
    writer = ArtifactWriter(tmp_path / "odd.safetensors", manifest)
    writer.begin()
    writer.add("all", tensors)
    subject = replace(subject, quantized=writer.finish(manifest))
    if not odd:
        return CompressedTensors().check(subject)
    with pytest.raises(UsageError, match="different global scales") as refused:
        CompressedTensors().check(subject)
    assert ("linear", f"{expert}.up_proj") in refused.value.facts
    return None


def test_shards_hold_every_expert_once(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    subject = make("deepseek_v3")
    written(HuggingFace(), subject, tmp_path / "one")
    monkeypatch.setattr(checkpoint, "Shards", lambda folder: Shards(folder, limit=60_000))
    monkeypatch.setattr(checkpoint, "BATCH_BYTES", 10_000)
    written(HuggingFace(), subject, tmp_path / "many")
    parts = [load_file(file) for file in sorted((tmp_path / "many").glob("*.safetensors"))]
    whole = load_file(tmp_path / "one" / WEIGHTS)
    assert len(parts) > 2
    assert sum(map(len, parts)) == len(whole)
    assert all(torch.equal(tensor, whole[name]) for part in parts for name, tensor in part.items())
    assert torch.equal(executed(loaded(subject, tmp_path / "many")), executed(loaded(subject, tmp_path / "one")))
