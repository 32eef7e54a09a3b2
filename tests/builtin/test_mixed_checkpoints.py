"""Checkpoints whose linears differ in scheme: readers are told which has which, and compute what qtool measures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

from qtool.builtin.exporters.awq import AWQ
from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.gguf import FILE, GGUF, GGUFHalf
from qtool.builtin.exporters.gptq import GPTQ, GPTQv2
from qtool.builtin.exporters.hf import HuggingFace
from qtool.builtin.exporters.mixed import fused_apart
from qtool.builtin.exporters.modelopt import ModelOpt
from qtool.builtin.exporters.packed_source import open_packed
from qtool.consumers.checkpoint import read_checkpoint
from qtool.consumers.table import answer
from qtool.engine.execute import BlockExecutable
from qtool.engine.exporter import Exporter
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, SchemeError, UsageError
from qtool.plugins import Plugins
from qtool.steps.calibrate import CalibrateRequest, calibrate
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from qtool.testing.tiny_models import save_tiny_model
from tests.builtin.packed import written

SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 260},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64},
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "half": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=2, tie_word_embeddings=False),
}
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
Make = Callable[..., Subject]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Make:
    """Make a subject rounded to nearest; the same one is made once."""
    plugins = Plugins.discover()
    workspace = Workspace(plugins, tmp_path_factory.mktemp("home"), cache)

    @lru_cache
    def model(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        save_tiny_model(folder / "wide", CONFIGS[name])
        dtype = torch.float16 if name == "half" else torch.bfloat16
        module = AutoModelForCausalLM.from_pretrained(folder / "wide", dtype=dtype)
        for file in (folder / "wide").iterdir():
            file.rename(folder / file.name)
        module.save_pretrained(folder)
        alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
        tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, [("a", "b")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        return folder

    @lru_cache
    def statistics(name: str) -> Path:
        text = tmp_path_factory.mktemp("text") / "text.txt"
        text.write_text("".join(chr(97 + i * i % 26) for i in range(400)))
        request = CalibrateRequest(str(model(name)), data=str(text), num_samples=2, seq_len=16, gather=("absmax",))
        return calibrate(request, workspace)[0].path

    @lru_cache
    def made(weights: str, activations: str = "", *, name: str = "llama") -> Subject:
        scheme = read_scheme("", {"weights": weights, "activations": activations}, plugins)
        source = str(statistics(name) if "nvfp4" in activations or "static" in activations else model(name))
        artifact, _ = mitigate(MitigateRequest(source, "rtn", scheme, dtype="float32"), workspace)
        return open_subject(str(artifact.path), workspace).subject

    return made


def config_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return found


def tokens() -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(5))


def measured(subject: Subject, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of qtool's own fake-quantized forward pass."""
    executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=dtype, batch=2)
    return torch.cat([logits for _, logits in executable.forward_windows(tokens())]).double()


