"""NVIDIA ModelOpt's checkpoints: NVFP4 and FP8, for vLLM, SGLang and TensorRT-LLM.

All of it is what the artifact holds in other names: ``weight_scale_2`` and ``input_scale`` are the multipliers whose
reciprocals compressed-tensors stores. FP8 is the kind with a scale an output row and dynamic inputs, since qtool has no
calibrated input scale of FP8, which the kind with a scale a tensor asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig

from qtool.builtin.exporters.checkpoint import left_alone_counts, write_checkpoint
from qtool.builtin.exporters.compressed_tensors import not_quantized
from qtool.builtin.exporters.ct_layout import checkpoint_dtype
from qtool.builtin.exporters.modelopt_config import (
    HF_QUANT_CONFIG,
    Algorithm,
    hf_quant_config,
    quantization_config,
)
from qtool.builtin.exporters.read_back import (
    CheckpointReader,
    empty_model,
    weight_difference,
    with_linear_experts,
    with_stored_shapes,
)
from qtool.builtin.exporters.refusals import (
    check_global_scales,
    input_multiplier,
    quantized_weights,
    refuse_all_but_codes,
)
from qtool.builtin.exporters.shards import write_json
from qtool.consumers.case import cases_of
from qtool.consumers.checkpoint import artifact_facts
from qtool.consumers.table import said
from qtool.engine.exporter import Exported
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, SchemeError, UsageError
from qtool.model.graph import LinearSite
from qtool.numerics.packing import pack_codes
from qtool.numerics.scales import encode_scale
from qtool.scheme import ModelScheme

_GROUP = 16
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_UNREADABLE = (KeyError, ValueError, RuntimeError)


class ModelOpt:
    """Writes ``weight``, ``weight_scale`` and, for NVFP4, ``weight_scale_2`` and ``input_scale``."""

    version = 1

    def check(self, subject: Subject) -> None:
        """Refuse schemes without an algorithm, and what goes beyond codes and scales.

        Raises:
            UsageError: Names what does not fit and the nearest that does.
        """
        quantized_weights(subject)
        algorithm = choose_algorithm(subject.scheme)
        refuse_all_but_codes(subject, "modelopt")
        if algorithm != "FP8_PER_CHANNEL_PER_TOKEN":
            check_global_scales(subject)
        elif subject.model.graph.dims.experts > 0:
            raise UsageError(
                "no consumer reads experts in FP8 with a scale an output row from modelopt",
                hint="qtool pack SOURCE --to compressed-tensors",
            )

    def write(self, subject: Subject, directory: Path) -> Exported:
        """Write the checkpoint into an empty folder."""
        algorithm, model = choose_algorithm(subject.scheme), subject.model
        dtype = checkpoint_dtype(quantized_weights(subject), model.dtype)

        def made(linear: LinearSite, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {} if linear.spec.kept else _stored(subject, linear)

        ignored = sorted(not_quantized(model))
        config = quantization_config(algorithm, ignored)
        sizes = write_checkpoint(subject, directory, made, dtype=dtype, quantization=config)
        write_json(directory / HF_QUANT_CONFIG, hf_quant_config(algorithm, ignored))
        details: dict[str, object] = {"layout": f"modelopt {algorithm}", "dtype": str(dtype).removeprefix("torch.")}
        details |= {"bytes": vars(sizes), "left_alone": left_alone_counts(model)}
        facts = artifact_facts(subject.scheme, dtype=dtype)
        cases = cases_of(config, experts=model.graph.dims.experts > 0, **facts)
        return Exported(said(cases), details)

    def verify(self, subject: Subject, directory: Path) -> None:
        """Decode every linear by ModelOpt's formula, as the written config says, and compare it with ours.

        Raises:
            ArtifactError: Names the first weight, or input scale, that differs.
        """
        model = subject.model
        config = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
        algorithm, plain = config.quantization_config["quant_algo"], deepcopy(config)
        del plain.quantization_config
        module = with_linear_experts(empty_model(plain, model), model)
        reader = CheckpointReader(directory, model)
        reader.compare(with_stored_shapes(module, model, lambda child: _shapes(child, algorithm)))
        for linear in model.graph.linears:
            ours = subject.linear(linear).weight(subject.weight_grid(linear))
            tensors = reader.module(linear.name)
            try:
                read = _decode(tensors, algorithm)
            except _UNREADABLE as error:
                reason = str(error).split("\n")[0]
                raise ArtifactError(f"cannot decode `{linear.name}`", facts=(("reason", reason),)) from error
            if read.shape != ours.shape or not torch.equal(read, ours):
                raise weight_difference(linear.name, read, ours)
            multiplier = input_multiplier(subject, linear)
            if algorithm == "NVFP4" and multiplier is not None and float(multiplier) != float(tensors["input_scale"]):
                raise weight_difference(f"{linear.name} (input scale)", tensors["input_scale"], multiplier)


def choose_algorithm(scheme: ModelScheme) -> Algorithm:
    """Return what ModelOpt calls a scheme.

    Raises:
        SchemeError: It has no name; the hint gives the nearest that has.
    """
    weights, activations = scheme.weights, scheme.activations
    if weights is None:
        raise SchemeError("the scheme leaves the weights as they are", hint="--scheme NVFP4")
    if scheme.kv is not None:
        raise SchemeError(
            "modelopt has no cache with a dynamic scale, which is the one that qtool measures",
            facts=(("kv", scheme.kv),),
            hint="qtool pack SOURCE --to compressed-tensors, or a scheme without a cache",
        )
    block = ("group", _GROUP, "e4m3", True)
    if (weights.strategy, weights.group_size, weights.scale, weights.symmetric) == block:
        if activations is None:
            return "W4A16_NVFP4"
        same = (activations.strategy, activations.group_size, activations.scale, activations.symmetric) == block
        if same and activations.clip == 1 and activations.outlier_threshold is None:
            return "NVFP4"
        raise _refusal("NVFP4 weights go with NVFP4 activations", scheme, "--activations nvfp4")
    if weights.format != "fp8":
        raise _refusal("modelopt is written for NVFP4 and FP8 weights", scheme, "--scheme NVFP4")
    rows = weights.strategy == "channel" and weights.scale in ("fp32", "bf16", "fp16")
    tokens = activations is not None and activations.format == "fp8" and activations.strategy == "token"
    if not rows or not tokens or activations is None or replace(activations, scale="fp32", clip=1.0) != activations:
        reason = "FP8 weights with a scale a row go with FP8 inputs with one a token; others have calibrated inputs"
        raise _refusal(reason, scheme, "--scheme FP8_DYNAMIC")
    return "FP8_PER_CHANNEL_PER_TOKEN"


def _stored(subject: Subject, linear: LinearSite) -> dict[str, Tensor]:
    """Return what is stored of a linear, named below it."""
    found, scheme = subject.linear(linear), quantized_weights(subject)
    (parameters,) = found.parameters
    if parameters.global_scale is None:
        scale = parameters.scale.float().squeeze(-1)
        return {"weight": found.codes.view(torch.float8_e4m3fn), "weight_scale": scale}
    tensors = {
        "weight": pack_codes(found.codes, 4),
        "weight_scale": encode_scale(parameters.scale, scheme.scale),
        "weight_scale_2": parameters.global_scale.float().reshape(()),
    }
    multiplier = input_multiplier(subject, linear) if subject.scheme.activations is not None else None
    return tensors if multiplier is None else tensors | {"input_scale": multiplier.float().reshape(())}


def _shapes(linear: nn.Linear, algorithm: Algorithm) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a linear's tensors, without its bias."""
    n_out, n_in = linear.out_features, linear.in_features
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        return {"weight": (n_out, n_in), "weight_scale": (n_out,)}
    shapes = {"weight": (n_out, n_in // 2), "weight_scale": (n_out, n_in // _GROUP), "weight_scale_2": ()}
    return shapes | ({"input_scale": ()} if algorithm == "NVFP4" else {})


def _decode(tensors: Mapping[str, Tensor], algorithm: Algorithm) -> Float[Tensor, "out in"]:
    """Return the float32 weight that stored tensors stand for."""
    raw, scale = tensors["weight"], tensors["weight_scale"].float()
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        return raw.float() * scale[:, None]
    pairs = torch.stack((raw % 16, raw // 16), dim=-1).flatten(1)
    step = scale * tensors["weight_scale_2"]
    return torch.tensor(_E2M1)[pairs.long()] * step.repeat_interleave(_GROUP, dim=1)


def _refusal(reason: str, scheme: ModelScheme, nearest: str) -> SchemeError:
    facts = (("weights", scheme.weights), ("activations", scheme.activations or "16 bits"))
    return SchemeError(reason, facts=facts, hint=f"nearest that fits: {nearest}")
