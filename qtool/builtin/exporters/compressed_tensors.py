"""compressed-tensors checkpoints: what vLLM, SGLang and transformers load."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, compress_module
from compressed_tensors.compressors.base import COMPRESSIBLE_MODULE_TYPES
from compressed_tensors.quantization import QuantizationScheme, apply_quantization_config
from compressed_tensors.utils import match_targets
from torch import Tensor, nn
from transformers import AutoConfig, CompressedTensorsConfig

from qtool.builtin.exporters.cache_scales import (
    IN_ATTENTION,
    attention_classes,
    cache_scales,
    check_cache_scales,
    check_hooked_attentions,
    compare_cache_scales,
)
from qtool.builtin.exporters.checkpoint import left_alone_counts, write_checkpoint
from qtool.builtin.exporters.ct_config import quantization_config
from qtool.builtin.exporters.ct_layout import checkpoint_dtype, choose_layout, with_groups_in_cache
from qtool.builtin.exporters.ct_tensors import global_divisor, stored_tensors
from qtool.builtin.exporters.ct_transforms import (
    OnlineTransform,
    expect_matrices,
    matrices_of,
    matrices_of_attentions,
    online_transforms,
    transform_config,
    verify_transforms,
)
from qtool.builtin.exporters.mixed import groups_of, mixed_consumers, refuse_mixed_experts
from qtool.builtin.exporters.nearest import Check, check_schemes
from qtool.builtin.exporters.packed_layouts import read_packed
from qtool.builtin.exporters.packed_source import PackedSource
from qtool.builtin.exporters.read_back import (
    CheckpointReader,
    compare_codes,
    empty_model,
    telling_rows,
    versions,
    weight_difference,
    with_linear_experts,
)
from qtool.builtin.exporters.refusals import (
    check_global_scales,
    input_multiplier,
    input_zero_point,
    output_multiplier,
    output_zero_point,
    refuse_all_but_codes,
)
from qtool.builtin.exporters.stored_names import stored_tensor_name
from qtool.consumers.checkpoint import artifact_facts
from qtool.consumers.config import cases_of
from qtool.engine.exporter import Exported
from qtool.engine.grid import Grid
from qtool.engine.packed import PackedLinear, one_thread, take_rows
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, SchemeError, UsageError
from qtool.model.graph import TOKENS, LinearSite
from qtool.model.source import Model
from qtool.scheme import ModelScheme

# The library does not pack the zero points of a model without weights; their shapes show when they are decoded.
_ZERO_POINT = ".weight_zero_point"
_STATIC = frozenset({"input_scale", "input_zero_point", "output_scale", "output_zero_point", "output_global_scale"})
# A float32 division, and the product that stands for it, are each half a unit in the last place off.
_RECIPROCAL_ERROR = 2.0**-23
_UNREADABLE = (KeyError, IndexError, ValueError, RuntimeError)
_EXPERTS = r"re:.*\.experts\..*"
"""What a config calls the experts: transformers looks for their scheme in the group that names them by a pattern."""


class CompressedTensors(PackedSource):
    """Writes ``pack-quantized``, ``int-quantized``, ``float-quantized`` and the layouts of blocks of floats."""

    version = 1

    def check(self, subject: Subject) -> None:
        """Refuse schemes without a layout, adapters, most online operators, and scales that fused layers cannot share.

        Raises:
            UsageError: Names what does not fit and the nearest that does.
        """
        check_schemes(subject, _check_scheme(subject))
        with_groups_in_cache(subject.scheme, subject.model.graph.dims)
        check_cache_scales(subject)
        _dtype(subject)
        refuse_mixed_experts(subject, "compressed-tensors")
        refuse_all_but_codes(subject, "compressed-tensors", online=True)
        if any(one.of_attentions for one in online_transforms(subject)) or subject.cache is not None:
            check_hooked_attentions(subject)
        if subject.scheme.scale_per_head:
            raise UsageError(
                "compressed-tensors has one activation scheme for all linears, without a scale per head at o_proj",
                hint="--scheme W4A4, or pack --to hf",
            )
        check_global_scales(subject)

    def write(self, subject: Subject, directory: Path) -> Exported:
        """Write the checkpoint into an empty folder."""
        (scheme, linears), *others = groups_of(subject)
        layout, dtype, transforms = choose_layout(scheme), _dtype(subject), online_transforms(subject)
        rest = [(one, choose_layout(one), _targets(subject.model, own)) for one, own in others]
        apart = [end.name for end in subject.coded_ends]
        targets = _targets(subject.model, linears)
        if not others:  # names before classes, which would be matched first
            targets = [*_targets(subject.model, subject.coded_ends), "Linear"]
        scheme = with_groups_in_cache(scheme, subject.model.graph.dims)
        attentions = tuple(attention_classes(subject.model)) if scheme.queries is not None else ()
        ignore = not_quantized(subject.model, subject.kept, apart)
        config = quantization_config(scheme, layout, ignore, rest, targets, attentions)
        if transforms:
            config |= {"transform_config": transform_config(transforms)}

        @one_thread()
        def made(linear: LinearSite, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
            own = subject.scheme.of(linear.name)
            if linear.spec.kept:
                return {}
            beside = matrices_of(transforms, linear.name, dtype)
            if own.weights is None:
                return beside
            tensors = stored_tensors(subject.packed(linear), own.weights, choose_layout(own))
            return tensors | _calibrated(subject, linear) | beside

        cached = cache_scales(subject, IN_ATTENTION, (1,)) | matrices_of_attentions(transforms, dtype)
        sizes = write_checkpoint(subject, directory, made, dtype=dtype, quantization=config, calibrated=cached)
        details: dict[str, object] = {"layout": config["format"], "dtype": str(dtype).removeprefix("torch.")}
        details |= {"bytes": vars(sizes), "left_alone": left_alone_counts(subject.model)}
        return Exported(_consumers(subject, config, dtype, transforms), details)

    @one_thread()
    def verify(self, subject: Subject, directory: Path) -> str:
        """Compare every code, scale and zero point with ours, and decode rows of every linear with the library.

        It decodes as the written config says, to the dtype of the scales (FP4 to bfloat16), so ours are cast to that
        dtype first. Names and shapes are compared with the model that transformers builds from the config.

        Raises:
            ArtifactError: Names the first weight that differs.
        """
        model = subject.model
        config = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
        parsed = CompressedTensorsConfig.from_dict(config.quantization_config)  # type: ignore[no-untyped-call]
        reader = CheckpointReader(directory, model)
        skeleton, transforms = _skeleton(config, parsed, model), online_transforms(subject)
        expect_matrices(skeleton, transforms)
        reader.compare(skeleton, any_shape=_ZERO_POINT)
        compare_cache_scales(cache_scales(subject, IN_ATTENTION, (1,)), reader)
        stored = {one.name: reader.module(one.module)["weight"] for one in transforms if one.stored}
        verify_transforms(transforms, config.quantization_config.get("transform_config"), stored)
        targets = {
            target: group for group in parsed.quantization_config.config_groups.values() for target in group.targets
        }
        for linear in subject.coded:
            tensors = reader.module(linear.name)
            kind = nn.Embedding if linear.reads == TOKENS else nn.Linear
            found = match_targets(linear.name, kind(1, 1, device="meta"), targets)
            if not found:
                raise ArtifactError(f"no group of the config is for `{linear.name}`")
            _compare(linear.name, tensors, targets[found[0]], subject.packed(linear), subject.weight_grid(linear))
            inputs = _calibrated(subject, linear)
            for leaf in sorted(_STATIC & inputs.keys()):
                if tensors[leaf].dtype != inputs[leaf].dtype or not torch.equal(tensors[leaf], inputs[leaf]):
                    raise weight_difference(f"{linear.name} ({leaf.replace('_', ' ')})", tensors[leaf], inputs[leaf])
        return versions("compressed-tensors", "transformers")


def _consumers(
    subject: Subject, config: Mapping[str, Any], dtype: torch.dtype, transforms: Sequence[OnlineTransform]
) -> dict[str, str]:
    """Return what loads the checkpoint, and what each loader executes of which linears.

    Args:
        subject: What was written.
        config: Its ``quantization_config``.
        dtype: What its other tensors are stored in.
        transforms: Rotations in the forward pass.
    """
    biased = any(subject.model.has(f"{name}.bias") for transform in transforms for name in transform.targets)
    each, groups = [], groups_of(subject)
    for (scheme, linears), case in zip(groups, cases_of(config, biased=biased), strict=True):
        experts = {linear.expert is not None for linear in linears}
        facts = artifact_facts(scheme, dtype=dtype) | {"experts": True in experts, "alone": False not in experts}
        each.append((linears, replace(case, **facts)))
    return mixed_consumers(each)


def _check_scheme(subject: Subject) -> Check:
    """Return the check of a scheme by itself, which knows what the model is stored in."""

    def check(scheme: ModelScheme) -> None:
        choose_layout(scheme)
        if scheme.weights is not None:
            checkpoint_dtype(scheme.weights, subject.model.dtype)

    return check


def _calibrated(subject: Subject, linear: LinearSite) -> dict[str, Tensor]:
    """Return what is stored of the input and of the output of a linear: zero points are signed, as codes are."""
    own = subject.scheme.of(linear.name)
    ends = (
        ("input", own.activations, input_multiplier(subject, linear), input_zero_point(subject, linear)),
        ("output", own.outputs, output_multiplier(subject, linear), output_zero_point(subject, linear)),
    )
    found: dict[str, Tensor] = {}
    for end, scheme, multiplier, zero in ends:
        if multiplier is None or scheme is None:
            continue
        if not scheme.static:
            found[f"{end}_global_scale"] = global_divisor(multiplier)
            continue
        found[f"{end}_scale"] = multiplier.float().reshape(1)
        if zero is not None:
            middle = 1 << subject.plugins.format(scheme.format).bits - 1
            found[f"{end}_zero_point"] = (zero.short() - middle).to(torch.int8).reshape(1)
    return found


def _dtype(subject: Subject) -> torch.dtype:
    """Return what the checkpoint's other tensors are stored in.

    Raises:
        SchemeError: The scales of linears ask for several.
    """
    asked = {
        one.weights: checkpoint_dtype(one.weights, subject.model.dtype) for one, _ in groups_of(subject) if one.weights
    }
    first, *others = asked
    for other in others:
        if asked[other] != asked[first]:
            raise SchemeError(
                "loaders cast all scales to one dtype, and these linears have scales of two",
                facts=(("most have", first), ("others", other)),
                hint=f"nearest that fits: {replace(other, scale='bf16')} for the others",
            )
    return asked[first]


def _targets(model: Model, linears: Iterable[LinearSite]) -> list[str]:
    """Return what the config calls some linears: by their names in transformers and in files; experts together.

    An embedding goes by its class where it is the only one: engines look its name up for some families only.
    """
    linears = tuple(linears)
    names = {linear.name: None for linear in linears if linear.expert is None}
    found = [name for name, child in _modules(model) if isinstance(child, nn.Embedding)]
    if len(found) == 1 and names.keys() & set(found):
        own = {name: None for name in names if name not in found}
        return [*_targets(model, [one for one in linears if one.name in own or one.expert is not None]), "Embedding"]
    names |= {stored_tensor_name(model, f"{name}.weight").removesuffix(".weight"): None for name in names}
    return [*names, *([_EXPERTS] if any(linear.expert is not None for linear in linears) else [])]


def _modules(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model as transformers builds it, by name."""
    yield from empty_model(deepcopy(model.config), model).named_modules()


