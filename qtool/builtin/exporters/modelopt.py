"""NVIDIA ModelOpt's checkpoints: NVFP4 and FP8, for vLLM, SGLang and TensorRT-LLM.

All of it is what the artifact holds in other names: ``weight_scale_2`` and ``input_scale`` are the multipliers whose
reciprocals compressed-tensors stores. FP8 has a scale an output row, or one a tensor; beside the latter vLLM and SGLang
ask for calibrated inputs (``fp8-tensor-static``), and other inputs are dynamic. Linears of several algorithms are
``MIXED_PRECISION``, of which ``quantized_layers`` says what each linear has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig

from qtool.builtin.exporters.cache_scales import (
    IN_ATTENTION,
    cache_scales,
    check_cache_scales,
    compare_cache_scales,
    with_cache_scales,
)
from qtool.builtin.exporters.checkpoint import left_alone_counts, write_checkpoint
from qtool.builtin.exporters.compressed_tensors import not_quantized
from qtool.builtin.exporters.consumer_process import consumer_reader
from qtool.builtin.exporters.ct_layout import checkpoint_dtype
from qtool.builtin.exporters.mixed import (
    fused_apart,
    groups_of,
    mixed_consumers,
    refuse_mixed_experts,
)
from qtool.builtin.exporters.modelopt_config import (
    HF_QUANT_CONFIG,
    Algorithm,
    algorithm_of,
    hf_quant_config,
    quantization_config,
)
from qtool.builtin.exporters.nearest import check_schemes
from qtool.builtin.exporters.packed_layouts import read_packed
from qtool.builtin.exporters.packed_source import PackedSource
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
    refuse_all_but_codes,
    refuse_ends,
)
from qtool.builtin.exporters.shards import write_json
from qtool.builtin.exporters.stored_names import stored_tensor_name
from qtool.consumers.checkpoint import artifact_facts
from qtool.consumers.config import cases_of
from qtool.consumers.shapes import shapes_of
from qtool.engine.exporter import Exported
from qtool.engine.grid import Grid
from qtool.engine.packed import PackedLinear, one_thread, take_rows
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, SchemeError, UsageError
from qtool.model.graph import LinearSite
from qtool.numerics.scales import encode_scale
from qtool.scheme import ModelScheme
from qtool.scheme_parts import KeysAndValues

_GROUP = 16
_FP8_CACHE = ("fp8", "tensor", True)
_FP8: tuple[Algorithm, Algorithm] = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_FLOAT_SCALES = ("fp32", "bf16", "fp16")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_UNREADABLE = (KeyError, ValueError, RuntimeError)


class ModelOpt(PackedSource):
    """Writes ``weight``, ``weight_scale`` and, for NVFP4, ``weight_scale_2`` and ``input_scale``."""

    version = 1

    def check(self, subject: Subject) -> None:
        """Refuse schemes without an algorithm, and what goes beyond codes and scales.

        Raises:
            UsageError: Names what does not fit and the nearest that does.
        """
        refuse_ends(subject, "modelopt")
        check_schemes(subject, choose_algorithm)
        check_cache_scales(subject)
        algorithms, static = _algorithms(subject), _static(subject)
        refuse_mixed_experts(subject, "modelopt")
        refuse_all_but_codes(subject, "modelopt")
        _dtype(subject)
        check_global_scales(subject)
        whole = [linear for linear in algorithms.get("FP8", ()) if linear.name not in static]
        if static and whole:
            raise SchemeError(
                "one config says of all linears in FP8 whether their inputs are calibrated",
                facts=(("calibrated", min(static)), ("as the model runs", whole[0].name)),
                hint="nearest that fits: --activations fp8-tensor-static for all of them",
            )
        rows = algorithms.get(_FP8[1], ())
        if any(linear.expert is not None for linear in (*whole, *rows)):
            raise UsageError(
                "no consumer reads experts in FP8 with such scales and dynamic inputs from modelopt",
                hint="qtool pack SOURCE --to compressed-tensors",
            )

    def write(self, subject: Subject, directory: Path) -> Exported:
        """Write the checkpoint into an empty folder."""
        model, dtype = subject.model, _dtype(subject)

        def made(linear: LinearSite, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {} if linear.spec.kept or linear.name in subject.kept else _stored(subject, linear)

        ignored = sorted(not_quantized(model, subject.kept))
        algorithms = _algorithms(subject)
        layers = {algorithm: _stored_names(subject, linears) for algorithm, linears in algorithms.items()}
        static, cached = bool(_static(subject)), _cache_scales(subject)
        config = quantization_config(layers, ignored, static=static, cached=bool(cached))
        sizes = write_checkpoint(subject, directory, made, dtype=dtype, quantization=config, calibrated=cached)
        write_json(directory / HF_QUANT_CONFIG, hf_quant_config(layers, ignored, cached=bool(cached)))
        said = f"modelopt {config['quant_algo']}"
        details: dict[str, object] = {"layout": said, "dtype": str(dtype).removeprefix("torch.")}
        details |= {"bytes": vars(sizes), "left_alone": left_alone_counts(model)}
        each, about = [], {"apart": bool(fused_apart(subject)), "inputs": "static" if static else "dynamic"}
        cases = {case.layout: case for case in cases_of(config, **about)}
        for algorithm, linears in algorithms.items():
            facts = artifact_facts(subject.scheme.of(linears[0].name), dtype=dtype)
            facts["experts"] = any(linear.expert is not None for linear in linears)
            each.append((linears, replace(cases[algorithm], **facts)))
        return Exported(mixed_consumers(each), details)

    @one_thread()
    def verify(self, subject: Subject, directory: Path) -> str:
        """Compare every code and scale with ours, and decode rows of every linear by ModelOpt's formula.

        It is applied as the written config says. Where ModelOpt is installed it decodes those rows too.

        Raises:
            ArtifactError: Names the first weight, or input scale, that differs.
        """
        model = subject.model
        config = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
        said, plain = _said(directory, config.quantization_config), deepcopy(config)
        del plain.quantization_config
        module = with_linear_experts(empty_model(plain, model), model)
        reader = CheckpointReader(directory, model)

        def algorithm_at(linear: LinearSite) -> str:
            return algorithm_of(said, *_stored_names(subject, [linear]))

        def shapes(child: nn.Linear, own: LinearSite) -> dict[str, tuple[int, ...]]:
            calibrated = input_multiplier(subject, own) is not None
            return _shapes(child, algorithm_at(own)) | ({"input_scale": ()} if calibrated else {})

        cached = _cache_scales(subject)
        reader.compare(with_cache_scales(with_stored_shapes(module, subject.linears, shapes), cached))
        compare_cache_scales(cached, reader)
        with consumer_reader("nvidia-modelopt", directory) as theirs:
            for linear in subject.linears:
                ours, tensors, grid = subject.packed(linear), reader.module(linear.name), subject.weight_grid(linear)
                _compare(linear.name, tensors, algorithm_at(linear), ours, grid)
                theirs.compare_rows(linear.name, reader.name(linear.name), ours, grid)
                multiplier = input_multiplier(subject, linear)
                if multiplier is not None and float(multiplier) != float(tensors["input_scale"]):
                    raise weight_difference(f"{linear.name} (input scale)", tensors["input_scale"], multiplier)
        return theirs.said


def choose_algorithm(scheme: ModelScheme) -> Algorithm:
    """Return what ModelOpt calls a scheme.

    Raises:
        SchemeError: It has no name.
    """
    weights, activations = scheme.weights, scheme.activations
    if weights is None:
        raise SchemeError("the scheme leaves the weights as they are", hint="--scheme NVFP4")
    kv = scheme.kv
    if kv is not None and (isinstance(kv, KeysAndValues) or (kv.format, kv.strategy, kv.static) != _FP8_CACHE):
        reason = "modelopt has an FP8 cache with static scales, one for keys and one for values, and no other"
        raise SchemeError(reason, facts=(("kv", kv),))
    if scheme.outputs is not None:
        raise SchemeError("modelopt does not say that outputs are rounded", facts=(("outputs", scheme.outputs),))
    block = ("group", _GROUP, "e4m3", True)
    if (weights.strategy, weights.group_size, weights.scale, weights.symmetric) == block:
        if activations is None:
            return "W4A16_NVFP4"
        same = (activations.strategy, activations.group_size, activations.scale, activations.symmetric) == block
        if same and activations.clip == 1 and activations.outlier_threshold is None:
            return "NVFP4"
        raise _refusal("NVFP4 weights go with NVFP4 activations", scheme)
    if weights.format != "fp8":
        raise _refusal("modelopt is written for NVFP4 and FP8 weights", scheme)
    whole = {("channel", "token"): _FP8[1], ("tensor", "tensor"): _FP8[0]}
    algorithm = None if activations is None else whole.get((weights.strategy, activations.strategy))
    held = activations is not None and replace(activations, format="fp8", scale="fp32") == activations
    clipped = activations is not None and activations.clip != 1 and not activations.static
    if algorithm is None or not held or clipped or weights.scale not in _FLOAT_SCALES:
        reason = "FP8 weights with a scale a row go with FP8 inputs with one a token, those with one a tensor likewise"
        raise _refusal(reason, scheme)
    return algorithm


def _algorithms(subject: Subject) -> dict[Algorithm, list[LinearSite]]:
    """Return the linears of each algorithm, that of most linears first.

    Raises:
        SchemeError: A scheme has no algorithm.
    """
    found: dict[Algorithm, list[LinearSite]] = {}
    for scheme, linears in groups_of(subject):
        found.setdefault(choose_algorithm(scheme), []).extend(linears)
    return found


def _cache_scales(subject: Subject) -> dict[str, Tensor]:
    """Return the static scales of a cache: inside the projections of keys and values, where there are such."""
    attention = subject.model.graph.family.attention
    modules = {linear.spec.module for linear in subject.model.graph.linears}
    apart = {f"{attention}.{one}_proj" for one in "kv"} <= modules
    names = {place: f"{leaf[0]}_proj.{leaf}" if apart else leaf for place, leaf in IN_ATTENTION.items()}
    return cache_scales(subject, names, ())


def _static(subject: Subject) -> set[str]:
    """Return the names of the linears in FP8 whose inputs have a calibrated scale."""
    inputs = ((linear.name, subject.scheme.of(linear.name).activations) for linear in subject.linears)
    return {name for name, activations in inputs if activations is not None and activations.static}


def _dtype(subject: Subject) -> torch.dtype:
    """Return what the checkpoint's other tensors are stored in: bfloat16 where any linear is in FP4.

    Raises:
        SchemeError: float16 scales on a bfloat16 model.
    """
    weights = [scheme.weights for scheme, _ in groups_of(subject) if scheme.weights is not None]
    asked = [checkpoint_dtype(one, subject.model.dtype) for one in weights]
    return torch.bfloat16 if torch.bfloat16 in asked else asked[0]


def _stored_names(subject: Subject, linears: Sequence[LinearSite]) -> list[str]:
    """Return what files call some linears."""
    named = (stored_tensor_name(subject.model, f"{linear.name}.weight") for linear in linears)
    return [name.removesuffix(".weight") for name in named]


def _said(directory: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the config says of linears, if the one beside it says the same.

    Raises:
        ArtifactError: They differ.
    """
    beside = json.loads((directory / HF_QUANT_CONFIG).read_text(encoding="utf-8"))["quantization"]
    for key in ("quant_algo", "quantized_layers"):
        if beside.get(key) != config.get(key):
            raise ArtifactError(f"config.json and {HF_QUANT_CONFIG} say another `{key}`", hint="pack again")
    return config


