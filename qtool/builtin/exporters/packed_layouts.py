"""Codes and scales of a packed checkpoint, read back as they are: what its config says, and its tensors.

compressed-tensors and ModelOpt are read, whoever wrote them: their layouts are those of the exporters of these names.
A global scale that compressed-tensors divides by is taken as its reciprocal in float32, which is what vLLM multiplies
with.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.builtin.exporters.ct_layout import BLOCKS
from qtool.builtin.exporters.ct_tensors import global_divisor
from qtool.builtin.exporters.modelopt_config import HF_QUANT_CONFIG, algorithm_of
from qtool.engine.grid import Grid
from qtool.engine.packed import PackedLinear
from qtool.errors import ArtifactError, NumericalError, SchemeError
from qtool.model.files import CONFIG
from qtool.numerics.packing import packed_size, unpack_codes
from qtool.numerics.scales import decode_scale
from qtool.scheme import Format, GroupParameters, ModelScheme, ScaleFormat, TensorScheme
from qtool.scheme_parts import Rule

LEAVES = ("weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_zero_point", "weight_shape")
INPUT_LEAVES = ("input_scale", "input_global_scale", "input_zero_point")
METHODS = ("compressed-tensors", "modelopt")


class Seen(NamedTuple):
    """What the files say of a linear, and no config does.

    Attributes:
        name: What they call it.
        scale: What its scales are stored in.
        calibrated: Whether a scale of its inputs is stored.
    """

    name: str
    scale: torch.dtype
    calibrated: bool


_FLOATS: Mapping[torch.dtype, ScaleFormat] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
_MODELOPT = {
    "NVFP4": ("nvfp4", "nvfp4"),
    "W4A16_NVFP4": ("nvfp4", None),
    "FP8": ("fp8-tensor", "fp8-tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8-channel", "fp8-token"),
}
_E2M1 = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def packed_method(directory: Path) -> str | None:
    """Return how a folder is packed, by its config: one of ``METHODS``, or None."""
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    entry = config.get("quantization_config") if isinstance(config, dict) else None
    if not entry and (directory / HF_QUANT_CONFIG).is_file():
        return "modelopt"
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    return method if method in METHODS else None


def read_scheme(directory: Path, seen: Mapping[str, Seen], lookup: Callable[[str], Format]) -> ModelScheme:
    """Return the scheme that a packed checkpoint says of its linears; exceptions are of ModelOpt's.

    Args:
        directory: The checkpoint.
        seen: What no config says of each linear.
        lookup: Finds a format by name.

    Raises:
        SchemeError: It has several schemes, or one that is not read back; names it.
    """
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8")).get("quantization_config") or {}
    if packed_method(directory) == "modelopt":
        return _modelopt_scheme(directory, config, seen, lookup)
    groups = list(config.get("config_groups", {}).values())
    if len(groups) != 1 or groups[0].get("targets") != ["Linear"] or not groups[0].get("weights"):
        raise _unread("several groups, or one that is not of all linears", config.get("config_groups"))
    for part in ("transform_config", "sparsity_config"):
        if config.get(part):
            raise _unread(f"a `{part}`", config[part])
    if config.get("kv_cache_scheme"):
        raise _unread("a quantized KV cache", config["kv_cache_scheme"])
    if groups[0].get("output_activations"):
        raise _unread("quantized outputs", groups[0]["output_activations"])
    weights, inputs = groups[0]["weights"], groups[0].get("input_activations")
    held = _tensor_scheme(weights, lookup, _FLOATS.get(next(iter(seen.values())).scale))
    return ModelScheme(held, None if not inputs else _input_scheme(inputs, lookup))


def read_packed(
    method: str, tensors: Mapping[str, Tensor], n_in: int, weights: TensorScheme, grid: Grid
) -> PackedLinear:
    """Return a linear's codes and scales from its stored tensors.

    Args:
        method: One of ``METHODS``.
        tensors: By the last part of their names. Not modified.
        n_in: Its inputs.
        weights: Scheme of the weights.
        grid: That of the scheme.

    Raises:
        KeyError: A tensor lacks.
        ArtifactError: A tensor has another shape than the layout.
    """
    (part,) = grid.parts
    raw = tensors.get("weight_packed", tensors.get("weight"))
    if raw is None:
        raise KeyError("weight")
    bits = part.format.bits
    if raw.dtype == torch.int32:
        stream = raw.view(torch.uint8)[:, : packed_size(n_in, bits)]
    else:
        stream = raw.view(torch.uint8) ^ 0x80 if raw.dtype == torch.int8 else raw.view(torch.uint8)
    codes = torch.empty((len(stream), n_in), dtype=torch.uint8, device="meta")
    shape = part.groups(codes).shape[:-1]
    scale = part.repeated(decode_scale(tensors["weight_scale"], weights.scale), len(codes))
    if stream.shape[1] != packed_size(n_in, bits) or scale.numel() != shape.numel():
        facts = (
            ("bytes of codes", tuple(stream.shape)),
            ("inputs", n_in),
            ("scales", tuple(scale.shape)),
            ("expected", tuple(shape)),
        )
        raise ArtifactError("the tensors of a linear do not fit its scheme", facts=facts)
    zeros = tensors.get("weight_zero_point")
    if not weights.symmetric:
        if zeros is None:
            raise KeyError("weight_zero_point")
        zeros = _unpack_words(zeros.T.contiguous(), bits, len(codes)).T.float().reshape(shape)
    multiplier = (
        tensors.get("weight_scale_2") if method == "modelopt" else _reciprocal(tensors.get("weight_global_scale"))
    )
    parameters = GroupParameters(
        scale.reshape(shape),
        None if weights.symmetric else zeros,
        None if multiplier is None else multiplier.float().reshape(()),
    )
    return PackedLinear(stream, bits, n_in, parameters)


def read_multiplier(method: str, tensors: Mapping[str, Tensor]) -> Float[Tensor, ""] | None:
    """Return the calibrated multiplier of a linear's inputs, None without one."""
    found = tensors.get("input_scale")
    if found is not None:
        return found.float().reshape(())
    return _reciprocal(tensors.get("input_global_scale"))