def executed(directory: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of the checkpoint as transformers loads it."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.no_grad():
        return torch.cat([model(window[None]).logits for window in tokens()]).double()


def names(*kinds: str, layers: tuple[int, ...] = (0, 1)) -> set[str]:
    return {f"model.layers.{layer}.{kind}" for layer in layers for kind in KINDS if kind.rpartition(".")[2] in kinds}


class TestCompressedTensors:
    @pytest.mark.parametrize(
        ("weights", "activations", "layout"),
        [
            ("int4-sym-g32,down_proj=int8-sym-channel,layers.0.self_attn=none", "", "pack-quantized"),
            ("int4-sym-g32,down_proj=fp8-channel-sbf16,layers.1.self_attn=int3-sym-g16", "", "mixed-precision"),
            ("none,o_proj=int4-sym-g32,down_proj=int8-sym-channel", "", "pack-quantized"),
            (
                "int4-sym-g32,down_proj=int8-sym-channel,layers.1.mlp.down_proj=none",
                "int4-asym-token-sfp32,down_proj=int8-sym-token-sfp32-half",
                "mixed-precision",
            ),
            ("int8-sym-channel,o_proj=int4-sym-g32", "none,o_proj=int4-asym-token-sfp32", "pack-quantized"),
        ],
    )
    def test_transformers_computes_what_qtool_measures(
        self, make: Make, tmp_path: Path, weights: str, activations: str, layout: str
    ) -> None:
        subject = make(weights, activations)
        exported = written(CompressedTensors(), subject, tmp_path / "out")
        torch.testing.assert_close(executed(tmp_path / "out"), measured(subject), rtol=0, atol=2e-6)
        assert exported.details["layout"] == config_of(tmp_path / "out")["format"] == layout
        assert "one linear there" not in exported.consumers["vllm"]

    def test_what_is_decoded_to_bfloat16_computes_the_same_in_bfloat16(self, make: Make, tmp_path: Path) -> None:
        subject = make("nvfp4,down_proj=mxfp4,layers.0.mlp=int4-sym-g32")
        exported = written(CompressedTensors(), subject, tmp_path / "out")
        ours = measured(subject, torch.bfloat16)
        assert (executed(tmp_path / "out", torch.bfloat16) - ours).abs().mean() < 0.001 * ours.abs().mean()
        assert exported.details["layout"] == "mixed-precision"

    def test_transformers_does_not_read_zero_points_beside_another_scheme(self, make: Make, tmp_path: Path) -> None:
        subject = make("int4-sym-g32,down_proj=int4-asym-g32,layers.0.self_attn=int8-sym-g32")
        exported = written(CompressedTensors(), subject, tmp_path / "out")
        assert exported.consumers["transformers"].startswith("cannot be read: beside zero points")
        assert exported.consumers["vllm"].startswith("8 linears")
        with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
            executed(tmp_path / "out", torch.bfloat16)

    def test_each_linear_is_named_by_one_group_or_ignored(self, make: Make, tmp_path: Path) -> None:
        subject = make("int4-sym-g32,down_proj=int8-sym-channel,layers.0.self_attn=none")
        exported = written(CompressedTensors(), subject, tmp_path / "out")
        config = config_of(tmp_path / "out")
        four, eight = (set(group["targets"]) for group in config["config_groups"].values())
        assert four == names("gate_proj", "up_proj") | names(*(k[10:] for k in KINDS[:4]), layers=(1,))
        assert eight == names("down_proj")
        assert [g["weights"]["num_bits"] for g in config["config_groups"].values()] == [4, 8]
        assert set(config["ignore"]) == {"lm_head"} | names(*(k[10:] for k in KINDS[:4]), layers=(0,))
        stored = load_file(tmp_path / "out" / "model.safetensors")
        kept = subject.model.tensor("model.layers.0.self_attn.q_proj.weight")
        assert torch.equal(stored["model.layers.0.self_attn.q_proj.weight"], kept)
        linears = {name: tensor.nbytes for name, tensor in stored.items() if "_proj." in name}
        assert exported.details["bytes"]["linears"] == sum(linears.values())  # type: ignore[index]
        assert exported.consumers["transformers"].startswith("8 linears (gate_proj, up_proj, q_proj")
        assert "; 2 linears (down_proj): W8A16" in exported.consumers["transformers"]

    def test_a_group_that_is_said_to_be_another_is_seen(self, make: Make, tmp_path: Path) -> None:
        subject = make("int4-sym-g32,down_proj=int8-sym-channel,layers.0.self_attn=none")
        written(CompressedTensors(), subject, tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        one, other = config["quantization_config"]["config_groups"].values()
        one["weights"], other["weights"] = other["weights"], one["weights"]
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ArtifactError):
            CompressedTensors().verify(subject, tmp_path / "out")

    @pytest.mark.parametrize(
        ("exception", "fused"),
        [("q_proj=int8", "k_proj"), ("v_proj=none", "v_proj"), ("layers.1.mlp.up_proj=int8", "up_proj")],
    )
    def test_vllm_refuses_fused_linears_that_differ(
        self, make: Make, tmp_path: Path, exception: str, fused: str
    ) -> None:
        subject = make(f"int4-sym-g32,{exception}")
        exported = written(CompressedTensors(), subject, tmp_path / "out")
        assert exported.consumers["vllm"].startswith("refused: q, k and v, and gate and up, are one linear there")
        assert fused in fused_apart(subject)
        torch.testing.assert_close(executed(tmp_path / "out"), measured(subject), rtol=0, atol=2e-6)

    @pytest.mark.parametrize(
        ("weights", "activations", "nearest"),
        [
            ("int4-sym-g32,down_proj=int4-asym-g32-real", "", "--weights int4-asym-g32-sbf16"),
            ("int4-sym-g32", "int8-sym-token,down_proj=int8-asym-token-real", "--activations int8-asym-token-sbf16"),
        ],
    )
    def test_real_zero_points_of_an_exception_are_refused(
        self, make: Make, weights: str, activations: str, nearest: str
    ) -> None:
        with pytest.raises(SchemeError, match="whole numbers") as refused:
            CompressedTensors().check(make(weights, activations))
        assert refused.value.hint == f"nearest that fits: {nearest}"

    def test_scales_of_two_dtypes_are_refused(self, make: Make) -> None:
        with pytest.raises(SchemeError, match=r"scales of two(.|\n)*hint: nearest that fits: .*-sbf16 for"):
            CompressedTensors().check(make("nvfp4,down_proj=int8-sym-channel-sfp16", name="half"))

    def test_experts_have_one_scheme_that_need_not_be_that_of_attention(self, make: Make, tmp_path: Path) -> None:
        subject = make("int4-sym-g32,experts=int8-sym-g32", name="mixtral")
        exported = written(CompressedTensors(), subject, tmp_path / "out")
        ours = measured(subject, torch.bfloat16)
        assert (executed(tmp_path / "out", torch.bfloat16) - ours).abs().mean() < 0.001 * ours.abs().mean()
        assert "12 linears (w1, w3, w2): W8A16" in exported.consumers["transformers"]
        for text in ("int4-sym-g32,experts.1=int8-sym-g32", "int4-sym-g32,experts.0=none"):
            with pytest.raises(SchemeError, match=r"one scheme for all experts(.|\n)*experts=int8"):
                CompressedTensors().check(make(text, name="mixtral"))


class TestGPTQ:
    @pytest.mark.parametrize("exporter", [GPTQ(), GPTQv2()])
    def test_rules_say_what_linears_are(self, make: Make, tmp_path: Path, exporter: Exporter) -> None:
        text = "int4-sym-g32-sfp16,down_proj=int8-sym-channel-sfp16,layers.0.self_attn=none,layers.1.mlp.[gu]*=int8-g64"
        subject = make(text)
        exported = written(exporter, subject, tmp_path / "out")  # which decodes linears by the rules
        config = config_of(tmp_path / "out")
        rules = config["dynamic"]

        def said(name: str) -> object:
            """What a reader makes of a name: the first rule that matches, as GPTQModel's and vLLM's do."""
            for pattern, choices in rules.items():
                if re.match(pattern[2:], name):
                    return choices if pattern.startswith("+:") else "16 bits"
            return {name: config[name] for name in ("bits", "group_size", "sym")}

        four, eight = {"bits": 4, "group_size": 32, "sym": True}, {"bits": 8, "group_size": -1, "sym": True}
        for name in (*names("down_proj"), *(f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1))):
            assert said(name) == eight
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"):
            assert said(f"model.layers.0.self_attn.{kind}") == "16 bits"
            assert said(f"model.layers.1.self_attn.{kind}") == four
        for kind in ("gate_proj", "up_proj", "gate_up_proj"):
            assert said(f"model.layers.1.mlp.{kind}") == {"bits": 8, "group_size": 64, "sym": True}
            assert said(f"model.layers.0.mlp.{kind}") == four
            assert said(f"model.layers.11.mlp.{kind}") == four
        assert "2 linears (down_proj): W8A16" in exported.consumers["vllm"]
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert stored["model.layers.1.mlp.down_proj.qweight"].shape == (128 * 8 // 32, 64)
        assert stored["model.layers.1.self_attn.o_proj.qweight"].shape == (128 * 4 // 32, 64)
        assert "model.layers.0.self_attn.q_proj.weight" in stored

    def test_a_rule_that_is_lost_is_seen(self, make: Make, tmp_path: Path) -> None:
        subject = make("int4-sym-g32-sfp16,down_proj=int8-sym-channel-sfp16")
        written(GPTQ(), subject, tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        del config["quantization_config"]["dynamic"]
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ArtifactError):
            GPTQ().verify(subject, tmp_path / "out")

    def test_an_exception_that_the_layout_has_no_codes_for_is_refused(self, make: Make) -> None:
        with pytest.raises(SchemeError, match=r"codes of 2, 3, 4, 8 bits(.|\n)*int8-sym-g32-sfp16"):
            GPTQ().check(make("int4-sym-g32-sfp16,down_proj=int5-sym-g32-sfp16"))


class TestOneSchemeOnly:
    def test_linears_in_16_bits_are_named_for_awq(self, make: Make, tmp_path: Path) -> None:
        subject = make("int4-asym-g32-sfp16,down_proj=none,layers.1.self_attn.o_proj=none")
        written(AWQ(), subject, tmp_path / "out")
        kept = names("down_proj") | names("o_proj", layers=(1,))
        assert set(config_of(tmp_path / "out")["modules_to_not_convert"]) == {"lm_head"} | kept
        assert "model.layers.0.self_attn.o_proj.qweight" in load_file(tmp_path / "out" / "model.safetensors")

    def test_linears_in_16_bits_are_named_for_modelopt(self, make: Make, tmp_path: Path) -> None:
        subject = make("nvfp4,layers.0=none,down_proj=none")
        exported = written(ModelOpt(), subject, tmp_path / "out")
        kept = names(*(kind.rpartition(".")[2] for kind in KINDS), layers=(0,)) | names("down_proj")
        quantization = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
        assert set(quantization["exclude_modules"]) == {"lm_head"} | kept
        assert set(config_of(tmp_path / "out")["ignore"]) == {"lm_head"} | kept
        assert exported.consumers["vllm"].startswith("W4A16")

    @pytest.mark.parametrize(
        ("exporter", "weights"),
        [
            (AWQ(), "int4-asym-g32-sfp16,down_proj=int4-asym-channel-sfp16"),
        ],
    )
    def test_another_scheme_is_refused_and_the_nearest_named(
        self, make: Make, exporter: Exporter, weights: str
    ) -> None:
        with pytest.raises(SchemeError, match=r"one scheme(.|\n)*0.mlp.down_proj(.|\n)*,down_proj=none, or pack"):
            exporter.check(make(weights))


MIXTURES = {
    "W4A4 and W8A8": (
        "nvfp4,down_proj=fp8-channel-sbf16",
        "nvfp4,down_proj=fp8-token",
        {"down_proj": "FP8_PER_CHANNEL_PER_TOKEN"},
    ),
    "W4A4 and W4A16": ("nvfp4", "nvfp4,o_proj=none", {"o_proj": "W4A16_NVFP4"}),
    "calibrated W8A8": (
        "nvfp4,down_proj=fp8-tensor,o_proj=fp8-tensor-sbf16",
        "nvfp4,down_proj=fp8-tensor-static,o_proj=fp8-tensor-static",
        {"down_proj": "FP8", "o_proj": "FP8"},
    ),
    "three, and 16 bits": (
        "nvfp4,down_proj=fp8-channel,layers.0.self_attn=none",
        "none,down_proj=fp8-token,layers.1.self_attn.o_proj=nvfp4",
        {"down_proj": "FP8_PER_CHANNEL_PER_TOKEN", "o_proj": "NVFP4"},
    ),
}  # fmt: skip


class TestModelOpt:
    @pytest.mark.parametrize("mixture", MIXTURES)
    def test_each_linear_has_its_own_algorithm(self, make: Make, tmp_path: Path, mixture: str) -> None:
        weights, activations, others = MIXTURES[mixture]
        subject = make(weights, activations)
        exported = written(ModelOpt(), subject, tmp_path / "out")
        most = "W4A16_NVFP4" if activations.startswith("none") else "NVFP4"
        kept = names("q_proj", "k_proj", "v_proj", "o_proj", layers=(0,)) if "none" in weights else set()
        all_names = names(*(kind.rpartition(".")[2] for kind in KINDS)) - kept
        wanted = {name: others.get(name.rpartition(".")[2], most) for name in all_names}
        sized = {
            name: {"quant_algo": one} | ({"group_size": 16} if "FP4" in one else {}) for name, one in wanted.items()
        }
        config = config_of(tmp_path / "out")
        beside = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
        assert config["quant_algo"] == beside["quant_algo"] == "MIXED_PRECISION"
        assert config["quantized_layers"] == beside["quantized_layers"] == sized
        assert set(config["ignore"]) == set(beside["exclude_modules"]) == {"lm_head"} | kept
        assert {name for group in config["config_groups"].values() for name in group["targets"]} == all_names
        stored = load_file(tmp_path / "out" / "model.safetensors")
        for name, one in wanted.items():
            leaves = {key.removeprefix(f"{name}.") for key in stored if key.startswith(f"{name}.")}
            four = {"weight", "weight_scale", "weight_scale_2"}
            plain = {"weight", "weight_scale"}
            expected = {"NVFP4": {*four, "input_scale"}, "W4A16_NVFP4": four, "FP8": {*plain, "input_scale"}}
            assert leaves == expected.get(one, plain), name
            rows, columns = stored[f"{name}.weight"].shape
            assert stored[f"{name}.weight"].dtype == (torch.uint8 if "FP4" in one else torch.float8_e4m3fn)
            scale = stored[f"{name}.weight_scale"].shape
            assert scale == ((rows, columns // 8) if "FP4" in one else () if one == "FP8" else (rows,))
        assert re.search(r"\d+ linears \(.*W4A", exported.consumers["vllm"])
        if "fp8" in activations:
            how = (
                "static FP8 activations per tensor" if "static" in activations else "dynamic FP8 activations per token"
            )
            assert how in exported.consumers["vllm"]
        assert exported.details["layout"] == "modelopt MIXED_PRECISION"

    @pytest.mark.parametrize("mixture", MIXTURES)
    def test_doctor_knows_what_was_written(self, make: Make, tmp_path: Path, mixture: str) -> None:
        weights, activations, others = MIXTURES[mixture]
        written(ModelOpt(), make(weights, activations), tmp_path / "out")
        cases = read_checkpoint(tmp_path / "out", lambda _: 0)
        most = "W4A16_NVFP4" if activations.startswith("none") else "NVFP4"
        assert {case.layout for case in cases} == {most, *others.values()}
        assert all(case.beside and case.apart == False for case in cases)  # noqa: E712 - a value, not a truth
        by = {case.layout: case for case in cases}
        assert by["NVFP4"].inputs == "local"
        assert by.get("W4A16_NVFP4", by["NVFP4"]).input_bits in (4, 16)
        if "W4A16_NVFP4" in by:
            assert by["W4A16_NVFP4"].inputs == "none"
        found = answer(cases, "vllm", "sm100")
        assert found.verdict == "loads"
        rows = "FP8_PER_CHANNEL_PER_TOKEN" in by  # which it takes for 16 bits beside others
        assert answer(cases, "sglang", "sm100").verdict == ("executes-other" if rows else "loads")

    def test_linears_that_engines_fuse_have_one_algorithm(self, make: Make, tmp_path: Path) -> None:
        subject = make("nvfp4,q_proj=fp8-channel", "nvfp4")
        with pytest.raises(SchemeError, match="go with FP8 inputs"):
            ModelOpt().check(subject)
        subject = make("nvfp4,layers.0.self_attn.v_proj=none,down_proj=fp8-channel", "nvfp4,down_proj=fp8-token")
        exported = written(ModelOpt(), subject, tmp_path / "out")
        assert exported.consumers["vllm"].startswith("refused: q, k and v")
        cases = read_checkpoint(tmp_path / "out", lambda _: 0)
        assert answer(cases, "vllm", "sm90").verdict == "refuses"

    def test_a_damaged_map_is_found(self, make: Make, tmp_path: Path) -> None:
        weights, activations, _ = MIXTURES["W4A4 and W8A8"]
        subject = make(weights, activations)
        written(ModelOpt(), subject, tmp_path / "out")
        path = tmp_path / "out" / "hf_quant_config.json"
        said = json.loads(path.read_text())
        said["quantization"]["quantized_layers"].popitem()
        path.write_text(json.dumps(said))
        with pytest.raises(ArtifactError, match="say another `quantized_layers`"):
            ModelOpt().verify(subject, tmp_path / "out")

    @pytest.mark.parametrize("name", ["llama", "mixtral"])
    def test_it_is_read_as_what_it_was_made_of(self, make: Make, tmp_path: Path, cache: Path, name: str) -> None:
        kind = "down_proj" if name == "llama" else "v_proj"
        weights = f"nvfp4,self_attn=fp8-channel-sbf16,{kind}=fp8-channel-sbf16"
        subject = make(weights, f"nvfp4,self_attn=fp8-token,{kind}=fp8-token", name=name)
        written(ModelOpt(), subject, tmp_path / "modelopt")
        packed = open_packed(tmp_path / "modelopt", subject.plugins, cache=cache)
        for linear in subject.linears:
            mine, theirs = subject.scheme.of(linear.name), packed.scheme.of(linear.name)
            assert str(theirs.activations) == str(mine.activations)
            assert str(theirs.weights) == str(mine.weights).replace("bf16", "fp32")
            one, other = subject.linear(linear), packed.linear(linear)
            assert torch.equal(one.codes, other.codes)
            assert torch.equal(one.parameters[0].scale, other.parameters[0].scale)
        for exporter in (HuggingFace(), CompressedTensors()):
            for place, of in (("direct", subject), ("through", packed)):
                written(exporter, of, tmp_path / f"{place} {type(exporter).__name__}")
            first, second = (
                load_file(tmp_path / f"{place} {type(exporter).__name__}" / "model.safetensors")
                for place in ("direct", "through")
            )
            assert first.keys() == second.keys()
            assert all(torch.equal(first[leaf].float(), second[leaf].float()) for leaf in first)

    def test_what_no_map_names_is_not_read(self, make: Make, tmp_path: Path, cache: Path) -> None:
        weights, activations, _ = MIXTURES["W4A4 and W8A8"]
        subject = make(weights, activations)
        written(ModelOpt(), subject, tmp_path / "out")
        path = tmp_path / "out" / "hf_quant_config.json"
        said = json.loads(path.read_text())
        said["quantization"]["quantized_layers"].pop("model.layers.1.mlp.down_proj")
        path.write_text(json.dumps(said))
        with pytest.raises(SchemeError, match="linears whose algorithm it does not say"):
            open_packed(tmp_path / "out", subject.plugins, cache=cache)

    def test_experts_in_fp8_are_refused_beside_others_too(self, make: Make, tmp_path: Path) -> None:
        subject = make("nvfp4,experts=fp8-channel", "nvfp4,experts=fp8-token", name="mixtral")
        with pytest.raises(UsageError, match="no consumer reads experts in FP8"):
            ModelOpt().check(subject)
        subject = make("nvfp4,self_attn=fp8-channel", "nvfp4,self_attn=fp8-token", name="mixtral")
        written(ModelOpt(), subject, tmp_path / "out")
        layers = config_of(tmp_path / "out")["quantized_layers"]
        assert layers["model.layers.0.block_sparse_moe.experts.1.w2"] == {"quant_algo": "NVFP4", "group_size": 16}
        assert layers["model.layers.0.self_attn.o_proj"] == {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}


class TestDequantized:
    def test_dense_weights_hold_everything(self, make: Make, tmp_path: Path) -> None:
        subject = make("int2-g32,q_proj=int8,layers.1=none,layers.1.*.v_proj=nvfp4")
        exported = written(HuggingFace(), subject, tmp_path / "out")
        ours = measured(subject, torch.bfloat16)
        assert torch.equal(executed(tmp_path / "out", torch.bfloat16), ours)
        assert re.match(r"6 linears \(k_proj.*W2A16.*; 1 linears \(", exported.consumers["vllm"])

    def test_types_of_gguf_are_those_of_each_tensor(self, make: Make, tmp_path: Path) -> None:
        weights = "int4-sym-g32-sfp16-signed_full,down_proj=int8-sym-g32-sfp16,o_proj=none"
        subject = make(weights)
        exported = written(GGUF(), subject, tmp_path / "out")
        types = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "out" / FILE).tensors}
        for layer in (0, 1):
            assert types[f"blk.{layer}.ffn_down.weight"] == "Q8_0"
            assert types[f"blk.{layer}.ffn_up.weight"] == types[f"blk.{layer}.attn_q.weight"] == "Q4_0"
            assert types[f"blk.{layer}.attn_output.weight"] == "BF16"
        assert exported.details["layout"] == "Q4_0, Q8_0"
        assert "2 linears (down_proj): W8A16: weights only, as Q8_0" in exported.consumers["llama.cpp"]
        sizes = [one.n_bytes for one in gguf.GGUFReader(tmp_path / "out" / FILE).tensors if one.name.startswith("blk.")]
        norms = 4 * 2 * 2 * SIZES["hidden_size"]
        assert exported.details["bytes"]["linears"] == sum(sizes) - norms  # type: ignore[index]
        written(GGUFHalf(), subject, tmp_path / "half")
        types = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "half" / FILE).tensors}
        assert types["blk.0.attn_output.weight"] == types["blk.0.ffn_down.weight"] == "F16"

    def test_an_exception_that_no_type_holds_is_refused(self, make: Make) -> None:
        with pytest.raises(SchemeError, match="no type for `int3`"):
            GGUF().check(make("int4-sym-g32-sfp16-signed_full,down_proj=int3-sym-g32-sfp16"))