@one_thread()
def _stored(subject: Subject, linear: LinearSite) -> dict[str, Tensor]:
    """Return what is stored of a linear, named below it."""
    found, scheme = subject.packed(linear), subject.scheme.of(linear.name).weights
    if scheme is None:
        raise TypeError(scheme)
    parameters = found.parameters
    if parameters.global_scale is None:
        rows = scheme.strategy == "channel"
        scale = parameters.scale.float().squeeze(-1) if rows else parameters.scale.float().reshape(())
        tensors = {"weight": found.stream.view(torch.float8_e4m3fn), "weight_scale": scale}
    else:
        tensors = {
            "weight": found.stream,
            "weight_scale": encode_scale(parameters.scale, scheme.scale),
            "weight_scale_2": parameters.global_scale.float().reshape(()),
        }
    multiplier = input_multiplier(subject, linear)
    return tensors if multiplier is None else tensors | {"input_scale": multiplier.float().reshape(())}


def _shapes(linear: nn.Linear, algorithm: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a linear's tensors, without its bias and what is calibrated."""
    (case,) = cases_of({"quant_method": "modelopt", "quant_algo": algorithm})
    return shapes_of(case, linear.out_features, linear.in_features)


def _compare(name: str, tensors: Mapping[str, Tensor], algorithm: str, ours: PackedLinear, grid: Grid) -> None:
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


def _decode(tensors: Mapping[str, Tensor], algorithm: str) -> Float[Tensor, "out in"]:
    """Return the float32 weight that stored tensors stand for."""
    raw, scale = tensors["weight"], tensors["weight_scale"].float()
    if algorithm in _FP8:
        return raw.float() * scale.unsqueeze(-1)
    pairs = torch.stack((raw % 16, raw // 16), dim=-1).flatten(1)
    step = scale * tensors["weight_scale_2"]
    return torch.tensor(_E2M1)[pairs.long()] * step.repeat_interleave(_GROUP, dim=1)


def _refusal(reason: str, scheme: ModelScheme) -> SchemeError:
    facts = (("weights", scheme.weights), ("activations", scheme.activations or "16 bits"))
    return SchemeError(reason, facts=facts)