def check_reciprocal(name: str, parameters: GroupParameters, divisor: Tensor | None = None) -> None:
    """Refuse a linear whose weights differ in bfloat16 when a divisor stands for its multiplier.

    compressed-tensors divides a scale by its divisor and decodes to bfloat16; others multiply.

    Args:
        name: Name of the linear, for the message.
        parameters: Its scales.
        divisor: The divisor that is stored; None for the one that would be.

    Raises:
        NumericalError: A weight would differ; says how many scales do.
    """
    if parameters.global_scale is None:
        return
    divisor = global_divisor(parameters.global_scale) if divisor is None else divisor.float()
    scales = parameters.scale.unique().unsqueeze(-1)  # type: ignore[no-untyped-call]
    multiplied = (scales * parameters.global_scale) * _E2M1
    divided = (scales / divisor) * _E2M1
    differ = (multiplied.bfloat16() != divided.bfloat16()).any(-1)
    if bool(differ.any()):
        raise NumericalError(
            f"the global scale of `{name}` has no reciprocal that gives the same weights",
            facts=(("multiplier", float(parameters.global_scale)), ("scales that differ", int(differ.sum()))),
            hint="pack it from the artifact that it came from, or --to hf",
        )


def is_reciprocal(multiplier: Float[Tensor, ""]) -> bool:
    """Say whether the divisor that stands for a multiplier gives the same multiplier back, in float32."""
    return bool(_reciprocal(global_divisor(multiplier)) == multiplier)


def _modelopt_scheme(
    directory: Path,
    config: Mapping[str, Any],
    seen: Mapping[str, Seen],
    lookup: Callable[[str], Format],
) -> ModelScheme:
    """Return the scheme that ModelOpt's algorithm is; of several that of most linears, and the others by name."""
    said: Mapping[str, Any] = config
    if (directory / HF_QUANT_CONFIG).is_file():
        said = json.loads((directory / HF_QUANT_CONFIG).read_text(encoding="utf-8")).get("quantization", {})
    if said.get("kv_cache_quant_algo") or said.get("kv_cache_scheme"):
        raise _unread("a quantized KV cache", said.get("kv_cache_quant_algo") or said.get("kv_cache_scheme"))
    try:
        algorithms = {name: algorithm_of(said, one.name) for name, one in seen.items()}
    except (KeyError, TypeError) as error:
        raise _unread("linears whose algorithm it does not say", error) from error
    found = {name: _modelopt_linear(algorithms[name], one, lookup) for name, one in seen.items()}
    ((main, _), *_) = Counter(found.values()).most_common(1)
    others = {name: own for name, own in found.items() if own != main}
    rules = [Rule("weights", name, own.weights) for name, own in others.items() if own.weights != main.weights]
    rules += [
        Rule("activations", name, own.activations)
        for name, own in others.items()
        if own.activations != main.activations
    ]
    return replace(main, rules=tuple(rules))


