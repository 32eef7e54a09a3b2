"""What the consumers of a checkpoint execute, in words: kept with it, printed beside what is measured on it.

transformers was run: its logits on every layout were compared with qtool's own forward pass, with and without quantized
activations (``tests/builtin/test_exporters.py`` does it again). vLLM was read; version 0.32 ran W4A16 and W8A8 on a CPU
(``tests/builtin/layouts/test_vllm.py``, measured in ``recipes/README.md``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from qtool.builtin.exporters.ct_layout import ELEMENTS, Layout
from qtool.engine.exporter import UNREADABLE
from qtool.errors import SchemeError
from qtool.scheme import ModelScheme, TensorScheme

TRANSFORMERS = "transformers 5.23 with compressed-tensors 0.20"
VLLM = "by the code of vLLM 0.33, not run"
LLAMA_CPP = "llama.cpp of node-llama-cpp 3.22, run on a CPU"


def compressed_consumers(
    scheme: ModelScheme, layout: Layout, dtype: torch.dtype, *, experts: bool = False
) -> dict[str, str]:
    """Return what loads a compressed-tensors checkpoint, and what each loader executes.

    Args:
        scheme: Weights, activations, KV cache.
        layout: The layout that was written.
        dtype: What transformers computes in.
        experts: Whether the model has experts, which both loaders treat apart from other linears.

    Raises:
        SchemeError: The scheme has no weights.
    """
    if scheme.weights is None:
        raise SchemeError("the scheme leaves the weights as they are", hint="--weights int4-sym-g128")
    weights, activations = scheme.weights, scheme.activations
    read, run = _transformers(weights, activations, _name(dtype)), _vllm(weights, activations, layout)
    if scheme.kv is not None:
        read = f"{read}; {_cache(scheme.kv) if weights.symmetric else 'the KV cache is NOT quantized'}"
        float8 = scheme.kv.format == "fp8" and scheme.kv.strategy == "tensor"
        run = f"{run}; FP8 KV cache with scale 1, for it holds no calibrated ones"
        run = run if float8 else "refused: it quantizes a KV cache in FP8 with one scale only"
    if experts:
        lost = _unread_experts(weights, layout)
        quantized = " and their activations NOT quantized" if activations is not None else ""
        read = f"{UNREADABLE}: {lost}" if lost else f"{read}; experts are decoded on loading{quantized}"
        refused = _vllm_without_experts(weights, activations, layout)
        run = f"refused: {refused}" if refused else run
    return {"transformers": f"{read} ({TRANSFORMERS})", "vllm": f"{run} ({VLLM})"}


def with_transforms(consumers: Mapping[str, str], kinds: Collection[str], *, biased: bool) -> dict[str, str]:
    """Return the words on the consumers of a checkpoint with Hadamard rotations in the forward pass.

    Args:
        consumers: As they are without.
        kinds: Types of the transforms; none if there are no transforms.
        biased: Whether a linear behind a transform has a bias.
    """
    if not kinds:
        return dict(consumers)
    lost = f"{UNREADABLE} by from_pretrained alone, which leaves out the online rotations"
    dense = "" if set(kinds) == {"hadamard"} else ", by a dense product"
    run = f"{consumers['vllm']}; online rotations on one GPU only{dense}"
    return {
        "transformers": f"{lost}; with apply_transform_config and the stored matrices: {consumers['transformers']}",
        "vllm": "refused: it rotates the inputs of linears without biases only" if biased else run,
    }


def dequantized_consumers(weight_bits: int, scheme: ModelScheme, dtype: torch.dtype) -> dict[str, str]:
    """Return what loads a checkpoint of dequantized weights: everything, and as weights only.

    Args:
        weight_bits: Bits of the codes that the weights came from.
        scheme: What else the artifact quantizes, and the checkpoint does not.
        dtype: What the weights are stored in.
    """
    cache = scheme.keys or scheme.values
    parts = (("activations", scheme.activations), ("KV cache", cache))
    lost = " and ".join(f"{part.format} {what}" for what, part in parts if part is not None)
    text = f"W{weight_bits}A16: weights only, dequantized to {_name(dtype)}; activations are NOT quantized"
    if lost:
        text += f" (without the {lost} of the artifact)"
    return {"transformers": text, "vllm": text}


def _transformers(weights: TensorScheme, activations: TensorScheme | None, dtype: str) -> str:
    """Return what transformers executes: weights decoded on the first forward pass, activations rounded before each."""
    bits = ELEMENTS[weights.format][1]
    rounded = f"; its {weights.scale} scales are rounded to {dtype}" if weights.scale == "fp32" else ""
    if activations is None:
        return f"W{bits}A16: activations are not quantized, weights are decoded to {dtype}{rounded}"
    if not weights.symmetric:
        return f"W{bits}A16: activations are NOT quantized, since asymmetric weights are loaded dequantized to {dtype}"
    integers = ELEMENTS[activations.format][0] == "int" and activations.symmetric
    ranged = (
        "" if not integers or activations.range_rule == "half" else f", by `half` instead of `{activations.range_rule}`"
    )
    return f"{_both(weights, activations)}: {_dynamic(activations)}{ranged}, emulated in {dtype}{rounded}"


def _vllm(weights: TensorScheme, activations: TensorScheme | None, layout: Layout) -> str:
    """Return what vLLM executes."""
    bits = ELEMENTS[weights.format][1]
    alone = f"W{bits}A16: activations are not quantized"
    if layout == "nvfp4-pack-quantized":
        return alone if activations is None else f"W4A4 on Blackwell; before it W4A16, unless {_EMULATION}"
    if layout == "mxfp4-pack-quantized":
        before = "W4A16" if activations is None else f"W4A16, unless {_EMULATION}"
        return f"W4A4 from SM100 on, whatever the config says of activations; before it {before}"
    if layout == "pack-quantized":
        return _vllm_packed(weights, activations, alone)
    if activations is None:
        return alone
    if layout == "float-quantized" and weights.strategy == "block":
        return f"W8A8 from SM89 on: {_dynamic(activations)}; before it W8A16"
    if layout == "float-quantized":
        return "W8A8 from SM89 on: dynamic FP8 activations per token; before it W8A16"
    if activations.strategy not in ("token", "channel"):
        return "refused: it wants INT8 activations per token"
    return f"W8A8: {_dynamic(activations)}"


def _vllm_packed(weights: TensorScheme, activations: TensorScheme | None, alone: str) -> str:
    """Return what vLLM executes of packed integers, most kernels for which know no quantized activations."""
    bits = ELEMENTS[weights.format][1]
    if not weights.symmetric and bits not in (4, 8):
        return "refused: zero points come with 4 and 8 bits only"
    if activations is None:
        return alone if bits in (4, 8) else f"{alone}; the kernel `humming` only"
    known = activations.symmetric and activations.strategy != "tensor" and ELEMENTS[activations.format][1] in (4, 8)
    if not known:
        return "refused: it wants symmetric activations of 4 or 8 bits per token or group"
    return f"W{bits}A16 on most kernels; {_both(weights, activations)} with --linear-backend humming"


_EMULATION = "--linear-backend emulation is given"


def _unread_experts(weights: TensorScheme, layout: Layout) -> str:
    """Return why transformers does not read the experts of a layout rightly; empty if it does."""
    if layout == "nvfp4-pack-quantized":
        return "it decodes experts without their global scales, and says nothing"
    if layout == "int-quantized":
        return "it has no decoder for experts in INT8"
    return "" if weights.symmetric else "it decodes experts without their zero points"


def _vllm_without_experts(weights: TensorScheme, activations: TensorScheme | None, layout: Layout) -> str:
    """Return why vLLM does not run the experts of a scheme, empty if it does."""
    if layout == "pack-quantized" and ELEMENTS[weights.format][1] not in (4, 8):
        return "experts have 4 or 8 bits"
    if layout == "pack-quantized" and activations is not None:
        int8 = activations.format == "int8" and activations.strategy in ("token", "channel")
        dynamic = weights.format == "int4" and weights.symmetric and activations.symmetric and int8
        return "" if dynamic else "experts with packed weights have activations in 16 bits"
    if layout == "float-quantized" and activations is None:
        return "experts in FP8 have FP8 activations"
    return ""


def _both(weights: TensorScheme, activations: TensorScheme) -> str:
    return f"W{ELEMENTS[weights.format][1]}A{ELEMENTS[activations.format][1]}"


def _dynamic(activations: TensorScheme) -> str:
    """Return how activations are quantized, as ``dynamic INT4 activations per token, asymmetric``."""
    element, bits = ELEMENTS[activations.format]
    per = {"group": f"group of {activations.group_size}", "tensor": "tensor"}.get(activations.strategy, "token")
    kind = {"int": "INT", "float": "FP"}[element]
    return f"dynamic {kind}{bits} activations per {per}{'' if activations.symmetric else ', asymmetric'}"


def _cache(kv: TensorScheme) -> str:
    """Return how the library quantizes keys and values as it runs, as ``KV cache in INT4 with …``."""
    element, bits = ELEMENTS[kv.format]
    per = f" per group of {kv.group_size}" if kv.strategy == "group" else ""
    zeros = "" if kv.symmetric else ", asymmetric"
    return f"KV cache in {'INT' if element == 'int' else 'FP'}{bits} with a dynamic scale{per}{zeros}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def llama_cpp_consumers(kind: str, weight_bits: int, scheme: ModelScheme, dtype: torch.dtype) -> dict[str, str]:
    """Return what llama.cpp executes of a GGUF file: the weights, and activations in ways of its own.

    Args:
        kind: Type of the linears: ``F16`` or one in blocks.
        weight_bits: Bits of the codes that the weights came from.
        scheme: What else the artifact quantizes, and the file does not.
        dtype: What embedding and head are stored in.
    """
    if kind == "F16":
        own = "dequantized to float16; activations are NOT quantized, but rounded to float16 by CPUs"
    else:
        own = f"as {kind}; activations are NOT quantized but by its own kernels, by CPUs to 8 bits in blocks of 32"
    lost = f" (without the {scheme.activations.format} activations of the artifact)" if scheme.activations else ""
    text = f"W{weight_bits}A16: weights only, {own}; embedding and head in {_name(dtype)}"
    return {"llama.cpp": f"{text}{lost} ({LLAMA_CPP})"}
