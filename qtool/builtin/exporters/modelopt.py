"""NVIDIA ModelOpt's checkpoints: NVFP4 and FP8, for vLLM, SGLang and TensorRT-LLM.

All of it is what the artifact holds in other names: ``weight_scale_2`` and ``input_scale`` are the multipliers whose
reciprocals compressed-tensors stores. FP8 has a scale an output row, or one a tensor. Its inputs are dynamic, since
qtool calibrates no input scale of FP8, for which vLLM and SGLang ask where the weights have one scale a tensor.
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
from qtool.builtin.exporters.mixed import (
    fused_apart,
    groups_of,
    mixed_consumers,
    refuse_mixed_experts,
    refuse_several,
)
from qtool.builtin.exporters.modelopt_config import (
    HF_QUANT_CONFIG,
    Algorithm,
    hf_quant_config,
    quantization_config,
)
from qtool.builtin.exporters.packed_layouts import read_packed
from qtool.builtin.exporters.read_back import (
    CheckpointReader,
    compare_codes,
    empty_model,
    telling_rows,
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
from qtool.engine.exporter import Exported
from qtool.engine.grid import Grid
from qtool.engine.packed import PackedLinear, take_rows
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, SchemeError, UsageError
from qtool.model.graph import LinearSite
from qtool.numerics.scales import encode_scale
from qtool.scheme import ModelScheme

_GROUP = 16
_FP8: tuple[Algorithm, Algorithm] = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_FLOAT_SCALES = ("fp32", "bf16", "fp16")
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
        refuse_several(subject, "modelopt")
        refuse_mixed_experts(subject, "modelopt")
        algorithm = choose_algorithm(groups_of(subject)[0][0])
        refuse_all_but_codes(subject, "modelopt")
        if algorithm not in _FP8:
            check_global_scales(subject)
        elif subject.model.graph.dims.experts > 0:
            raise UsageError(
                "no consumer reads experts in FP8 with such scales and dynamic inputs from modelopt",
                hint="qtool pack SOURCE --to compressed-tensors",
            )

    def write(self, subject: Subject, directory: Path) -> Exported:
        """Write the checkpoint into an empty folder."""
        algorithm, model = choose_algorithm(groups_of(subject)[0][0]), subject.model
        dtype = checkpoint_dtype(quantized_weights(subject), model.dtype)

        def made(linear: LinearSite, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {} if linear.spec.kept or linear.name in subject.kept else _stored(subject, linear)

        ignored = sorted(not_quantized(model, subject.kept))
        config = quantization_config(algorithm, ignored)
        sizes = write_checkpoint(subject, directory, made, dtype=dtype, quantization=config)
        write_json(directory / HF_QUANT_CONFIG, hf_quant_config(algorithm, ignored))
        details: dict[str, object] = {"layout": f"modelopt {algorithm}", "dtype": str(dtype).removeprefix("torch.")}
        details |= {"bytes": vars(sizes), "left_alone": left_alone_counts(model)}
        facts = artifact_facts(groups_of(subject)[0][0], dtype=dtype)
        facts |= {"apart": bool(fused_apart(subject)), "inputs": "dynamic"}
        (case,) = cases_of(config, experts=model.graph.dims.experts > 0, **facts)
        return Exported(mixed_consumers([(subject.linears, case)]), details)

    def verify(self, subject: Subject, directory: Path) -> None:
        """Compare every code and scale with ours, and decode rows of every linear by ModelOpt's formula.

        It is applied as the written config says.

        Raises:
            ArtifactError: Names the first weight, or input scale, that differs.
        """
        model = subject.model
        config = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
        algorithm, plain = config.quantization_config["quant_algo"], deepcopy(config)
        del plain.quantization_config
        module = with_linear_experts(empty_model(plain, model), model)
        reader = CheckpointReader(directory, model)
        reader.compare(with_stored_shapes(module, subject.linears, lambda child, _: _shapes(child, algorithm)))
        for linear in subject.linears:
            ours, tensors = subject.packed(linear), reader.module(linear.name)
            _compare(linear.name, tensors, algorithm, ours, subject.weight_grid(linear))
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
    whole = {("channel", "token"): _FP8[1], ("tensor", "tensor"): _FP8[0]}
    algorithm = None if activations is None else whole.get((weights.strategy, activations.strategy))
    held = activations is not None and replace(activations, format="fp8", scale="fp32", clip=1.0) == activations
    if algorithm is None or not held or weights.scale not in _FLOAT_SCALES:
        reason = "FP8 weights with a scale a row go with FP8 inputs with one a token, those with one a tensor likewise"
        raise _refusal(reason, scheme, "--scheme FP8_DYNAMIC")
    return algorithm


def _stored(subject: Subject, linear: LinearSite) -> dict[str, Tensor]:
    """Return what is stored of a linear, named below it."""
    found, scheme = subject.packed(linear), quantized_weights(subject)
    parameters = found.parameters
    if parameters.global_scale is None:
        rows = scheme.strategy == "channel"
        scale = parameters.scale.float().squeeze(-1) if rows else parameters.scale.float().reshape(())
        return {"weight": found.stream.view(torch.float8_e4m3fn), "weight_scale": scale}
    tensors = {
        "weight": found.stream,
        "weight_scale": encode_scale(parameters.scale, scheme.scale),
        "weight_scale_2": parameters.global_scale.float().reshape(()),
    }
    calibrated = subject.scheme.of(linear.name).activations is not None
    multiplier = input_multiplier(subject, linear) if calibrated else None
    return tensors if multiplier is None else tensors | {"input_scale": multiplier.float().reshape(())}


def _shapes(linear: nn.Linear, algorithm: Algorithm) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a linear's tensors, without its bias."""
    n_out, n_in = linear.out_features, linear.in_features
    if algorithm in _FP8:
        return {"weight": (n_out, n_in), "weight_scale": () if algorithm == "FP8" else (n_out,)}
    shapes = {"weight": (n_out, n_in // 2), "weight_scale": (n_out, n_in // _GROUP), "weight_scale_2": ()}
    return shapes | ({"input_scale": ()} if algorithm == "NVFP4" else {})


def _compare(name: str, tensors: Mapping[str, Tensor], algorithm: Algorithm, ours: PackedLinear, grid: Grid) -> None:
    """Compare what is stored of one linear with what was packed."""
    parameters, (part,), n_out = ours.parameters, grid.parts, len(ours.stream)
    try:
        read = read_packed("modelopt", tensors, ours.n_in, part.scheme, grid)
        compare_codes(name, read, ours)
        multipliers = (read.parameters.global_scale, parameters.global_scale)
        if multipliers != (None, None) and multipliers[0] != multipliers[1]:
            raise weight_difference(name, *(torch.as_tensor(one) for one in multipliers))
        for rows in telling_rows(ours, 1):
            own = ours.rows(rows).weight(grid)
            decoded = _decode({leaf: take_rows(one, rows, n_out) for leaf, one in tensors.items()}, algorithm)
            if decoded.shape != own.shape or not torch.equal(decoded, own):
                raise weight_difference(name, decoded, own)
    except _UNREADABLE as error:
        reason = str(error).split("\n")[0]
        raise ArtifactError(f"cannot decode `{name}`", facts=(("reason", reason),)) from error


def _decode(tensors: Mapping[str, Tensor], algorithm: Algorithm) -> Float[Tensor, "out in"]:
    """Return the float32 weight that stored tensors stand for."""
    raw, scale = tensors["weight"], tensors["weight_scale"].float()
    if algorithm in _FP8:
        return raw.float() * scale.unsqueeze(-1)
    pairs = torch.stack((raw % 16, raw // 16), dim=-1).flatten(1)
    step = scale * tensors["weight_scale_2"]
    return torch.tensor(_E2M1)[pairs.long()] * step.repeat_interleave(_GROUP, dim=1)


def _refusal(reason: str, scheme: ModelScheme, nearest: str) -> SchemeError:
    facts = (("weights", scheme.weights), ("activations", scheme.activations or "16 bits"))
    return SchemeError(reason, facts=facts, hint=f"nearest that fits: {nearest}")
