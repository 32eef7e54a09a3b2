"""Quantized heads and embeddings in checkpoints: the library decodes them to what qtool executes, tied or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, GPTNeoXConfig, LlamaConfig

from qtool.builtin.exporters.awq import AWQ
from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.gptq import GPTQ
from qtool.builtin.exporters.hf import HuggingFace
from qtool.builtin.exporters.modelopt import ModelOpt
from qtool.builtin.exporters.packed_source import open_packed
from qtool.consumers.checkpoint import read_checkpoint
from qtool.engine.exporter import Exporter
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, SchemeError
from qtool.plugins import Plugins
from qtool.steps.calibrate import CalibrateRequest, calibrate
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.storage import written_storage
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from qtool.testing.tiny_models import save_tiny_model
from tests.builtin.packed import written
from tests.builtin.test_mixed_checkpoints import SIZES, config_of, executed, measured, tokens

HALF = "int8-sym-token-sfp32-half"
Make = Callable[..., Subject]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Make:
    """Make a quantized subject of a model whose head is tied to its embedding, or not."""
    plugins = Plugins.discover()
    workspace = Workspace(plugins, tmp_path_factory.mktemp("home"), cache)

    @lru_cache
    def source(*, tied: bool) -> str:
        folder = tmp_path_factory.mktemp("model")
        save_tiny_model(folder / "wide", LlamaConfig(**SIZES, tie_word_embeddings=tied))
        module = AutoModelForCausalLM.from_pretrained(folder / "wide", dtype=torch.bfloat16)
        for file in (folder / "wide").iterdir():
            file.rename(folder / file.name)
        module.save_pretrained(folder)
        text = folder / "text.txt"
        text.write_text("".join(chr(97 + i * i % 26) for i in range(400)))
        asked = CalibrateRequest(str(folder), data=str(text), num_samples=4, seq_len=16, gather=("hessian", "absmax"))
        return str(calibrate(asked, workspace)[0].path)

    @lru_cache
    def made(weights: str, activations: str = "", method: str = "rtn", *, tied: bool = False) -> Subject:
        scheme = read_scheme("", {"weights": weights, "activations": activations}, plugins)
        request = MitigateRequest(source(tied=tied), method, scheme, dtype="float32")
        return open_subject(str(mitigate(request, workspace)[0].path), workspace).subject

    return made


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("weights", "activations", "method"),
    [
        ("int4-sym-g32,lm_head=int8-sym-channel", "", "gptq"),
        ("int8-sym-channel,lm_head=int8-sym-channel", f"{HALF},lm_head={HALF}", "rtn"),
        ("none,lm_head=fp8-channel-sbf16", "", "rtn"),
        ("int4-sym-g32,lm_head=int4-sym-g32", "", "gptaq"),
    ],
)
def test_transformers_computes_what_qtool_measures(
    make: Make, tmp_path: Path, weights: str, activations: str, method: str, *, tied: bool
) -> None:
    subject = make(weights, activations, method, tied=tied)
    plain = (
        make(weights.partition(",")[0], activations.partition(",")[0], method, tied=tied)
        if "none" not in weights
        else None
    )
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    torch.testing.assert_close(executed(tmp_path / "out"), measured(subject), rtol=0, atol=2e-6)
    if plain is not None:  # the head makes a difference
        assert (measured(plain) - measured(subject)).abs().max() > 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert sum("lm_head" in group["targets"] for group in config_of(tmp_path / "out")["config_groups"].values()) == 1
    assert "lm_head" not in config_of(tmp_path / "out")["ignore"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(
        stored["model.embed_tokens.weight"].float(), subject.model.tensor("model.embed_tokens.weight").float()
    )
    assert "lm_head.weight_scale" in stored
    storage = written_storage(subject.model, exported.details["bytes"])
    assert sum(storage.model.values()) == sum(tensor.nbytes for tensor in stored.values())
    head = sum(tensor.nbytes for name, tensor in stored.items() if name.startswith("lm_head."))
    assert sum(exported.details["bytes"]["ends"].values()) == head


def test_zero_points_are_decoded_on_loading(make: Make, tmp_path: Path) -> None:
    subject = make("int4-asym-g32,lm_head=int4-asym-g32", tied=True)
    written(CompressedTensors(), subject, tmp_path / "out")
    ours = measured(subject, torch.bfloat16)
    assert (executed(tmp_path / "out", torch.bfloat16) - ours).abs().mean() < 0.001 * ours.abs().mean()


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_read_back_and_decoded(make: Make, tmp_path: Path, cache: Path, *, tied: bool) -> None:
    subject = make("int4-sym-g32,lm_head=int8-sym-channel", "", "gptq", tied=tied)
    written(CompressedTensors(), subject, tmp_path / "packed")
    back = open_packed(tmp_path / "packed", subject.plugins, cache=cache)
    assert back.head is not None
    assert back.scheme.of("lm_head").weights == subject.scheme.of("lm_head").weights
    assert torch.equal(back.packed(back.head).stream, subject.packed(subject.model.graph.head).stream)
    torch.testing.assert_close(measured(back), measured(subject), rtol=0, atol=2e-6)
    for source, name in ((subject, "hf"), (back, "again")):
        written(HuggingFace(), source, tmp_path / name)
    assert torch.equal(executed(tmp_path / "hf"), executed(tmp_path / "again"))


def test_a_head_that_the_library_quantized_as_any_linear_is_read(make: Make, tmp_path: Path, cache: Path) -> None:
    """The config has only the class ``Linear``, and nothing is ignored."""
    subject = make("int8-sym-channel,lm_head=int8-sym-channel", tied=False)
    model = AutoModelForCausalLM.from_pretrained(subject.model.path, dtype=torch.bfloat16)
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        quantization_status=QuantizationStatus.INITIALIZED,
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight_scale.data = (module.weight.data.float().abs().amax(1, keepdim=True) / 127.5).bfloat16()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "theirs")
    compressor.update_config(tmp_path / "theirs")
    back = open_packed(tmp_path / "theirs", subject.plugins, cache=cache)
    assert back.head is not None
    torch.testing.assert_close(measured(back), executed(tmp_path / "theirs"), rtol=0, atol=2e-6)


def by_the_library(directory: Path) -> Tensor:
    """Logits of a checkpoint that is loaded by compressed-tensors into transformers' model, not by transformers."""
    config = AutoConfig.from_pretrained(directory)
    parsed = CompressedTensorsConfig.from_dict(config.quantization_config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    compressor = ModelCompressor.from_compression_config(parsed)
    apply_quantization_config(model, deepcopy(parsed.quantization_config), show_progress=False)
    compressor.compress_model(model)
    stored = load_file(directory / "model.safetensors")
    model.load_state_dict({name: one.float() if one.dtype == torch.bfloat16 else one for name, one in stored.items()})
    with torch.no_grad():
        return torch.cat([model(window[None]).logits for window in tokens()]).double()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("weights", "method", "loads"),
    [
        ("int4-sym-g32,embed_tokens=int8-sym-channel", "gptq", False),
        ("int4-sym-g32,lm_head=int8-sym-channel,embed_tokens=int4-sym-g32", "gptaq", False),
        ("none,embed_tokens=int2-sym-channel", "rtn", False),
        ("int4-sym-g32,embed_tokens=fp8-channel-sbf16", "rtn", True),
    ],
)
def test_the_library_looks_up_what_qtool_does(
    make: Make, tmp_path: Path, cache: Path, weights: str, method: str, *, tied: bool, loads: bool
) -> None:
    subject = make(weights, "", method, tied=tied)
    exported = written(CompressedTensors(), subject, tmp_path / "out")
    ours = measured(subject)
    torch.testing.assert_close(by_the_library(tmp_path / "out"), ours, rtol=0, atol=2e-6)
    assert exported.consumers["transformers"].startswith("refused") != loads
    if loads:
        torch.testing.assert_close(executed(tmp_path / "out"), ours, rtol=0, atol=2e-6)
    else:
        with pytest.raises(AttributeError, match="'Embedding' object has no attribute 'weight'"):
            executed(tmp_path / "out")
    groups = config_of(tmp_path / "out")["config_groups"].values()
    assert sum("Embedding" in group["targets"] for group in groups) == 1
    stored = load_file(tmp_path / "out" / "model.safetensors")
    storage = written_storage(subject.model, exported.details["bytes"])
    assert sum(storage.model.values()) == sum(tensor.nbytes for tensor in stored.values())
    assert ("lm_head.weight" in stored) == ("lm_head" not in weights)
    back = open_packed(tmp_path / "out", subject.plugins, cache=cache)
    torch.testing.assert_close(measured(back), ours, rtol=0, atol=2e-6)
    written(HuggingFace(), back, tmp_path / "hf")
    assert torch.equal(
        load_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"].float(),
        subject.linear(subject.model.graph.embedding)
        .weight(subject.weight_grid(subject.model.graph.embedding))
        .bfloat16(),
    )