def not_quantized(model: Model, kept: Iterable[str] = (), others: Iterable[str] = ()) -> set[str]:
    """Return the names of the linears that are not quantized: head, routers, gates, towers, heads for further tokens.

    Some loaders match the names of modules in transformers, some those in files, so both are given.

    Args:
        model: The original model.
        kept: Names of linears of blocks that the scheme leaves in 16 bits.
        others: Names of linears outside of the blocks that are quantized.
    """
    quantized = {*(linear.name for linear in model.graph.linears), *others} - set(kept)
    names = {name for name, child in _modules(model) if isinstance(child, nn.Linear) and name not in quantized}
    names |= {
        linear.name for i in range(model.graph.dims.num_layers) for linear in model.graph.readers_of(i)
    } - quantized
    matrices = (name for name in model.left_alone if len(model.places[name].shape) > 1 and name.endswith(".weight"))
    names |= {name.removesuffix(".weight") for name in matrices}
    names -= set(others)
    return names | {stored_tensor_name(model, f"{name}.weight").removesuffix(".weight") for name in names}


def _skeleton(config: Any, parsed: CompressedTensorsConfig, model: Model) -> nn.Module:  # noqa: ANN401
    """Build the model without weights as transformers does before it loads a compressed checkpoint.

    transformers decodes experts on loading; the library compresses linears in their place to what it decodes.
    """
    plain = deepcopy(config)
    del plain.quantization_config
    module = with_linear_experts(empty_model(plain, model), model)
    apply_quantization_config(module, parsed.quantization_config, show_progress=False)
    made: dict[object, nn.Module] = {}  # those of one shape and scheme are alike, and the library takes long for each
    for name, child in list(module.named_modules()):
        if not isinstance(child, COMPRESSIBLE_MODULE_TYPES):
            continue
        scheme, biased = repr(getattr(child, "quantization_scheme", None)), getattr(child, "bias", None) is not None
        alike = made.setdefault((type(child), tuple(child.weight.shape), biased, scheme), child)
        if alike is child:
            compress_module(child)  # leaves those without a scheme as they are
        else:
            module.set_submodule(name, deepcopy(alike))
    return module


