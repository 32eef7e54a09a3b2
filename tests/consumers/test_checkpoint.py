"""What a checkpoint is, is read from its config and the heads of its files, whoever wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qtool.artifacts.manifest import Manifest, Step
from qtool.consumers.case import Case
from qtool.consumers.checkpoint import read_checkpoint
from qtool.consumers.table import answer
from qtool.errors import ArtifactError, ConsumerError, UsageError
from qtool.plugins import Plugins
from qtool.steps.consumers import examine_checkpoint, require_as_meant
from qtool.steps.schemes import read_scheme

NAME = "model.layers.0.mlp.up_proj"
EXPERT = "model.layers.0.mlp.experts.0.up_proj"
# As llm-compressor writes W8A8, auto-round GPTQ, AutoAWQ its own, ModelOpt FP8: keys in other orders and with more.
BY_OTHERS: dict[str, Any] = {
    "llm-compressor": {
        "config_groups": {
            "group_0": {
                "format": "int-quantized",
                "input_activations": {
                    "actorder": None, "block_structure": None, "dynamic": True, "group_size": None, "num_bits": 8,
                    "observer": None, "observer_kwargs": {}, "strategy": "token", "symmetric": True, "type": "int",
                },
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
                    "observer": "minmax", "observer_kwargs": {}, "strategy": "channel", "symmetric": True,
                    "type": "int",
                },
            }
        },
        "format": "int-quantized", "global_compression_ratio": None, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
        "transform_config": {}, "version": "0.12.2",
    },
    "auto-round": {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "damp_percent": 0.01, "desc_act": False,
        "true_sequential": False, "autoround_version": "0.8", "iters": 200,
    },
    "AutoAWQ": {
        "bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
        "zero_point": True,
    },
    "AutoAWQ, older": {"w_bit": 4, "q_group_size": 128, "quant_method": "awq", "version": "GEMM", "zero_point": True},
    "DeepSeek": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
    "ModelOpt": {"quant_method": "modelopt", "quant_algo": "nvfp4", "kv_cache_quant_algo": "FP8", "ignore": []},
}  # fmt: skip
INT8 = {"type": "int", "bits": 8, "strategy": "channel"}
FOUR = {"type": "int", "bits": 4, "strategy": "group", "group_size": 128}
FP4 = {"type": "float", "bits": 4, "strategy": "tensor_group", "group_size": 16}
READ = {
    "llm-compressor": Case("compressed-tensors", "int-quantized", **INT8, inputs="dynamic", input_bits=8,
                           input_type="int", input_strategy="token"),
    "auto-round": Case("gptq", "gptq", **FOUR),
    "AutoAWQ": Case("awq", "gemm", **FOUR, symmetric=False),
    "AutoAWQ, older": Case("awq", "gemm", **FOUR, symmetric=False),
    "DeepSeek": Case("fp8", "e4m3", bits=8, strategy="block", group_size=128, block="128x128", inputs="dynamic",
                     input_bits=8, input_type="float", input_strategy="group", input_group_size=128),
    "ModelOpt": Case("modelopt", "NVFP4", **FP4, inputs="local", input_bits=4, input_type="float",
                     input_strategy="tensor_group", cache="static", cache_format="fp8", cache_strategy="tensor"),
}  # fmt: skip
STORED = {"compressed-tensors": "weight_scale", "gptq": "qweight", "awq": "qweight", "modelopt": "weight_scale"}
STORED["fp8"] = "weight_scale_inv"


def bits_of(name: str) -> int:
    return Plugins.discover().format(name).bits


def checkpoint(folder: Path, config: Any, *names: str, **tensors: Tensor) -> Path:  # noqa: ANN401 - JSON
    """Write a folder with a config of no family and tensors, `names` of which are one float16 each."""
    folder.mkdir(exist_ok=True)
    whole = {"model_type": "some", "torch_dtype": "bfloat16"}
    whole |= {} if config is None else {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(whole))
    held = {name: torch.ones(1, dtype=torch.float16) for name in names}
    if held or tensors:
        save_file(held | tensors, folder / "model.safetensors")
    return folder


def preset(**groups: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def test_a_preset_with_its_linears_is_written_out_and_no_more_is_known(tmp_path: Path) -> None:
    config = preset(W4A16=["re:.*up_proj$"], w8a8=["re:.*k_proj$"])
    folder = checkpoint(tmp_path, config, f"{NAME}.weight_packed", "model.layers.0.self_attn.k_proj.weight_scale")
    four, eight = read_checkpoint(folder, bits_of)
    assert (four.bits, four.type, four.strategy, four.group_size, four.inputs) == (4, "int", "group", 128, "none")
    assert (eight.bits, eight.strategy, eight.inputs, eight.input_strategy) == (8, "channel", "dynamic", "token")
    found = answer([four], "vllm", "sm90")
    assert found.verdict == "unknown"
    assert "`config_groups: W4A16, w8a8`" in found.says


@pytest.mark.parametrize("maker", BY_OTHERS)
def test_configs_of_other_tools_are_read(tmp_path: Path, maker: str) -> None:
    config = BY_OTHERS[maker]
    folder = checkpoint(tmp_path, config, f"{NAME}.{STORED[config['quant_method']]}")
    (case,) = read_checkpoint(folder, bits_of)
    scale = "fp16" if STORED[config["quant_method"]] == "weight_scale" else ""
    assert (case.dtype, case.scale) == ("bfloat16", scale)
    assert {**vars(case), "dtype": "", "scale": ""} == vars(READ[maker])


@pytest.mark.parametrize(
    ("pattern", "apart"),
    [
        (r"+:.*\.up_proj$", True),
        (r"+:.*\.(?:gate_proj|up_proj)$", True),
        (r"+:.*\.(?:gate_proj|up_proj|gate_up_proj)$", False),
        (r"-:.*\.up_proj$", True),
        (r"+:.*\.down_proj$", False),
        (r"+:up_proj", False),
    ],
)
def test_rules_of_gptq_that_split_what_engines_fuse_are_seen(tmp_path: Path, pattern: str, apart: bool) -> None:
    config = {**BY_OTHERS["auto-round"], "dynamic": {pattern: {} if pattern[0] == "-" else {"group_size": 32}}}
    names = [f"model.layers.0.mlp.{name}.qweight" for name in ("up_proj", "gate_proj", "down_proj")]
    found = read_checkpoint(checkpoint(tmp_path, config, *names), bits_of)
    assert {one.apart for one in found} == {apart}
    assert [one.group_size for one in found] == [128, *([] if pattern[0] == "-" else [32])]
    assert answer(found, "vllm", "cpu").verdict == ("refuses" if apart else "loads")


def test_experts_and_scales_come_from_the_heads_of_files(tmp_path: Path) -> None:
    config = BY_OTHERS["llm-compressor"]
    scale = {f"{EXPERT}.weight_scale": torch.ones(2, 1)}
    (case,) = read_checkpoint(checkpoint(tmp_path, config, **scale), bits_of)
    assert case.experts
    assert case.scale == "fp32"
    (plain,) = read_checkpoint(checkpoint(tmp_path / "plain", None, "model.norm.weight"), bits_of)
    assert (plain.method, plain.bits, plain.experts) == ("dense", 16, False)


def test_experts_count_where_they_are_quantized(tmp_path: Path) -> None:
    config = BY_OTHERS["llm-compressor"]
    stored, kept = ".weight_scale", ".weight"
    held = {
        "alone": (EXPERT + stored, NAME + kept),
        "left": (NAME + stored, EXPERT + kept),
        "all": (NAME + stored, EXPERT + stored),
    }
    found = {}
    for name, tensors in held.items():
        (case,) = read_checkpoint(checkpoint(tmp_path / name, config, *tensors), bits_of)
        found[name] = (case.experts, case.alone)
    assert found == {"alone": (True, True), "left": (False, False), "all": (True, False)}


def of_artifact(folder: Path, config: Any, weights: str, activations: str) -> Path:  # noqa: ANN401 - JSON
    """Write a checkpoint as qtool does of an artifact of several schemes."""
    scheme = read_scheme("", {"weights": weights, "activations": activations}, Plugins.discover())
    path = checkpoint(folder, config, f"{NAME}.weight_scale" if config else f"{NAME}.weight")
    manifest = Manifest("checkpoint", Step("pack", "", 1, "test"), {}, "model", "llama", scheme.to_json())
    (path / "qtool.json").write_text(manifest.to_text())
    return path


def group(bits: int, size: int, inputs: int, target: str) -> Any:  # noqa: ANN401 - JSON
    weights = {"num_bits": bits, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": size} if size > 0 else {"strategy": "channel"}
    dynamic = {"num_bits": inputs, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    return {"targets": [target], "weights": weights, "input_activations": dynamic if inputs else None}


MIXED = (
    "int4-sym-g64-sfp32,down_proj=int8-sym-channel,up_proj=int4-sym-g32",
    "int4-sym-token-half,down_proj=int8-sym-token-full,up_proj=none",
)


def test_each_kind_of_linears_has_the_scales_and_ranges_of_its_own_scheme(tmp_path: Path) -> None:
    groups = {"a": group(4, 64, 4, "q_proj"), "b": group(8, -1, 8, "down_proj"), "c": group(4, 32, 0, "up_proj")}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    found = read_checkpoint(of_artifact(tmp_path / "ct", config, *MIXED), bits_of)
    assert [(one.scale, one.range_rule) for one in found] == [("fp32", "half"), ("bf16", "full"), ("bf16", "")]
    said = answer(found, "transformers", "any").says
    assert said.count("fp32 scales are rounded") == said.count("range is `half` instead of `full`") == 1
    dense = read_checkpoint(of_artifact(tmp_path / "dense", None, *MIXED), bits_of)
    assert {one.bits for one in dense} == {4, 8}
    assert {one.lost for one in dense} == {" (without the int4 and int8 activations of the artifact)"}


def test_a_config_beside_the_config_is_read(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, None, f"{NAME}.weight_scale")
    config = {"producer": {}, "quantization": {"quant_algo": "W4A16_NVFP4", "exclude_modules": ["lm_head"]}}
    (folder / "hf_quant_config.json").write_text(json.dumps(config))
    (case,) = read_checkpoint(folder, bits_of)
    assert (case.method, case.layout, case.inputs) == ("modelopt", "W4A16_NVFP4", "none")


def test_a_gguf_file_has_a_case_for_each_type_of_blocks(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "some.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 32), dtype=np.float16))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(32, dtype=np.float32))
    writer.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((2, 32), dtype=np.float32))
    for name, kind in (("up", "Q4_0"), ("down", "Q6_K"), ("gate", "IQ4_XS"), ("odd", "Q8_K")):
        rows = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
        data = np.zeros((2, rows), dtype=np.uint8)
        writer.add_tensor(f"blk.0.ffn_{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for path in (tmp_path / "some.gguf", tmp_path):
        four, six, fourth, eight = read_checkpoint(path, bits_of)
        assert four == Case("gguf", "Q4_0", bits=4, dtype="float16")
        assert (six.layout, six.bits) == ("Q6_K", 6)
        assert (fourth.layout, fourth.bits) == ("IQ4_XS", 4)
        assert (eight.layout, eight.bits) == ("Q8_K", 8)
    _, answer = examine_checkpoint(tmp_path, Plugins.discover(), consumer="llama.cpp")
    assert answer is not None
    assert answer.says == "unknown: no rule speaks of these linears in gguf Q8_K"


@pytest.mark.parametrize(
    ("config", "names", "says"),
    [
        ([1], (NAME,), "cannot understand the `quantization_config`"),
        ({"quant_method": "gptq", "bits": 4}, (f"{NAME}.qweight",), "cannot understand the `quantization_config`"),
        ({"quant_method": "gptq", "bits": "four", "group_size": 8}, (f"{NAME}.qweight",), "cannot understand"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, (NAME,), "cannot understand"),
        (BY_OTHERS["auto-round"], (f"{NAME}.weight",), "the config says `gptq`, and no tensor is stored so"),
        (BY_OTHERS["auto-round"], (), "holds no weights"),
        (preset(W5A5=["Linear"]), (f"{NAME}.weight_packed",), "no preset with the names of its linears"),
        (preset(W4A16="Linear"), (f"{NAME}.weight_packed",), "no preset with the names of its linears"),
        ({**preset(), "config_groups": ["W4A16"]}, (f"{NAME}.weight_packed",), "cannot understand `config_groups`"),
    ],
)
def test_what_cannot_be_understood_is_said(tmp_path: Path, config: Any, names: tuple[str, ...], says: str) -> None:  # noqa: ANN401
    with pytest.raises(ArtifactError, match=says) as refused:
        read_checkpoint(checkpoint(tmp_path, config, *names), bits_of)
    assert refused.value.hint


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "nowhere", bits_of)
    with pytest.raises(ArtifactError, match=r"neither config\.json nor a GGUF file"):
        read_checkpoint(tmp_path, bits_of)
    (tmp_path / "some.gguf").write_bytes(b"GGUF but not much")
    with pytest.raises(ArtifactError, match="cannot read the head"):
        read_checkpoint(tmp_path, bits_of)
    folder = checkpoint(tmp_path / "cut", BY_OTHERS["auto-round"])
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ArtifactError, match="cannot read the head"):
        read_checkpoint(folder, bits_of)
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot read"):
        read_checkpoint(folder, bits_of)


@pytest.mark.parametrize(
    ("name", "file", "says"),
    [
        (f"{NAME}.weight", "model-00002-of-00002.safetensors", "files that are not there"),
        ("model.norm.weight", "model-00001-of-00002.safetensors", "tensors that are not there"),
    ],
)
def test_a_download_that_is_not_complete_is_no_checkpoint(tmp_path: Path, name: str, file: str, says: str) -> None:
    folder = checkpoint(tmp_path / "model", None, f"{NAME}.weight")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {f"{NAME}.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_checkpoint(folder, bits_of)
    index["weight_map"] |= {name: file}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=says):
        read_checkpoint(folder, bits_of)


def test_an_adapter_is_left_out_by_what_loads_the_folder(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base", BY_OTHERS["llm-compressor"], f"{NAME}.weight_scale")
    assert answer(read_checkpoint(folder, bits_of), "transformers", "any").verdict == "loads"
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    cases = read_checkpoint(folder, bits_of)
    told = [
        answer(cases, name, device) for name, device in (("transformers", "any"), ("vllm", "sm90"), ("vllm", "cpu"))
    ]
    assert {one.verdict for one in told} == {"executes-other"}
    assert all("the adapter" in one.says for one in told)
    assert answer(cases, "sglang", "sm90").says == "unknown: no rule speaks of adapter"


def test_a_capability_between_two_known_ones_is_the_lower(tmp_path: Path) -> None:
    codes, scale = torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 1).to(torch.float8_e4m3fn)
    linear = {f"{NAME}.weight": codes, f"{NAME}.weight_scale": scale, f"{NAME}.weight_scale_2": torch.ones(())}
    config = {**BY_OTHERS["ModelOpt"], "kv_cache_quant_algo": None}
    folder, plugins = checkpoint(tmp_path, config, **linear), Plugins.discover()
    told = {}
    for device in ("sm86", "sm88", "sm100", "sm120", "sm60", "cpu"):
        _, answer = examine_checkpoint(folder, plugins, consumer="vllm", device=device)
        assert answer is not None
        assert answer.device == device
        told[device] = answer.verdict
    assert told == {
        "sm86": "executes-other", "sm88": "executes-other", "sm100": "loads", "sm120": "loads", "sm60": "unknown",
        "cpu": "refuses",
    }  # fmt: skip
    with pytest.raises(UsageError, match="no device called `hopper`"):
        examine_checkpoint(folder, plugins, consumer="vllm", device="hopper")


def test_what_is_not_as_meant_is_an_error_of_its_own(tmp_path: Path) -> None:
    config = {**BY_OTHERS["auto-round"], "sym": False}
    linear = {f"{NAME}.qweight": torch.zeros(16, 4, dtype=torch.int32), f"{NAME}.scales": torch.ones(1, 4)}
    folder, plugins = checkpoint(tmp_path, config, **linear), Plugins.discover()
    _, answer = examine_checkpoint(folder, plugins, consumer="vllm", device="sm90")
    assert answer is not None
    with pytest.raises(ConsumerError) as refused:
        require_as_meant(folder, answer)
    assert str(refused.value).splitlines() == [
        "vllm on sm90: will not load",
        "  why      refused: it wants symmetric weights of 4 or 8 bits",
        "  message  Unsupported quantization config: bits=4, sym=False",
        "  vllm     0.33, code read",
        f"hint: qtool doctor {folder} shows all consumers",
    ]
    assert refused.value.exit_code == 8
    _, fine = examine_checkpoint(folder, plugins, consumer="transformers")
    assert fine is not None
    require_as_meant(folder, fine)
