"""compressed-tensors checkpoints: what vLLM, SGLang and transformers load."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, compress_module
from compressed_tensors.quantization import QuantizationScheme, apply_quantization_config
from torch import Tensor, nn
from transformers import AutoConfig, CompressedTensorsConfig

from qtool.builtin.exporters.checkpoint import left_alone_counts, write_checkpoint
from qtool.builtin.exporters.ct_config import quantization_config
from qtool.builtin.exporters.ct_layout import Layout, checkpoint_dtype, choose_layout
from qtool.builtin.exporters.ct_tensors import global_divisor, stored_tensors
from qtool.builtin.exporters.read_back import (
    CheckpointReader,
    empty_model,
    weight_difference,
    with_linear_experts,
)
from qtool.builtin.exporters.refusals import (
    check_global_scales,
    input_multiplier,
    quantized_weights,
    refuse_all_but_codes,
)
from qtool.builtin.exporters.stored_names import stored_tensor_name
from qtool.consumers.case import cases_of
from qtool.consumers.checkpoint import artifact_facts
from qtool.consumers.table import said
from qtool.engine.exporter import Exported
from qtool.engine.problem import QuantizedLinear
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, UsageError
from qtool.model.graph import LinearSite
from qtool.model.source import Model

# The library does not pack the zero points of a model without weights; their shapes show when they are decoded.
_ZERO_POINT = ".weight_zero_point"
# A float32 division, and the product that stands for it, are each half a unit in the last place off.
_RECIPROCAL_ERROR = 2.0**-23


class CompressedTensors:
    """Writes ``pack-quantized``, ``int-quantized``, ``float-quantized`` and the FP4 layouts."""

    version = 1

    def check(self, subject: Subject) -> None:
        """Refuse schemes without a layout, adapters, online operators and scales that fused layers cannot share.

        Raises:
            UsageError: Names what does not fit and the nearest that does.
        """
        layout, weights = choose_layout(subject.scheme), quantized_weights(subject)
        checkpoint_dtype(weights, subject.model.dtype)
        refuse_all_but_codes(subject, "compressed-tensors")
        if subject.scheme.scale_per_head:
            raise UsageError(
                "compressed-tensors has one activation scheme for all linears, without a scale per head at o_proj",
                hint="--scheme W4A4, or pack --to hf",
            )
        if layout == "nvfp4-pack-quantized":
            check_global_scales(subject)

    def write(self, subject: Subject, directory: Path) -> Exported:
        """Write the checkpoint into an empty folder."""
        layout, weights = choose_layout(subject.scheme), quantized_weights(subject)
        dtype = checkpoint_dtype(weights, subject.model.dtype)
        config = quantization_config(subject.scheme, layout, not_quantized(subject.model))

        def made(linear: LinearSite, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
            if linear.spec.kept:
                return {}
            return stored_tensors(subject.linear(linear), weights, layout) | _input_scale(subject, linear)

        sizes = write_checkpoint(subject, directory, made, dtype=dtype, quantization=config)
        details: dict[str, object] = {"layout": layout, "dtype": str(dtype).removeprefix("torch.")}
        details |= {"bytes": vars(sizes), "left_alone": left_alone_counts(subject.model)}
        facts = artifact_facts(subject.scheme, dtype=dtype)
        cases = cases_of(config, experts=subject.model.graph.dims.experts > 0, **facts)
        return Exported(said(cases), details)

    def verify(self, subject: Subject, directory: Path) -> None:
        """Decode every linear with the library, as the written config says, and compare it with ours, bit for bit.

        The library decodes to the dtype of the scales (FP4 to bfloat16), so ours are cast to that dtype first.
        Names and shapes are compared with the model that transformers builds from the config.

        Raises:
            ArtifactError: Names the first weight that differs.
        """
        layout, model = choose_layout(subject.scheme), subject.model
        config = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
        parsed = CompressedTensorsConfig.from_dict(config.quantization_config)  # type: ignore[no-untyped-call]
        reader = CheckpointReader(directory, model)
        reader.compare(_skeleton(config, parsed, model), any_shape=_ZERO_POINT)
        (scheme,) = parsed.quantization_config.config_groups.values()
        for linear in model.graph.linears:
            tensors = reader.module(linear.name)
            decoded = _decode(tensors, scheme, linear.name)
            ours = _as_consumer(subject, linear, layout, tensors)
            if decoded.shape != ours.shape or not torch.equal(decoded, ours.to(decoded.dtype)):
                raise weight_difference(linear.name, decoded, ours)


def _input_scale(subject: Subject, linear: LinearSite) -> dict[str, Tensor]:
    multiplier = input_multiplier(subject, linear) if subject.scheme.activations is not None else None
    return {} if multiplier is None else {"input_global_scale": global_divisor(multiplier)}


def not_quantized(model: Model) -> set[str]:
    """Return the names of the linears that are not quantized: head, routers, gates, towers, heads for further tokens.

    Some loaders match the names of modules in transformers, some those in files, so both are given.
    """
    module = empty_model(deepcopy(model.config), model)
    quantized = {linear.name for linear in model.graph.linears}
    names = {name for name, child in module.named_modules() if isinstance(child, nn.Linear) and name not in quantized}
    names |= {
        linear.name for i in range(model.graph.dims.num_layers) for linear in model.graph.readers_of(i)
    } - quantized
    matrices = (name for name in model.left_alone if len(model.places[name].shape) > 1 and name.endswith(".weight"))
    names |= {name.removesuffix(".weight") for name in matrices}
    return names | {stored_tensor_name(model, f"{name}.weight").removesuffix(".weight") for name in names}


def _skeleton(config: Any, parsed: CompressedTensorsConfig, model: Model) -> nn.Module:  # noqa: ANN401
    """Build the model without weights as transformers does before it loads a compressed checkpoint.

    transformers decodes experts on loading; the library compresses linears in their place to what it decodes.
    """
    plain = deepcopy(config)
    del plain.quantization_config
    module = with_linear_experts(empty_model(plain, model), model)
    apply_quantization_config(module, parsed.quantization_config, show_progress=False)
    for child in module.modules():
        if isinstance(child, nn.Linear):
            compress_module(child)  # leaves those without a scheme as they are
    return module


def _decode(tensors: Mapping[str, Tensor], scheme: QuantizationScheme, name: str) -> Tensor:
    """Decode one linear with the library."""
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    own = {key: tensor for key, tensor in tensors.items() if key in compressor.compression_param_names(scheme)}
    try:
        decoded: Tensor = compressor.decompress(own, scheme)["weight"]
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise ArtifactError(f"compressed-tensors cannot decode `{name}`", facts=(("reason", reason),)) from error
    return decoded


def _as_consumer(subject: Subject, linear: LinearSite, layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return our decoded weight in float32.

    With a global scale the consumer divides by what we multiply with. The stored divisor must be our multiplier's
    reciprocal; then the step is formed as the consumer forms it, since the two differ in the last bit.
    """
    found: QuantizedLinear = subject.linear(linear)
    (parameters,) = found.parameters
    multiplier = parameters.global_scale
    if layout == "nvfp4-pack-quantized" and multiplier is not None:
        divisor = tensors["weight_global_scale"]
        if abs(float(divisor.double() * multiplier.double()) - 1) > _RECIPROCAL_ERROR:
            raise weight_difference(f"{linear.name} (global scale)", 1 / divisor, multiplier)
        step = parameters.scale / divisor
        found = replace(found, parameters=(replace(parameters, scale=step, global_scale=None),))
    return found.weight(subject.weight_grid(linear))
