"""Configs of checkpoints that the tests of answers name, and what a consumer answers to one."""

from __future__ import annotations

from typing import Any, TypeAlias

from qtool.consumers.config import cases_of
from qtool.consumers.table import Answer, answer

Config: TypeAlias = dict[str, Any]
NO_BITS = "Only num_bits in (8) are supported"
NO_SCHEME = "No compressed-tensors compatible scheme was found"
NONE_TYPE = "'NoneType' object has no attribute 'num_bits'"
GPUS = ("sm75", "sm80", "sm89", "sm90", "sm100")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


def arguments(text: str) -> Config | None:
    """Read ``int4-asym-group64-dynamic`` as arguments of compressed-tensors."""
    if not text:
        return None
    element, symmetric, strategy, dynamic = text.split("-")
    kind, bits = element[:-1], int(element[-1])
    name = strategy.rstrip("0123456789")
    size = strategy.removeprefix(name)
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric == "sym",
        "strategy": name,
        "group_size": int(size) if size else None,
        **({"block_structure": [128, 128]} if name == "block" else {}),
        "dynamic": {"dynamic": True, "static": False, "local": "local"}[dynamic],
    }


def compressed(layout: str, weights: str, inputs: str = "", cache: str = "", outputs: str = "") -> Config:
    ends = {"input_activations": arguments(inputs), "output_activations": arguments(outputs)}
    group = {"targets": ["Linear"], "weights": arguments(weights), **ends}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "kv_cache_scheme": arguments(cache),
    }


def asked(config: Config | None, consumer: str, device: str, **about: Any) -> Answer:  # noqa: ANN401 - fields
    return answer(cases_of(config, **{"dtype": "bfloat16"} | about), consumer, device)


