"""Scales of integer inputs that qtool rounded and that consumers do not: it is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from qtool.consumers.checkpoint import artifact_facts
from qtool.plugins import Plugins
from qtool.steps.schemes import read_scheme
from tests.consumers.known import asked, compressed

W8A8 = compressed("int-quantized", "int8-sym-channel-static", "int8-asym-token-dynamic")
W4A8 = compressed("pack-quantized", "int4-sym-group32-static", "int8-asym-token-dynamic")
DECODED = compressed("pack-quantized", "int4-asym-group32-static", "int8-asym-token-dynamic") | {"dequantize": True}
STATIC = compressed("int-quantized", "int8-sym-channel-static", "int8-sym-tensor-static")


def facts(activations: str) -> dict[str, Any]:
    scheme = read_scheme("", {"weights": "int8-sym-channel", "activations": activations}, Plugins.discover())
    return artifact_facts(scheme, dtype=torch.float32)


def test_an_artifact_tells_what_dynamic_scales_were_rounded_to() -> None:
    schemes = ("int8-asym-token", "int8-asym-token-sfp16", "int8-asym-token-sfp32", "int8-sym-tensor-static", "")
    assert [facts(scheme)["input_scale"] for scheme in schemes] == ["bf16", "fp16", "fp32", "", ""]


@pytest.mark.parametrize(
    ("config", "consumer", "device", "scale", "dtype", "fitted"),
    [
        (W8A8, "transformers", "any", "bf16", "float32", "float32"),
        (W8A8, "transformers", "any", "bf16", "float16", "float16"),
        (W4A8, "transformers", "any", "fp16", "bfloat16", "bfloat16"),
        (W8A8, "transformers", "any", "bf16", "bfloat16", ""),
        (W8A8, "transformers", "any", "fp16", "float16", ""),
        (W8A8, "transformers", "any", "fp32", "float32", ""),
        (W8A8, "transformers", "any", "", "float32", ""),
        (DECODED, "transformers", "any", "bf16", "float32", ""),  # activations are not quantized
        (STATIC, "transformers", "any", "", "float32", ""),
        (W8A8, "vllm", "sm90", "bf16", "bfloat16", "float32"),
        (W8A8, "vllm", "cpu", "bf16", "bfloat16", "float32"),
        (W8A8, "vllm", "cpu", "fp32", "bfloat16", ""),
        (W4A8, "vllm", "sm90", "bf16", "bfloat16", ""),  # refused
        (W8A8, "vllm", "sm100", "bf16", "bfloat16", ""),  # refused
    ],
)
def test_scales_that_are_not_rounded_are_told(
    config: dict[str, Any], consumer: str, device: str, scale: str, dtype: str, fitted: str
) -> None:
    said = asked(config, consumer, device, input_scale=scale, dtype=dtype).says
    remark = f"; scales of inputs are fitted in {fitted}, not rounded to {scale}"
    assert said.endswith(remark) if fitted else "scales of inputs" not in said


def test_the_library_fits_scales_in_the_dtype_of_the_model() -> None:
    """Rounded to that, they are the same."""
    values = torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    arguments = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        found[dtype], _ = compute_dynamic_scales_and_zp(values.to(dtype), arguments, torch.nn.Linear(1, 1))
    exact = values.float().abs().amax(-1, keepdim=True) / 127.5
    assert torch.equal(found[torch.float32], exact)
    assert torch.equal(found[torch.bfloat16], exact.bfloat16())
    assert (exact != exact.bfloat16().float()).float().mean() > 0.9
