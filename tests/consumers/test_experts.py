"""What consumers do with the experts of checkpoints, which have kernels and loaders of their own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.consumers.known import (
    AWQ,
    FP8,
    FP8_BLOCK,
    FP8_BLOCKS,
    FP8_GROUP,
    FP8_MIXED,
    FP8_STATIC,
    FP8_TENSOR,
    FP8_TENSOR_TOKEN,
    GPTQ,
    GPUS,
    INT8_ASYM,
    MODELOPT,
    MXFP4,
    MXFP4_G128,
    MXFP4_TOKEN,
    MXFP4_WEIGHTS,
    MXFP6,
    MXFP8,
    NO_SCHEME,
    NONE_TYPE,
    NVFP4,
    PER_ROW,
    STATIC_W8A8,
    W3A16,
    W3A16_ROWS,
    W4A4,
    W4A8,
    W4A16,
    W4AFP8,
    W8A8,
    W8A16,
    W8A16_FP8,
    Config,
    asked,
)

NO_WNA16 = "No WNA16 MoE backend supports the deployment configuration"
NO_MOE = "Unsupported FusedMoe scheme"
ISSUES = "We encountered some issues during automatic conversion of the weights"


@pytest.mark.parametrize(
    ("config", "consumer", "devices", "verdict", "ends", "message"),
    [
        (MXFP4_WEIGHTS, "vllm", ("sm80", "sm89"), "loads", "W4A16", ""),
        (MXFP4, "vllm", ("sm90",), "executes-other", "emulation; experts W4A16", ""),
        (FP8_BLOCKS, "vllm", ("sm89",), "unknown", "these linears in fp8 e4m3", ""),
        (MXFP4, "vllm", ("sm100",), "loads", "W4A4, whatever the config says of activations", ""),
        (MXFP4_G128, "vllm", ("sm90",), "loads", "the kernel `humming` only", ""),
        (MXFP4_TOKEN, "vllm", ("sm89",), "executes-other", "`humming` only; experts W4A16", ""),
        (MXFP4_TOKEN, "vllm", ("sm100",), "executes-other", "with FP8 activations in groups, of 32 or 128", ""),
        (NVFP4, "vllm", ("sm90",), "executes-other", "W4A16, unless --linear-backend emulation is given", ""),
        (NVFP4, "vllm", ("sm100",), "loads", "W4A4", ""),
        (MXFP8, "vllm", ("sm90",), "executes-other", "W8A16", ""),
        (FP8, "vllm", ("sm89", "sm90", "sm100"), "loads", "W8A8: dynamic FP8 activations per token", ""),
        (FP8_TENSOR, "vllm", ("sm89", "sm90", "sm100"), "executes-other", "; experts W8A16", ""),
        (FP8_TENSOR, "vllm", ("sm75", "sm80"), "executes-other", "W8A16", ""),
        (FP8_STATIC, "vllm", ("sm89", "sm90"), "loads", "W8A8: static FP8 activations per tensor", ""),
        (FP8_MIXED, "vllm", ("sm90",), "refuses", "and inputs per tensor, or blocks", ""),
        (FP8_TENSOR_TOKEN, "vllm", ("sm90",), "refuses", "and inputs per tensor, or blocks", ""),
        (W8A8, "vllm", GPUS[:-1], "loads", "W8A8: dynamic INT8 activations per token", ""),
        (W8A8, "vllm", GPUS[-1:], "refuses", "W8A8 with --linear-backend triton", "Int8 not supported on SM"),
        (STATIC_W8A8, "vllm", GPUS, "refuses", "have a scale a row, and inputs per token", ""),
        (None, "vllm", ("cpu",), "loads", "weights in bfloat16", ""),
        (W4A16, "vllm", ("cpu",), "refuses", "in INT4 on CPUs with AMX only", NO_WNA16),
        (GPTQ, "vllm", ("cpu",), "refuses", "in INT4 on CPUs with AMX only", NO_WNA16),
        (AWQ, "vllm", ("cpu",), "refuses", "in INT4 on CPUs with AMX only", NO_WNA16),
        (W4A8, "vllm", ("cpu",), "refuses", "on CPUs of ARM only", "No W4A8 Int8 MoE backend supports the deploymen"
         "t configuration"),
        (W4A4, "vllm", ("cpu",), "refuses", "INT8 activations per token, or activations in 16 bits", NO_MOE),
        (W8A8, "vllm", ("cpu",), "refuses", "in INT8 on CPUs with AMX only", "No Int8 MoE backend supports the depl"
         "oyment configuration"),
        (STATIC_W8A8, "vllm", ("cpu",), "refuses", "experts in INT8 have a scale a row, and inputs per token", ""),
        (FP8, "vllm", ("cpu",), "refuses", "blocks only, on CPUs with AMX", "Unsupported FP8 MoE backend: NONE"),
        (FP8_MIXED, "vllm", ("cpu",), "refuses", "and inputs per tensor, or blocks", ""),
        (PER_ROW, "vllm", ("cpu",), "refuses", "a scale an output row from modelopt", ""),
        (W4A16, "vllm", GPUS, "loads", "W4A16: activations are not quantized", ""),
        (W3A16, "vllm", GPUS, "loads", "the kernel `humming` only", ""),
        (W3A16_ROWS, "vllm", ("sm80", "sm100"), "refuses", "with a scale a row are INT4 or symmetric INT8", ""),
        (INT8_ASYM, "vllm", ("sm75", "sm89"), "refuses", "with a scale a row are INT4 or symmetric INT8", ""),
        (W8A16, "vllm", ("sm75", "sm80", "sm89", "sm100"), "loads", "W8A16: activations are not quantized", ""),
        (W8A16, "vllm", ("sm90",), "refuses", "experts on SM90, Humming, is for groups", ""),
        (W4A8, "vllm", GPUS, "refuses", "INT8 activations on CPUs of ARM only", "W4A8 Int8 MoE is only supported"
         " on CPU platforms"),
        (W4A4, "vllm", GPUS, "refuses", "experts with packed weights have activations in 16 bits", ""),
        (FP8_BLOCK, "vllm", ("sm75", "sm80"), "executes-other", "W8A16", ""),
        (FP8_BLOCK, "vllm", ("sm89",), "executes-other", "--linear-backend triton; experts W8A8", ""),
        (FP8_BLOCK, "vllm", ("sm90", "sm100"), "loads", "W8A8: dynamic FP8 activations per group of 128", ""),
        (W4A16, "sglang", GPUS[1:], "loads", "W4A16: activations are not quantized", ""),
        (NVFP4, "sglang", ("sm90",), "executes-other", "W4A16, with a warning", ""),
        (NVFP4, "sglang", ("sm100",), "loads", "W4A4, unless --fp4-gemm-backend marlin is given", ""),
        (MODELOPT, "sglang", ("sm100",), "loads", "W4A4, unless --fp4-gemm-backend marlin is given", ""),
        (MODELOPT | {"quant_algo": "W4A16_NVFP4"}, "sglang", ("sm80", "sm90"), "loads", "are not quantized", ""),
        (FP8, "sglang", ("sm89", "sm90", "sm100"), "loads", "W8A8: dynamic FP8 activations per token", ""),
        (FP8, "sglang", ("sm80",), "refuses", "experts in FP8 from SM89 on", "type fp8e4nv not supported in this "
         "architecture"),
        (FP8_BLOCK, "sglang", ("sm90",), "loads", "W8A8: dynamic FP8 activations per group of 128", ""),
        (FP8_MIXED, "sglang", ("sm90",), "refuses", "and inputs per tensor, or blocks", ""),
        (W8A16_FP8, "sglang", GPUS[1:], "refuses", "experts in FP8 have FP8 activations", NONE_TYPE),
        (W8A8, "sglang", GPUS[1:], "refuses", "no experts in INT8 with INT8 activations", "The W8A8Int8 Fused MoE sch"
         "eme is implemented only for NPU for now."),
        (STATIC_W8A8, "sglang", GPUS[1:], "refuses", "no experts in INT8 with INT8 activations", NO_MOE),
        (MXFP4, "sglang", GPUS[1:], "refuses", "it reads MXFP4 of experts only", NO_SCHEME + "."),
        (GPTQ, "sglang", GPUS[1:], "loads", "W4A16: activations are not quantized", ""),
        (AWQ, "sglang", GPUS[1:], "loads", "W4A16: activations are not quantized", ""),
        (GPTQ, "sglang", ("cpu",), "executes-other", "though the config has activations in 16 bits", ""),
        (MXFP4_WEIGHTS, "transformers", ("any",), "loads", "; experts are decoded on loading", ""),
        (MXFP6, "transformers", ("any",), "executes-other", "on loading and their activations NOT quantized", ""),
        (MXFP8, "transformers", ("any",), "refuses", "no decoder for experts in MXFP8", ISSUES),
        (FP8, "transformers", ("any",), "executes-other", "on loading and their activations NOT quantized", ""),
        (FP8_BLOCK, "transformers", ("any",), "refuses", "with a scale a row or a tensor only", ISSUES),
        (FP8_GROUP, "transformers", ("any",), "refuses", "with a scale a row or a tensor only", ISSUES),
        (NVFP4, "transformers", ("any",), "executes-other", "without their global scales, and says nothing", ""),
    ],
)  # fmt: skip
def test_what_becomes_of_experts(
    config: Config | None, consumer: str, devices: Sequence[str], verdict: str, ends: str, message: str
) -> None:
    for device in devices:
        found = asked(config, consumer, device, experts=True)
        assert (found.verdict, found.says[-len(ends) :], found.message) == (verdict, ends, message), device


@pytest.mark.parametrize(
    ("config", "verdict"), [(MXFP4, "executes-other"), (W4AFP8, "unknown"), (W4A8, "unknown"), (W4A16, "loads")]
)
def test_sglang_treats_experts_alone_unlike_other_linears(config: Config, verdict: str) -> None:
    assert asked(config, "sglang", "sm90", experts=True, alone=True).verdict == verdict
    others = "loads" if verdict == "loads" else "refuses"
    assert asked(config, "sglang", "sm90", experts=True).verdict == others