W4A4 = compressed("pack-quantized", "int4-sym-channel-static", "int4-sym-token-dynamic")
NVFP4 = compressed("nvfp4-pack-quantized", "float4-sym-tensor_group16-static", "float4-sym-tensor_group16-local")
FP8 = compressed("float-quantized", "float8-sym-channel-static", "float8-sym-token-dynamic")
FP8_TENSOR = compressed("float-quantized", "float8-sym-tensor-static", "float8-sym-tensor-dynamic")
FP8_BLOCK = compressed("float-quantized", "float8-sym-block-static", "float8-sym-group128-dynamic")
MXFP4 = compressed("mxfp4-pack-quantized", "float4-sym-group32-static", "float4-sym-group32-dynamic")
STATIC_W8A8 = compressed("int-quantized", "int8-sym-channel-static", "int8-sym-tensor-static")
STATIC_ASYMMETRIC = compressed("int-quantized", "int8-sym-channel-static", "int8-asym-tensor-static")
CACHED = compressed("pack-quantized", "int4-sym-group64-static", cache="float8-sym-tensor-static")
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
LIBRARY_W4A4 = compressed("int-quantized", "int4-sym-channel-static", "int4-sym-token-dynamic")
FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
NO_FORMAT = compressed("", "int4-sym-group64-static")
CACHED_STATIC = compressed("pack-quantized", "int4-sym-group64-static", cache="float8-sym-tensor-static")
INTEGER_CACHE = compressed("pack-quantized", "int4-sym-group64-static", cache="int8-sym-tensor-static")
MODELOPT_FP8 = {"quant_method": "modelopt", "quant_algo": "FP8"}
W8A16 = compressed("pack-quantized", "int8-sym-channel-static")
W4A16 = compressed("pack-quantized", "int4-sym-group64-static")
MXFP8 = compressed("mxfp8-quantized", "float8-sym-group32-static", "float8-sym-group32-dynamic")
MXFP8_WEIGHTS = compressed("mxfp8-quantized", "float8-sym-group32-static")
MXFP6 = compressed("mxfp6-pack-quantized", "float6-sym-group32-static", "float8-sym-group32-dynamic")
FP8_BLOCK_WEIGHTS = compressed("float-quantized", "float8-sym-block-static")
FP8_STATIC = compressed("float-quantized", "float8-sym-tensor-static", "float8-sym-tensor-static")
TENSOR_W8A8 = compressed("int-quantized", "int8-sym-tensor-static", "int8-sym-tensor-static")
GROUPED_W8A8 = compressed("int-quantized", "int8-sym-channel-static", "int8-sym-group32-dynamic")
HEAD_CACHE = compressed("pack-quantized", "int4-sym-group64-static", cache="float8-sym-group32-dynamic")
STATIC_HEADS = compressed("pack-quantized", "int4-sym-group64-static", cache="float8-sym-attn_head-static")
INTEGER_HEADS = compressed("pack-quantized", "int4-sym-group64-static", cache="int8-sym-attn_head-static")
MXFP4_WEIGHTS = compressed("mxfp4-pack-quantized", "float4-sym-group32-static")
MXFP4_TOKEN = compressed("mxfp4-pack-quantized", "float4-sym-group32-static", "float8-sym-token-dynamic")
MXFP4_TENSOR = compressed("mxfp4-pack-quantized", "float4-sym-group32-static", "float8-sym-tensor-dynamic")
MXFP4_G64 = compressed("mxfp4-pack-quantized", "float4-sym-group32-static", "float8-sym-group64-dynamic")
MXFP4_G128 = compressed("mxfp4-pack-quantized", "float4-sym-group32-static", "float8-sym-group128-dynamic")
MXFP8_TOKEN = compressed("mxfp8-quantized", "float8-sym-group32-static", "float8-sym-token-dynamic")
NVFP4_WEIGHTS = compressed("nvfp4-pack-quantized", "float4-sym-tensor_group16-static")
FP8_GROUP = compressed("float-quantized", "float8-sym-group128-static")
FP8_GROUP_TOKEN = compressed("float-quantized", "float8-sym-group128-static", "float8-sym-token-dynamic")
FP8_MIXED = compressed("float-quantized", "float8-sym-channel-static", "float8-sym-tensor-dynamic")
FP8_MIXED_STATIC = compressed("float-quantized", "float8-sym-channel-static", "float8-sym-tensor-static")
FP8_TENSOR_TOKEN = compressed("float-quantized", "float8-sym-tensor-static", "float8-sym-token-dynamic")
W8A16_FP8 = compressed("float-quantized", "float8-sym-channel-static")
W8A8 = compressed("int-quantized", "int8-sym-channel-static", "int8-sym-token-dynamic")
W4A8 = compressed("pack-quantized", "int4-sym-group64-static", "int8-sym-token-dynamic")
W4AFP8 = compressed("pack-quantized", "int4-sym-group128-static", "float8-sym-token-dynamic")
W8AFP8 = compressed("pack-quantized", "int8-sym-channel-static", "float8-sym-token-dynamic")
W4A4_ASYM = compressed("pack-quantized", "int4-sym-channel-static", "int4-asym-token-dynamic")
W3A16 = compressed("pack-quantized", "int3-sym-group64-static")
W3A16_ROWS = compressed("pack-quantized", "int3-sym-channel-static")
INT4_G16 = compressed("pack-quantized", "int4-sym-group16-static")
INT8_ASYM = compressed("pack-quantized", "int8-asym-channel-static")
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
PER_ROW = {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
TOKEN_CACHE = compressed("pack-quantized", "int4-sym-group64-static", cache="float8-sym-token-dynamic")
ATTENTION = compressed("pack-quantized", "int4-sym-group64-static", cache="float8-sym-tensor-static")
ATTENTION["config_groups"]["group_1"] = {
    "targets": ["LlamaAttention"],
    "weights": None,
    "input_activations": arguments("float8-sym-tensor-static"),
}
TURNED, TURNED_CACHE, TURNED_STORED = (
    compressed("pack-quantized", "int4-sym-group64-static", cache=cache)
    | {
        "transform_config": {
            "config_groups": {
                "hadamard_0": {"type": kind, "apply": [{"location": "q_attn"}, {"location": "k_cache"}]},
            }
        }
    }
    for kind, cache in (("hadamard", ""), ("hadamard", "float8-sym-tensor-static"), ("random-hadamard", ""))
)
ASYMMETRIC_CACHE = compressed("pack-quantized", "int4-sym-group64-static", cache="int8-asym-tensor-static")