def test_an_embedding_of_codes_that_a_head_would_share_is_refused(make: Make, tmp_path: Path, cache: Path) -> None:
    subject = make("int4-sym-g32,embed_tokens=int8-sym-channel", "", "gptq", tied=True)
    written(CompressedTensors(), subject, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    save_file({name: tensor for name, tensor in stored.items() if name != "lm_head.weight"}, file, {"format": "pt"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ArtifactError, match="the head, which is tied to it, has no weights of its own"):
        open_packed(tmp_path / "out", subject.plugins, cache=cache)


@pytest.mark.parametrize("exporter", [GPTQ(), AWQ(), ModelOpt()], ids=lambda one: type(one).__name__)
def test_layouts_without_a_place_for_it_refuse_a_quantized_head(make: Make, exporter: Exporter) -> None:
    subject = make("int4-sym-g32,lm_head=int8-sym-channel,embed_tokens=int8-sym-channel", "", "gptq")
    with pytest.raises(SchemeError, match="head and embedding in 16 bits") as caught:
        exporter.check(subject)
    assert "--to compressed-tensors, or --to hf, which decodes" in str(caught.value)
    assert "without lm_head=SCHEME, model.embed_tokens=SCHEME" in str(caught.value)


@pytest.mark.parametrize("named", [["lm_head"], ["embed_out"], ["re:.*lm_head$"], ["re:.*embed_out$"]])
@pytest.mark.parametrize("files", ["embed_out.", "lm_head."])
def test_the_head_of_gpt_neox_is_read_by_both_its_names(
    tmp_path: Path, cache: Path, named: list[str], files: str
) -> None:
    """Files call it otherwise than transformers, and tools name it after either."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 24, "tie_word_embeddings": False}
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(GPTNeoXConfig(hidden_size=64, intermediate_size=64, **sizes))
    module.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    plugins = Plugins.discover()
    (tmp_path / "home").mkdir()
    workspace = Workspace(plugins, tmp_path / "home", cache)
    scheme = read_scheme("", {"weights": "int4-sym-g32,lm_head=int8-sym-channel"}, plugins)
    artifact, _ = mitigate(MitigateRequest(str(tmp_path / "model"), "rtn", scheme, dtype="float32"), workspace)
    subject = open_subject(str(artifact.path), workspace).subject
    written(CompressedTensors(), subject, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "embed_out.weight_packed" in tensors
    renamed = {name.replace("embed_out.", files): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    of_head = next(group for group in groups if "lm_head" in group["targets"])
    of_head["targets"] = named
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    again = open_packed(tmp_path / "out", plugins, cache=cache)
    assert again.head is not None
    assert torch.equal(again.packed(again.head).stream, subject.packed(again.head).stream)
    heads = [case.head for case in read_checkpoint(tmp_path / "out", lambda name: plugins.format(name).bits)]
    assert heads in (["", "named"], ["unnamed", "unnamed"])  # unnamed: by a pattern of the other name