def _compare(
    name: str, tensors: Mapping[str, Tensor], scheme: QuantizationScheme, ours: PackedLinear, grid: Grid
) -> None:
    """Compare what is stored of one linear with what was packed.

    With a global scale the consumer divides by what we multiply with. The stored divisor must be our multiplier's
    reciprocal; then the step is formed as the consumer forms it, since the two differ in the last bit.
    """
    parameters, (part,), n_out, n_in = ours.parameters, grid.parts, len(ours.stream), ours.n_in
    if "weight_shape" in tensors and tensors["weight_shape"].tolist() != [n_out, n_in]:
        raise weight_difference(name, tensors["weight_shape"], torch.tensor((n_out, n_in)))
    try:
        read = read_packed("compressed-tensors", tensors, n_in, part.scheme, grid)
    except (*_UNREADABLE, ArtifactError) as error:
        raise ArtifactError(f"cannot read the codes of `{name}`", facts=(("reason", error),)) from error
    compare_codes(name, read, ours)
    if parameters.global_scale is not None:
        divisor = tensors["weight_global_scale"]
        if abs(float(divisor.double() * parameters.global_scale.double()) - 1) > _RECIPROCAL_ERROR:
            raise weight_difference(f"{name} (global scale)", 1 / divisor, parameters.global_scale)
        ours = replace(ours, parameters=replace(parameters, scale=parameters.scale / divisor, global_scale=None))
    for rows in telling_rows(ours, part.block_rows):
        own = ours.rows(rows).weight(grid)
        decoded = _decode({leaf: take_rows(one, rows, n_out) for leaf, one in tensors.items()}, scheme, name)
        if decoded.shape != own.shape or not torch.equal(decoded, own.to(decoded.dtype)):
            raise weight_difference(name, decoded, own)


def _decode(tensors: Mapping[str, Tensor], scheme: QuantizationScheme, name: str) -> Tensor:
    """Decode some rows of a linear with the library."""
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    own = {key: tensor for key, tensor in tensors.items() if key in compressor.compression_param_names(scheme)}
    if "weight_shape" in own:
        own["weight_shape"] = torch.tensor((len(own["weight_packed"]), int(own["weight_shape"][1])))
    try:
        decoded: Tensor = compressor.decompress(own, scheme)["weight"]
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise ArtifactError(f"compressed-tensors cannot decode `{name}`", facts=(("reason", reason),)) from error
    return decoded
