"""What consumers do with checkpoints is what their code and runs of them say, fact by fact."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import pytest

from qtool.consumers.case import Case
from qtool.consumers.config import cases_of
from qtool.consumers.table import answer, devices_of, said
from qtool.errors import UsageError
from tests.consumers.known import (
    ASYMMETRIC_CACHE,
    ATTENTION,
    AWQ,
    CACHED,
    CACHED_STATIC,
    FP8,
    FP8_BLOCK,
    FP8_BLOCK_WEIGHTS,
    FP8_BLOCKS,
    FP8_GROUP,
    FP8_GROUP_TOKEN,
    FP8_MIXED,
    FP8_MIXED_STATIC,
    FP8_STATIC,
    FP8_TENSOR,
    FP8_TENSOR_TOKEN,
    GPTQ,
    GPUS,
    GROUPED_W8A8,
    HEAD_CACHE,
    INT4_G16,
    INT8_ASYM,
    INTEGER_CACHE,
    INTEGER_HEADS,
    LIBRARY_W4A4,
    MODELOPT,
    MODELOPT_FP8,
    MXFP4,
    MXFP4_G64,
    MXFP4_G128,
    MXFP4_TENSOR,
    MXFP4_TOKEN,
    MXFP4_WEIGHTS,
    MXFP6,
    MXFP8,
    MXFP8_TOKEN,
    MXFP8_WEIGHTS,
    NO_BITS,
    NO_FORMAT,
    NO_SCHEME,
    NONE_TYPE,
    NVFP4,
    PER_ROW,
    STATIC_ASYMMETRIC,
    STATIC_HEADS,
    STATIC_W8A8,
    TENSOR_W8A8,
    TOKEN_CACHE,
    TURNED,
    TURNED_CACHE,
    TURNED_STORED,
    W4A4,
    W4A16,
    W8A8,
    W8A16,
    W8A16_FP8,
    W8AFP8,
    Config,
    arguments,
    asked,
    compressed,
)

STATIC_INT8 = "int8-sym-tensor-static"


@pytest.mark.parametrize(
    ("config", "consumer", "device", "verdict", "says"),
    [
        (W4A4, "vllm", "sm90", "executes-other", "W4A16 on most kernels; W4A4 with --linear-backend humming, which is"),
        (W4A4, "transformers", "any", "loads", "W4A4: dynamic INT4 activations per token, emulated in bfloat16"),
        (W4A4, "sglang", "sm90", "refuses", "refused: integers with quantized activations are INT8 with INT8"),
        (W4A4, "vllm", "cpu", "executes-other", "W4A16: activations are NOT quantized"),
        (LIBRARY_W4A4, "vllm", "sm90", "refuses", "refused: W4A4 has to be `pack-quantized`"),
        (NVFP4, "vllm", "sm90", "executes-other", "W4A16, unless --linear-backend emulation"),
        (NVFP4, "vllm", "sm100", "loads", "W4A4"),
        (NVFP4, "vllm", "cpu", "refuses", "refused: it has no kernel for NVFP4"),
        (NVFP4, "transformers", "any", "loads", "W4A4: dynamic FP4 activations per group of 16, emulated in bfloat16;"),
        (NVFP4, "sglang", "sm89", "executes-other", "W4A16, with a warning"),
        (MXFP4, "sglang", "sm100", "refuses", "refused: it reads MXFP4 of experts only"),
        (MXFP4, "vllm", "sm75", "refuses", "refused: it has MXFP4 from SM80 on"),
        (MXFP4, "vllm", "sm80", "executes-other", "W4A16, unless"),
        (STATIC_W8A8, "sglang", "sm90", "refuses", "refused: linears that it fuses have room for one calibrated"),
        (FP8_BLOCK, "sglang", "sm90", "loads", "W8A8: dynamic FP8 activations per group of 128"),
        (FP8_BLOCK, "sglang", "sm100", "executes-other", "W8A8: dynamic FP8 activations per group of 128; with"),
        (FP8_BLOCK, "sglang", "sm80", "refuses", "refused: before SM89"),
        (CACHED, "sglang", "sm90", "loads", "W4A16: activations are not quantized; FP8 KV cache"),
        (MODELOPT, "sglang", "sm90", "executes-other", "W4A16"),
        (MODELOPT | {"quant_algo": "FP8"}, "sglang", "sm80", "refuses", "refused: it runs FP8 of modelopt from SM89"),
        (FP8, "vllm", "sm80", "executes-other", "W8A16"),
        (FP8, "vllm", "sm89", "loads", "W8A8: dynamic FP8 activations per token"),
        (FP8_TENSOR, "vllm", "sm89", "executes-other", "W8A8: dynamic FP8 activations per token, though the config"),
        (GPTQ, "vllm", "sm80", "loads", "W4A16"),
        ({**GPTQ, "sym": False}, "vllm", "sm80", "refuses", "refused: it wants symmetric weights of 4 or 8 bits"),
        ({**GPTQ, "desc_act": True}, "vllm", "sm80", "refuses", "refused: it has no groups of columns in an order"),
        ({**GPTQ, "desc_act": True, "group_size": -1}, "vllm", "sm80", "loads", "W4A16"),
        ({**GPTQ, "dynamic": {"-:.*gate": {}}}, "vllm", "sm80", "loads", "W4A16"),
        ({**GPTQ, "dynamic": {"+:.*down": {"bits": 8}}}, "vllm", "cpu", "refuses", "refused: it has a kernel for"),
        ({**GPTQ, "dynamic": {"+:.*down": {"group_size": 32}}}, "vllm", "cpu", "loads", "W4A16"),
        ({**GPTQ, "dynamic": {"-:.*gate": {}}}, "sglang", "sm80", "loads", "W4A16: activations are not quantized"),
        ({**GPTQ, "dynamic": {"-:.*gate": {}}}, "sglang", "cpu", "executes-other", "cannot be read: it does not look"),
        ({**GPTQ, "dynamic": {"-:.*gate": {}}}, "transformers", "any", "refuses", "cannot be read: optimum leaves out"),
        ({**GPTQ, "dynamic": {"+:.*": {"act": 8}}}, "vllm", "sm80", "unknown", "unknown: no rule speaks of `dynamic`"),
        ({**GPTQ, "desc_act": True}, "vllm", "cpu", "refuses", "refused: it has no groups of columns in an order"),
        (FP8_BLOCKS, "vllm", "cpu", "refuses", "refused: it has kernels for FP8 in blocks on CPUs with AMX only"),
        (FP8_BLOCKS, "vllm", "sm80", "executes-other", "W8A16"),
        (FP8_BLOCKS, "vllm", "sm90", "executes-other", "W8A8: dynamic FP8 activations per group of 128; with DeepGEMM"),
        (FP8_BLOCKS, "vllm", "sm89", "executes-other", "W8A16"),
        (FP8_BLOCKS, "sglang", "sm90", "unknown", "unknown: no rule speaks of these linears in fp8 e4m3"),
        (FP8_BLOCKS, "transformers", "any", "executes-other", "W8A16 on a CPU and, by the code, before SM89"),
        (FP8_BLOCKS, "llama.cpp", "any", "refuses", "refused: it loads GGUF files only; convert the model"),
        ({"quant_method": "quark"}, "llama.cpp", "any", "refuses", "refused: it loads GGUF files only; convert"),
        (NO_FORMAT, "vllm", "cpu", "refuses", "refused: the config has no `format`"),
        ({**NO_FORMAT, "format": None}, "vllm", "cpu", "refuses", "refused: the config has no `format`"),
        (NO_FORMAT, "transformers", "any", "loads", "W4A16"),
        (CACHED_STATIC, "vllm", "cpu", "executes-other", "W4A16: activations are not quantized; FP8 KV cache with the"),
        (CACHED_STATIC, "vllm", "sm90", "executes-other", "W4A16: activations are not quantized; FP8 KV cache with"),
        (INTEGER_CACHE, "vllm", "cpu", "refuses", "refused: a KV cache is FP8, symmetric, with a scale a tensor"),
        (MODELOPT | {"kv_cache_quant_algo": "FP8"}, "vllm", "sm100", "executes-other", "W4A4; FP8 KV cache with the"),
        (CACHED_STATIC, "transformers", "any", "loads", "W4A16: activations are not quantized, weights are decoded"),
        (MODELOPT_FP8, "vllm", "cpu", "unknown", "unknown: no rule speaks of these linears in modelopt FP8"),
        (W8A16, "vllm", "cpu", "refuses", "refused: it has a kernel for packed integers of 4 bits only"),
        (W8A16, "vllm", "sm80", "loads", "W8A16"),
        (W4A16, "llama.cpp", "any", "refuses", "refused: it loads GGUF files only"),
        (None, "vllm", "sm80", "loads", "W16A16: nothing is quantized"),
        ({"quant_method": "bitsandbytes"}, "vllm", "sm80", "refuses", "refused: it reads bitsandbytes with"),
        ({"quant_method": "quark"}, "vllm", "sm80", "unknown", "unknown: no rule speaks of these linears in quark"),
    ],
)  # fmt: skip
def test_what_is_known(config: Config | None, consumer: str, device: str, verdict: str, says: str) -> None:
    found = asked(config, consumer, device)
    assert (found.verdict, found.says[: len(says)]) == (verdict, says)


BEFORE, NO_INT8 = GPUS[:-1], "Int8 not supported on SM"
NO_SCALES = "_C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 4 argument(s)"
NO_KERNEL = "Failed to find a kernel that can implement the {} linear layer"
NO_STRATEGY = "Invalid strategy for compressed-tensors KV cache"
NO_AMX = "requires AMX tile support (Sapphire Rapids or newer)"
A16 = "W4A16: activations are not quantized"
DECODED = f"{A16}, weights are decoded to bfloat16"
FP8_CACHE, EACH_HEAD = f"{A16}; FP8 KV cache with the ", "with the scale that is stored per head"
NO_BACKEND = "No valid attention backend found"
NO_MODULE = "There is no module or parameter named"
NO_INTEGERS = "Currently supported kv cache quantization is num_bits=8, type=float"


@pytest.mark.parametrize(
    ("config", "consumer", "devices", "verdict", "says", "message"),
    [
        (MXFP8, "vllm", ("sm75", "sm80", "sm89", "sm90"), "executes-other", "W8A16", ""),
        (MXFP8_WEIGHTS, "vllm", ("sm75", "sm80", "sm89", "sm90"), "loads", "W8A16: activations are not quantized", ""),
        (MXFP8, "vllm", ("sm100",), "loads", "W8A8: dynamic FP8 activations per group of 32; W8A16 where", ""),
        (MXFP8_WEIGHTS, "vllm", ("sm100",), "executes-other", "W8A8, whatever the config says of activations; W8", ""),
        (MXFP8, "vllm", ("cpu",), "refuses", "refused: it has no kernel for MXFP8", NO_KERNEL.format("MXFP8")),
        (MXFP8_WEIGHTS, "vllm", ("cpu",), "refuses", "refused: it has no kernel for MXFP8", NO_KERNEL.format("MXFP8")),
        (MXFP8, "sglang", ("sm80", "sm100"), "refuses", "refused: it has no MXFP8 of compressed", NO_SCHEME + "."),
        (MXFP6, "vllm", ("sm75", "sm100", "cpu"), "refuses", "refused: floats of compressed-tensors have", NO_BITS),
        (MXFP6, "sglang", ("sm80", "sm100"), "refuses", "refused: floats of compressed-tensors have", NO_BITS),
        (FP8_BLOCK, "vllm", ("cpu",), "refuses", "refused: it has kernels for FP8 in blocks on CPUs with", NO_AMX),
        (FP8_BLOCK_WEIGHTS, "vllm", ("cpu",), "refuses", "refused: it has no kernel for", NO_KERNEL.format("ScaledMM")),
        (FP8_STATIC, "vllm", ("cpu",), "refuses", "refused: it fails on FP8 weights with one scale", NO_SCALES),
        (GROUPED_W8A8, "vllm", ("cpu",), "refuses", "refused: it wants INT8 activations per token", NO_SCHEME),
        (TENSOR_W8A8, "vllm", ("cpu",), "executes-other", "W8A8: static INT8 activations per tensor; on", ""),
        (STATIC_W8A8, "vllm", ("cpu",), "executes-other", "W8A8: static INT8 activations per tensor; on", ""),
        (STATIC_ASYMMETRIC, "vllm", ("cpu", *BEFORE), "loads", "W8A8: static INT8 activations per tensor, asym", ""),
        (STATIC_ASYMMETRIC, "vllm", ("sm100",), "refuses", "refused: CUTLASS has no INT8 on SM100", ""),
        (STATIC_ASYMMETRIC, "transformers", ("any",), "loads", "W8A8: static INT8 activations per tensor, asym", ""),
        (STATIC_W8A8, "vllm", BEFORE, "loads", "W8A8: static INT8 activations per tensor", ""),
        (STATIC_W8A8, "vllm", ("sm100",), "refuses", "refused: CUTLASS has no INT8 on SM100", NO_INT8),
        (W8A8, "vllm", BEFORE, "loads", "W8A8: dynamic INT8 activations per token", ""),
        (W8A8, "vllm", ("sm100",), "refuses", "refused: CUTLASS has no INT8 on SM100", NO_INT8),
        (HEAD_CACHE, "vllm", ("cpu",), "refuses", "refused: a KV cache is", NO_STRATEGY),
        (TOKEN_CACHE, "vllm", ("cpu",), "refuses", "refused: a KV cache is", NO_STRATEGY),
        (TOKEN_CACHE, "sglang", ("sm80", "sm90"), "executes-other", f"{A16}; the KV cache is NOT quantized", ""),
        (TOKEN_CACHE, "transformers", ("any",), "loads", f"{DECODED}; KV cache in FP8 with a dynamic scale per", ""),
        (STATIC_HEADS, "vllm", ("sm75", "sm80", "sm89"), "refuses", "refused: only its FlashAttention 3", NO_BACKEND),
        (STATIC_HEADS, "vllm", ("sm90", "sm100"), "executes-other", f"{FP8_CACHE}scales that are stored, a head", ""),
        (STATIC_HEADS, "vllm", ("cpu",), "executes-other", f"{FP8_CACHE}largest of the scales of a block's heads", ""),
        (STATIC_HEADS, "sglang", ("sm80", "sm90"), "executes-other", f"{A16}; the KV cache is NOT quantized", ""),
        (STATIC_HEADS, "transformers", ("any",), "loads", f"{DECODED}; KV cache in FP8 {EACH_HEAD}", ""),
        (ATTENTION, "transformers", ("any",), "loads", f"{DECODED}; queries and KV cache in FP8 with the scale", ""),
        (ATTENTION, "vllm", ("sm80", "sm90"), "loads", f"{A16}; FP8 KV cache and, in FlashAttention and Triton,", ""),
        (ATTENTION, "vllm", ("cpu",), "executes-other", f"{FP8_CACHE}scales that are stored, but rounded toward", ""),
        (ATTENTION, "sglang", ("sm90",), "refuses", "refused: it looks for weights in every group of the config", ""),
        (TURNED, "transformers", ("any",), "loads", f"{DECODED}; queries and keys are not rotated, which change", ""),
        (TURNED, "vllm", ("sm90", "cpu"), "loads", f"{A16}; queries and keys are not rotated, which changes not", ""),
        (TURNED, "sglang", ("sm90",), "loads", f"{A16}; queries and keys are not rotated, which changes nothing", ""),
        (TURNED_CACHE, "transformers", ("any",), "executes-other", "cannot be read by from_pretrained alone", ""),
        (TURNED_CACHE, "vllm", ("cpu",), "executes-other", f"{FP8_CACHE}scales that are stored, but rounded tow", ""),
        (TURNED_CACHE, "sglang", ("sm90",), "executes-other", f"{A16}; FP8 KV cache; queries and keys are NOT r", ""),
        (TURNED_STORED, "vllm", ("sm90", "cpu"), "refuses", "refused: it has no place for the matrix", NO_MODULE),
        (ASYMMETRIC_CACHE, "transformers", ("any",), "loads", f"{DECODED}; KV cache in INT8 with the scale that", ""),
        (ASYMMETRIC_CACHE, "vllm", ("sm90",), "refuses", "refused: a KV cache is FP8", ""),
        (ASYMMETRIC_CACHE, "vllm", ("cpu",), "refuses", "refused: a KV cache is FP8", NO_INTEGERS),
        (INTEGER_HEADS, "vllm", ("sm90",), "refuses", "refused: a KV cache is FP8", ""),
        (INTEGER_HEADS, "vllm", ("cpu",), "refuses", "refused: a KV cache is FP8", NO_INTEGERS),
        (INTEGER_HEADS, "sglang", ("sm80", "sm90"), "executes-other", f"{A16}; the KV cache is NOT quantized", ""),
        (INTEGER_HEADS, "transformers", ("any",), "loads", f"{DECODED}; KV cache in INT8 {EACH_HEAD}", ""),
    ],
)  # fmt: skip
def test_all_layouts_that_are_written_are_known(
    config: Config, consumer: str, devices: Sequence[str], verdict: str, says: str, message: str
) -> None:
    for device in devices:
        found = asked(config, consumer, device)
        assert (found.verdict, found.says[: len(says)], found.message) == (verdict, says, message)


NO_AWQ = "torch.bfloat16 is not supported for quantization method awq"
NO_CUDA = "Torch not compiled with CUDA enabled"
NO_SHAPE = "Unsupported shapes: MNK"
NO_SCHEMA = "No compatible Humming input schema"
NO_GPTQ = "Currently, {} on CPU with AMX."
NARROW = "narrow() cannot be applied to a 0-dim tensor"


@pytest.mark.parametrize(
    ("config", "consumer", "devices", "verdict", "says", "message"),
    [
        (FP8_GROUP, "vllm", (*GPUS, "cpu"), "refuses", "refused: FP8 weights have a scale a row, a", NONE_TYPE),
        (FP8_GROUP_TOKEN, "vllm", (*GPUS, "cpu"), "refuses", "refused: FP8 weights have a scale a row, a", NO_SCHEME),
        (FP8_GROUP, "sglang", GPUS[1:], "refuses", "refused: FP8 weights have a scale a row, a", NO_SCHEME + "."),
        (FP8_GROUP_TOKEN, "sglang", GPUS[1:], "refuses", "refused: FP8 weights have a scale a row", NO_SCHEME + "."),
        (FP8_GROUP, "transformers", ("any",), "loads", "W8A16: activations are not quantized", ""),
        (FP8_MIXED, "vllm", ("cpu",), "executes-other", "W8A8: dynamic FP8 activations per token, though", ""),
        (FP8_MIXED_STATIC, "vllm", ("cpu",), "refuses", "refused: beside FP8 weights with a scale a row", NARROW),
        (FP8_TENSOR_TOKEN, "vllm", ("cpu",), "refuses", "refused: it fails on FP8 weights with one", NO_SCALES),
        (FP8_BLOCK, "vllm", ("sm89",), "executes-other", "W8A16; W8A8 with --linear-backend triton", ""),
        (FP8_BLOCK, "vllm", ("sm90", "sm100"), "loads", "W8A8: dynamic FP8 activations per group of 128", ""),
        (MXFP4, "vllm", ("sm90",), "executes-other", "W4A8: dynamic FP8 activations per token, whatever", ""),
        (MXFP4_WEIGHTS, "vllm", ("sm90",), "executes-other", "W4A8: dynamic FP8 activations per token, what", ""),
        (MXFP4_TENSOR, "vllm", ("sm90",), "executes-other", "W4A8: dynamic FP8 activations per token, what", ""),
        (MXFP4_TENSOR, "vllm", ("sm80", "sm89"), "executes-other", "W4A16, unless --linear-backend emulation", ""),
        (MXFP4_TENSOR, "vllm", ("sm100",), "executes-other", "W4A4, whatever the config says", ""),
        (MXFP4_WEIGHTS, "vllm", ("sm80", "sm89"), "loads", "W4A16", ""),
        (MXFP4_G64, "vllm", GPUS[1:], "refuses", "refused: beside MXFP4 it has FP8 activations per", NO_SCHEMA),
        (MXFP4_G128, "vllm", ("sm90",), "loads", "W4A8: dynamic FP8 activations per group of 128", ""),
        (MXFP8_TOKEN, "vllm", GPUS[:4], "executes-other", "W8A16", ""),
        (MXFP8_TOKEN, "vllm", ("sm100",), "executes-other", "W8A8, whatever the config says of activations", ""),
        (INT4_G16, "sglang", GPUS[1:], "refuses", "refused: it wants groups of 32, 64 or 128", NO_SHAPE),
        (INT8_ASYM, "sglang", GPUS[1:], "refuses", "refused: INT8 weights are symmetric", NO_SHAPE),
        (W8AFP8, "sglang", GPUS[1:], "executes-other", "cannot be read: it takes packed INT8 with FP8", ""),
        ({**AWQ, "group_size": 16}, "sglang", GPUS[1:], "refuses", "refused: but in groups of 32, 64 or", NO_AWQ),
        ({**AWQ, "zero_point": False}, "sglang", GPUS[1:], "refuses", "refused: but in groups of 32", NO_AWQ),
        ({**GPTQ, "dynamic": {"+:a": {"bits": 8}}}, "transformers", ("any",), "refuses", "cannot be read: optimum", ""),
        (None, "sglang", ("cpu",), "loads", "W16A16: nothing is quantized; weights in bfloat16", ""),
        (W4A16, "sglang", ("cpu",), "refuses", "refused: it has no compressed-tensors on a CPU", NO_CUDA),
        (NVFP4, "sglang", ("cpu",), "refuses", "refused: it has no compressed-tensors on a CPU", NO_CUDA),
        (FP8, "sglang", ("cpu",), "refuses", "refused: it has no compressed-tensors on a CPU", NO_CUDA),
        (W8A8, "sglang", ("cpu",), "refuses", "refused: it wants --quantization w8a8_int8, with", NO_CUDA),
        (STATIC_W8A8, "sglang", ("cpu",), "refuses", "refused: it has no compressed-tensors on", NO_CUDA),
        (MXFP6, "sglang", ("cpu",), "refuses", "refused: floats of compressed-tensors have", NO_BITS),
        (GPTQ, "sglang", ("cpu",), "executes-other", "W4A8: dynamic INT8 activations per token, though", ""),
        ({**GPTQ, "sym": False}, "sglang", ("cpu",), "executes-other", "W4A8: dynamic INT8 activations", ""),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, "sglang", ("cpu",), "refuses", "refused: it reads the older",
         NO_GPTQ.format("gptq_v2 is not supported")),
        ({**GPTQ, "bits": 8}, "sglang", ("cpu",), "refuses", "refused: it has a kernel for 4 bits only",
         NO_GPTQ.format("only 4bits is supported")),
        (AWQ, "sglang", ("cpu",), "executes-other", "W4A8: dynamic INT8 activations per token, though", ""),
        ({**AWQ, "group_size": -1}, "sglang", ("cpu",), "refuses", "refused: it divides rows by the size",
         "Trying to create tensor with negative dimension"),
        (MODELOPT, "sglang", ("cpu",), "refuses", "refused: it has no modelopt on a CPU", "Invalid quantization met"
         "hod on CPU"),
        (FP8_BLOCKS, "sglang", ("cpu",), "executes-other", "W8A16: weights are decoded as it multiplies", ""),
        (PER_ROW, "sglang", GPUS[1:], "refuses", "refused: FP8 of modelopt has calibrated inputs", "ModelOptFp8Con"
         "fig only supports regular FP8 quantization"),
    ],
)  # fmt: skip
def test_what_code_and_runs_say(
    config: Config | None, consumer: str, devices: Sequence[str], verdict: str, says: str, message: str
) -> None:
    for device in devices:
        found = asked(config, consumer, device)
        assert (found.verdict, found.says[: len(says)], found.message) == (verdict, says, message), device


@pytest.mark.parametrize("layout", ["F16", "Q4_0", "Q4_1", "Q8_0", "MXFP4", "NVFP4"])
def test_vllm_on_a_cpu_reads_no_gguf_files(layout: str) -> None:
    found = answer([Case("gguf", layout, bits=4)], "vllm", "cpu")
    assert (found.says, found.message) == ("refused: it has no loader of GGUF files", "is not a valid JSON file")


@pytest.mark.parametrize(
    ("layout", "consumer", "verdict"),
    [
        ("Q4_0", "transformers", "loads"),
        ("Q4_1", "transformers", "loads"),
        ("NVFP4", "transformers", "refuses"),
        ("Q4_K", "llama.cpp", "loads"),
        ("Q4_K", "transformers", "loads"),
        ("IQ4_XS", "transformers", "loads"),
        ("Q8_K", "transformers", "unknown"),
        ("NVFP4", "sglang", "refuses"),
        ("Q4_0", "sglang", "loads"),
        ("Q4_K", "sglang", "loads"),
        ("IQ4_XS", "sglang", "loads"),
        ("TQ2_0", "sglang", "refuses"),
        ("Q8_K", "sglang", "unknown"),
        ("Q4_0", "vllm", "refuses"),
    ],
)
def test_what_is_known_of_gguf_files(layout: str, consumer: str, verdict: str) -> None:
    device = devices_of(consumer)[0]
    assert answer([Case("gguf", layout, bits=4)], consumer, device).verdict == verdict


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("random-hadamard", "'HadamardTransform' object has no attribute 'cpu_linear'"),
        ("hadamard", "'_OpNamespace' '_C' object has no attribute 'hadacore_transform'"),
    ],
)
def test_rotations_in_the_forward_pass_are_refused_on_a_cpu_with_its_message(kind: str, message: str) -> None:
    apply = [{"location": "input", "targets": ["model.layers.0.mlp.down_proj"]}]
    found = asked(
        {**W4A16, "transform_config": {"config_groups": {"a": {"type": kind, "apply": apply}}}}, "vllm", "cpu"
    )
    assert (found.verdict, found.message) == ("refuses", message)


@pytest.mark.parametrize(
    ("config", "device", "kernel"),
    [
        (W4A16, "sm90", "MacheteLinearKernel"),
        (W4A16, "sm80", "MarlinLinearKernel"),
        (W4A16, "cpu", "CPUWNA16LinearKernel"),
        (compressed("pack-quantized", "int4-sym-group32-static"), "sm90", ""),
        (W8A16, "cpu", ""),
        (NVFP4, "sm89", "MarlinNvFp4LinearKernel"),
        (NVFP4, "sm90", "HummingNvFp4LinearKernel"),
        (MODELOPT, "sm89", "MarlinNvFp4LinearKernel"),
        (MODELOPT, "sm90", "HummingNvFp4LinearKernel"),
        (MXFP4, "sm89", "MarlinMxFp4LinearKernel"),
        (MXFP4, "sm90", "HummingMxFp4LinearKernel"),
        (MXFP4_TENSOR, "sm89", "MarlinMxFp4LinearKernel"),
        (MXFP4_TOKEN, "sm89", "HummingMxFp4LinearKernel"),
        (FP8_BLOCK, "sm89", "MarlinFP8ScaledMMLinearKernel"),
        (FP8_BLOCKS, "sm89", "MarlinFP8ScaledMMLinearKernel"),
        (FP8_BLOCK, "sm90", ""),
        (NVFP4, "sm100", ""),
        (FP8, "cpu", "ChannelWiseTorchFP8ScaledMMLinearKernel"),
        (MXFP8, "sm89", "MarlinMxfp8LinearKernel"),
        (MXFP8, "sm90", "HummingMxfp8LinearKernel"),
        (MXFP8, "sm100", ""),
    ],
)
def test_kernels_are_named_where_they_are_known(config: Config, device: str, kernel: str) -> None:
    assert asked(config, "vllm", device).kernel == kernel


def test_messages_are_those_of_the_case() -> None:
    assert asked({**GPTQ, "sym": False}, "vllm", "sm80").message == "Unsupported quantization config: bits=4, sym=False"


def test_of_several_kinds_of_linears_the_worst_counts() -> None:
    mixed = compressed("pack-quantized", "int4-sym-group64-static")
    mixed["config_groups"]["group_1"] = {"weights": arguments("int3-sym-group64-static"), "format": "pack-quantized"}
    assert asked(mixed, "sglang", "sm90").says == "refused: packed integers have 4 or 8 bits"
    assert asked(mixed, "vllm", "sm90").verdict == "loads"


def test_what_no_rule_speaks_of_makes_the_rest_unknown() -> None:
    cached = compressed("pack-quantized", "int4-sym-group64-static", cache="float6-sym-tensor_group16-local")
    assert asked(cached, "transformers", "any").says == "unknown: no rule speaks of cache"
    assert asked(W8A16_FP8, "vllm", "cpu", experts=True).verdict == "refuses"
    assert asked(MXFP8, "transformers", "any", experts=True, online="hadamard").verdict == "refuses"
    assert asked(MODELOPT | {"quant_algo": "W4A16_NVFP4"}, "sglang", "sm100", experts=True).verdict == "unknown"
    turned = {**W4A16, "transform_config": {"config_groups": {"R4": {}}}}
    assert asked(turned, "vllm", "sm90").says == "unknown: no rule speaks of `transform_config`"
    outputs = compressed("pack-quantized", "int4-sym-group64-static", outputs="int8-sym-tensor-static")
    assert asked(outputs, "sglang", "sm90").says == "unknown: no rule speaks of outputs"
    assert asked(outputs, "vllm", "sm90", experts=True).verdict == "unknown"


def test_outputs_are_rounded_by_some_only() -> None:
    static = compressed("pack-quantized", "int4-sym-group64-static", STATIC_INT8, outputs=STATIC_INT8)
    for device in ("cpu", "sm75", "sm100"):
        told = asked(static, "vllm", device)
        assert told.verdict == "loads"
        assert told.says.startswith("W4A8: static INT8 activations per tensor")
        assert "; static INT8 outputs per tensor; of q, k and v, and of gate and up" in told.says
    told = asked(static, "transformers", "any")
    assert told.says.endswith("; static INT8 outputs per tensor, emulated in bfloat16")
    in_bytes = compressed("int-quantized", "int8-sym-channel-static", STATIC_INT8, outputs=STATIC_INT8)
    assert asked(in_bytes, "vllm", "sm100").verdict == "loads"  # where W8A8 alone has no kernel
    assert asked(STATIC_W8A8, "vllm", "sm100").verdict == "refuses"
    assert asked(in_bytes, "vllm", "cpu").says == "refused: it has a kernel for packed integers of 4 bits only"
    asymmetric = compressed("pack-quantized", "int4-sym-group64-static", STATIC_INT8, outputs="int8-asym-tensor-static")
    assert asked(asymmetric, "vllm", "sm90").says.startswith("refused: it has no room for zero points")
    alone = compressed("pack-quantized", "int4-sym-group64-static", outputs=STATIC_INT8)
    assert asked(alone, "vllm", "cpu").says.startswith("refused: it has room for a scale of outputs only where")
    assert asked(alone, "vllm", "cpu").message == "There is no module or parameter named"
    dynamic = compressed("pack-quantized", "int4-sym-group64-static", outputs="int8-sym-token-dynamic")
    told = asked(dynamic, "vllm", "cpu")
    assert (told.verdict, told.says) == (
        "executes-other",
        "W4A16: activations are not quantized; outputs are NOT rounded",
    )
    decoded = compressed("pack-quantized", "int4-asym-group64-static", outputs="int8-sym-token-dynamic")
    told = asked({**decoded, "dequantize": True}, "transformers", "any")
    assert told.verdict == "executes-other"
    assert told.says.endswith("; outputs are NOT rounded")


def test_texts_for_cards_say_from_which_device_on() -> None:
    told = said(cases_of(NVFP4, dtype="bfloat16"))
    assert told["vllm"].startswith(
        "W4A4 from SM100 on; before it W4A16, unless --linear-backend emulation is given (by"
    )
    assert told["vllm on a CPU"].startswith("refused: it has no kernel for NVFP4 (vLLM 0.32, run on a CPU)")
    assert said(cases_of(FP8))["vllm"].startswith(
        "W8A8 from SM89 on: dynamic FP8 activations per token; before it W8A16"
    )
    assert set(told) == {"transformers", "vllm", "vllm on a CPU", "sglang", "sglang on a CPU"}
    assert set(said([Case("gguf", "Q4_0", bits=4)])) == {"llama.cpp"}


def test_an_unknown_consumer_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="no consumer called `vLLMs`") as refused:
        devices_of("vLLMs")
    assert refused.value.hint == "--for vllm"
    with pytest.raises(UsageError) as refused:
        devices_of("llamacpp")
    assert refused.value.hint == "--for llama.cpp"


def test_of_blocks_that_are_not_128_by_128_nothing_is_known_of_engines() -> None:
    config = deepcopy(FP8_BLOCK)
    config["config_groups"]["group_0"]["weights"]["block_structure"] = [64, 128]
    for consumer in ("vllm", "sglang"):
        assert asked(FP8_BLOCK, consumer, "sm90").verdict == "loads"
        assert asked(config, consumer, "sm90").verdict == "unknown"
    assert asked(config, "transformers", "any").verdict == "loads"
    config["config_groups"]["group_0"]["weights"]["block_structure"] = "128x128"
    assert asked(config, "vllm", "sm90").verdict == "loads"