def _modelopt_linear(algorithm: str, seen: Seen, lookup: Callable[[str], Format]) -> ModelScheme:
    """Return the scheme of linears of one algorithm."""
    if algorithm not in _MODELOPT:
        raise _unread(f"the algorithm `{algorithm}`", ", ".join(_MODELOPT))
    weights, activations = (None if text is None else _plain(text, lookup) for text in _MODELOPT[algorithm])
    if weights is not None and weights.format == "fp8":
        weights = replace(weights, scale=_FLOATS[seen.scale])
    if activations is not None and activations.strategy == "tensor":
        activations = replace(activations, static=seen.calibrated)
    elif seen.calibrated and (activations is None or activations.format == "fp8"):
        raise _unread("calibrated inputs beside the algorithm", algorithm)
    return ModelScheme(weights, activations)


def _plain(text: str, lookup: Callable[[str], Format]) -> TensorScheme:
    """Return the defaults of a format, with a strategy behind a dash."""
    name, _, strategy = text.partition("-")
    scheme = replace(lookup(name).defaults, format=name)
    return replace(scheme, strategy=strategy, group_size=None) if strategy else scheme  # type: ignore[arg-type]


def _tensor_scheme(said: Mapping[str, Any], lookup: Callable[[str], Format], scale: ScaleFormat | None) -> TensorScheme:
    """Return what ``QuantizationArgs`` say of weights, or of inputs but for their rules."""
    bits, element, strategy, size = (said.get(key) for key in ("num_bits", "type", "strategy", "group_size"))
    where = (bits or 0, size, "e4m3" if size == 16 else "e8m0")
    block = BLOCKS.get(where) if element == "float" and strategy in ("group", "tensor_group") else None
    if block is not None and (bits != 8 or said.get("scale_dtype") == "torch.uint8"):
        return _plain(block[0], lookup)
    name = f"int{bits}" if element == "int" else "fp8" if (element, bits) == ("float", 8) else ""
    if not name or strategy not in ("tensor", "channel", "token", "group") or scale is None:
        raise _unread("a scheme that is not read back", said)
    scheme = TensorScheme(
        name,
        symmetric=bool(said.get("symmetric", True)),
        strategy=strategy,
        group_size=size if strategy == "group" else None,
        scale=scale,
    )
    lookup(name).check(scheme)
    return scheme


def _input_scheme(said: Mapping[str, Any], lookup: Callable[[str], Format]) -> TensorScheme:
    """Return the scheme of inputs whose scales are fitted as the model runs, or one calibrated scale of FP8."""
    scheme = _tensor_scheme(said, lookup, "fp32")
    if not said.get("dynamic"):
        if (scheme.format, scheme.strategy) != ("fp8", "tensor"):
            raise _unread("inputs with calibrated scales", said)
        return replace(scheme, static=True)
    if scheme.format == "mxfp8":
        return replace(scheme, exponent_rule="rceil")  # as the library rounds them
    half = scheme.format.startswith("int") and scheme.symmetric
    return replace(scheme, range_rule="half") if half else scheme


def _unpack_words(words: Tensor, bits: int, n: int) -> Tensor:
    """Return codes of rows that are dense in little-endian words of 32 bits."""
    stream = words.contiguous().view(torch.uint8)
    return unpack_codes(stream[:, : packed_size(n, bits)].contiguous(), bits, n)


def _reciprocal(divisor: Tensor | None) -> Float[Tensor, ""] | None:
    return None if divisor is None else (1 / divisor.double()).float().reshape(())


def _unread(what: str, said: object) -> SchemeError:
    return SchemeError(
        f"the checkpoint has {what}, and only codes and scales of one scheme are transcoded",
        facts=(("config", said),),
        hint="pack it from the artifact that it came from",
    )
