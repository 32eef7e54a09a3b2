"""GGUF files for llama.cpp: codes and scales transcoded as they are, or everything dequantized to float16.

Norms and biases are float32, as llama.cpp wants them; embedding and head are in blocks where they are quantized, else
bfloat16 for a model in bfloat16 and float16 for any other. Beside an NVFP4 weight lie its tensor's scale and, of
calibrated inputs, theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import gguf
import torch
from torch import Tensor

from qtool.builtin.exporters.checkpoint import Sizes, left_alone_counts, refuse_compensation, stored_ends
from qtool.builtin.exporters.gguf_architecture import (
    add_keys,
    architecture_of,
    check_architecture,
    check_biases,
    check_tensor_scales,
    rope_factors,
    row_order,
    tensor_names,
)
from qtool.builtin.exporters.gguf_blocks import bytes_by_part, same_blocks, stored_blocks
from qtool.builtin.exporters.gguf_ends import check_embedding, stored_codes, types_of_ends
from qtool.builtin.exporters.gguf_file import FLOATS, Stored, TensorFile, read_tensors
from qtool.builtin.exporters.gguf_refusals import refuse_beside_codes, refuse_cache, refuse_online, refuse_segments
from qtool.builtin.exporters.gguf_types import Kind, check_values, choose_type
from qtool.builtin.exporters.gguf_vocabulary import add_vocabulary
from qtool.builtin.exporters.hf import code_bits, dense, offline
from qtool.builtin.exporters.mixed import groups_of, mixed_consumers
from qtool.builtin.exporters.nearest import Check, check_schemes
from qtool.builtin.exporters.packed_gguf import check_multipliers, open_gguf
from qtool.builtin.exporters.read_back import versions
from qtool.consumers.case import GGUF_FILE, Case
from qtool.consumers.checkpoint import artifact_facts
from qtool.engine.exporter import Exported
from qtool.engine.grid import Grid
from qtool.engine.packed import PackedLinear, one_thread
from qtool.engine.stored import INPUT_GLOBAL_SCALE
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, SchemeError, UsageError
from qtool.model.graph import LinearSite
from qtool.numerics.groups import each_parameter
from qtool.plugins import Plugins
from qtool.scheme import GroupParameters, ModelScheme

FILE = "model.gguf"


@dataclass(frozen=True)
class Codes:
    """A linear whose codes are stored in blocks: their type, what they are, and the grid that decodes them."""

    kind: Kind
    packed: PackedLinear
    grid: Grid


Item: TypeAlias = Tensor | Codes
Made: TypeAlias = Callable[[LinearSite, Mapping[str, Tensor]], Mapping[str, Item]]
"""Makes what is stored of a linear, named below it, in our order of rows; a ``bias`` replaces the folded one."""


class GGUF:
    """Writes Q4_0, Q4_1, Q8_0, MXFP4 or NVFP4, whichever holds the scheme; never rounds."""

    version = 1

    def open(self, directory: Path, plugins: Plugins, *, cache: Path, identity: str = "") -> Subject:
        """Open a GGUF file, or the folder of one, as what is to be packed."""
        return open_gguf(directory, plugins, cache=cache, identity=identity)

    def check_scales(self, subject: Subject, to: str) -> int:
        """Refuse multipliers of NVFP4 weights that another exporter would turn into other weights."""
        return check_multipliers(subject, to)

    @one_thread()
    def check(self, subject: Subject) -> None:
        """Refuse schemes that no type holds, values that it would round, and whatever llama.cpp does not run.

        Raises:
            UsageError: Names what does not fit and the nearest that does.
            ModelError: llama.cpp cannot read text as the model does.
        """
        refuse_cache(subject)
        check_schemes(subject, _check_scheme(subject), decoded="gguf-f16")
        kinds = {scheme.weights: _kind(scheme) for scheme, _ in groups_of(subject)}
        refuse_online(subject)
        refuse_segments(subject)
        refuse_compensation(subject)
        refuse_beside_codes(subject)
        _check_model(subject)
        if "NVFP4" in kinds.values():
            check_tensor_scales(subject)
            check_embedding(subject)
        for linear in subject.coded:
            weights = subject.scheme.of(linear.name).weights
            if weights is not None:
                check_values(linear.name, subject.packed(linear), weights, kinds[weights])

    def write(self, subject: Subject, directory: Path) -> Exported:
        """Write the file into an empty folder."""
        kinds = [_kind(scheme) for scheme, _ in groups_of(subject)]
        dtype = _dtype(subject)
        sizes = _write(subject, directory, _codes(subject), dtype=dtype, file_type=_file_type(subject, dtype))
        return _exported(subject, kinds, dtype, sizes)

    def verify(self, subject: Subject, directory: Path) -> str:
        """Compare every tensor with ours, bit for bit: codes and scales as they are stored, floats decoded.

        The official package reads the file, and decodes one block of each scale that a tensor has. The scale of an
        NVFP4 tensor is compared by itself, since its reader multiplies by it behind the product.

        Raises:
            ArtifactError: Names the first tensor that differs.
        """
        return _compare(subject, directory, _codes(subject), _dtype(subject))


class GGUFHalf:
    """Writes every matrix in float16: linears decoded, corrections merged, online operators undone."""

    version = 1

    def check(self, subject: Subject) -> None:
        """Refuse what is not quantized, and whatever llama.cpp does not run.

        Raises:
            UsageError: There are no codes, or the model is one that llama.cpp runs as something else.
            ModelError: llama.cpp cannot read text as the model does.
        """
        groups_of(subject)
        refuse_cache(subject)
        refuse_compensation(subject)
        _check_model(subject)

    def write(self, subject: Subject, directory: Path) -> Exported:
        """Write the file into an empty folder."""
        file_type = gguf.LlamaFileType.MOSTLY_F16
        sizes = _write(subject, directory, _half(subject), dtype=torch.float16, file_type=file_type)
        return _exported(subject, ["F16"] * len(groups_of(subject)), torch.float16, sizes)

    def verify(self, subject: Subject, directory: Path) -> str:
        """Read every tensor back with the official package and compare it with ours in float16, bit for bit.

        Raises:
            ArtifactError: Names the first tensor that differs.
        """
        return _compare(subject, directory, _half(subject), torch.float16)


_FILE_TYPES = {
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "MXFP4": gguf.LlamaFileType.MOSTLY_MXFP4_MOE,
    "NVFP4": gguf.LlamaFileType.MOSTLY_NVFP4,
}


def _file_type(subject: Subject, dtype: torch.dtype) -> int:
    """Return what llama.cpp calls a file by the type of most linears of its blocks."""
    of_blocks = (scheme for scheme, linears in groups_of(subject) if linears[0] in subject.linears)
    most = next(of_blocks, None)
    floats = gguf.LlamaFileType.MOSTLY_BF16 if dtype == torch.bfloat16 else gguf.LlamaFileType.MOSTLY_F16
    return int(floats if most is None else _FILE_TYPES[_kind(most)])


def _tensors(subject: Subject, made: Made, dtype: torch.dtype) -> Iterator[tuple[str, Item, LinearSite | None]]:
    """Yield every tensor as the file has it: its name there, what it holds, and the linear whose weight it is."""
    model, graph = subject.model, subject.model.graph
    names, found = tensor_names(model), architecture_of(model)
    for name, tensor in (stored_ends(subject, torch.float32) | rope_factors(model)).items():
        module, _, leaf = name.rpartition(".")
        yield f"{names.get(module, module)}.{leaf}", _float(subject, name, tensor, dtype), None
    for end in stored_codes(subject):
        for leaf, item in made(end, {}).items():
            full = item if isinstance(item, Codes) else _float(subject, f"{end.name}.{leaf}", item, dtype)
            yield f"{names[end.name]}.{leaf}", full, end
    for layer in range(graph.dims.num_layers):
        state = subject.beside(layer, torch.float32)
        check_biases(found, list(state))
        for linear in graph.linears_of(layer):
            module = linear.spec.module
            own = {"bias": state[f"{module}.bias"]} if f"{module}.bias" in state else {}
            order = row_order(model, linear.name)
            for leaf, item in {**own, **made(linear, state)}.items():
                full = item if isinstance(item, Codes) else _float(subject, f"{linear.name}.{leaf}", item, dtype)
                yield f"{names[linear.name]}.{leaf}", _reordered(full, order), linear if leaf != "bias" else None
            state = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] != module}
        for name, tensor in state.items():
            module, _, leaf = f"{graph.block_name(layer)}.{name}".rpartition(".")
            yield f"{names[module]}.{leaf}", _float(subject, f"{module}.{leaf}", tensor, dtype), None


def _float(subject: Subject, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of floats as it is stored; the weight of a norm with what the family adds to it.

    Raises:
        UsageError: It has values that float16 does not.
    """
    if tensor.ndim < 2:
        offset = subject.model.family.final_norm.offset if name.endswith("norm.weight") else 0.0
        return (tensor.double() + offset).float().reshape(-1)
    stored = tensor.to(dtype)
    if not torch.isfinite(stored).all():
        raise UsageError(
            f"`{name}` has values that float16 does not have",
            facts=(("largest", f"{tensor.abs().max():.3g}"),),
            hint="qtool pack SOURCE --to hf, which keeps bfloat16",
        )
    return stored


@one_thread()
def _reordered(item: Item, order: Tensor | None) -> Item:
    """Return the rows of a linear in the order of the file; what all rows share as it is."""
    if order is None:
        return item
    if isinstance(item, Codes):
        parameters = each_parameter(item.packed.parameters, lambda one: one if one.ndim < 2 else one[order])
        return replace(item, packed=replace(item.packed, stream=item.packed.stream[order], parameters=parameters))
    return item if item.numel() == 1 else item[order]


def _write(subject: Subject, directory: Path, made: Made, *, dtype: torch.dtype, file_type: int) -> Sizes:
    model, parts, of_ends = subject.model, Counter[str](), Counter[str]()
    with TensorFile(directory / FILE, architecture_of(model).name) as file:
        add_keys(file.keys, model)
        file.keys.add_file_type(file_type)
        file.keys.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(file.keys, model)
        for name, item, of_linear in _tensors(subject, made, dtype):
            counted = of_ends if of_linear in subject.coded_ends else parts
            if isinstance(item, Codes):
                blocks = (stored_blocks(item.packed.take(rows), item.kind) for rows in item.packed.pieces())
                counted.update(bytes_by_part(item.kind, file.add(name, blocks, item.kind)))
                continue
            size = file.add(name, [item])
            if of_linear is not None:
                counted[_part_of(name)] += size
        file.finish()
    return Sizes.of(parts, file.total, of_ends)


def _part_of(name: str) -> str:
    """Return the part that a tensor of a linear that is no blocks is of."""
    leaf = name.rpartition(".")[2]
    return {"scale": "scales", "input_scale": "inputs"}.get(leaf, "unquantized")


def _compare(subject: Subject, directory: Path, made: Made, dtype: torch.dtype) -> str:
    """Compare a file with what it was made from, and return whose code read it.

    Raises:
        ArtifactError: Names the first tensor that differs, is missing or too many.
    """
    read = read_tensors(directory / FILE)  # in the order of writing, one at a time
    for name, item, _ in _tensors(subject, made, torch.float32):
        found = next(read, Stored("", "none", ()))
        kind = item.kind if isinstance(item, Codes) else "F32" if item.ndim < 2 else FLOATS[dtype]
        if (found.name, found.kind) != (name, kind) or not _same(found, item, dtype):
            raise _difference(name, kind, _values(item, dtype), found)
    if (more := next(read, None)) is not None:
        raise ArtifactError("the file has tensors that nobody wrote", facts=(("first", more.name),))
    return versions("gguf")


def _same(found: Stored, item: Item, dtype: torch.dtype) -> bool:
    """Say whether a tensor of the file, of the same type, is ours."""
    if isinstance(item, Codes):
        return same_blocks(found.blocks, item.packed, item.kind, item.grid)
    return torch.equal(found.values(), _values(item, dtype))


def _values(item: Item, dtype: torch.dtype) -> Tensor:
    """Return in float32 what a tensor is stored as."""
    if isinstance(item, Codes):
        return item.packed.weight(item.grid, torch.float32)
    return item if item.ndim < 2 else item.to(dtype).float()


def _difference(name: str, kind: str, ours: Tensor, found: Stored) -> ArtifactError:
    """Return the error that names a tensor which reads back as another, in numbers."""
    facts: tuple[tuple[str, object], ...] = (("type", kind),)
    if (found.name, found.kind) != (name, kind):
        facts += (("read back", found.kind if found.name == name else f"`{found.name}`"),)
    else:
        values = found.values()
        same = values.shape == ours.shape
        facts += (("values that differ", int((values != ours).sum()) if same else tuple(values.shape)),)
    hint = "pack again; if it happens again, report it"
    return ArtifactError(f"`{name}` that was written is not what was quantized", facts=facts, hint=hint)


def _codes(subject: Subject) -> Made:
    @one_thread()
    def made(linear: LinearSite, state: Mapping[str, Tensor]) -> dict[str, Item]:
        if linear.name in subject.kept:
            return {"weight": state[f"{linear.spec.module}.weight"]}
        found, kind = subject.packed(linear), _kind(subject.scheme.of(linear.name))
        alone = replace(found, parameters=replace(found.parameters, global_scale=None))
        own = Codes(kind, alone, subject.weight_grid(linear))
        return {"weight": own, **_scales(subject, linear, found.parameters)}

    return made


def _half(subject: Subject) -> Made:
    def made(linear: LinearSite, state: Mapping[str, Tensor]) -> dict[str, Item]:
        bias = state.get(f"{linear.spec.module}.bias")
        if linear.name in subject.kept:
            weight, bias = offline(subject, linear, state[f"{linear.spec.module}.weight"], bias)
        else:
            weight, bias = dense(subject, linear, bias, torch.float32)
        return {"weight": weight.float()} if bias is None else {"weight": weight.float(), "bias": bias}

    return made


def _scales(subject: Subject, linear: LinearSite, parameters: GroupParameters) -> dict[str, Item]:
    """Return what multiplies an NVFP4 weight, and its inputs where they were calibrated."""
    if parameters.global_scale is None or subject.quantized is None:
        return {}
    name, activations = f"{linear.reads}{INPUT_GLOBAL_SCALE}", subject.scheme.of(linear.name).activations
    static = activations is not None and activations.static  # a scale, not what multiplies scales
    calibrated = name in subject.quantized.header.slots and not static
    inputs = {"input_scale": subject.quantized.tensor(name)} if calibrated else {}
    return {"scale": parameters.global_scale, **inputs}


def _exported(subject: Subject, kinds: Sequence[str], dtype: torch.dtype, sizes: Sizes) -> Exported:
    groups = groups_of(subject)
    types = {one.name: kind for kind, (_, linears) in zip(kinds, groups, strict=True) for one in linears}
    ends = types_of_ends(subject, {} if "F16" in kinds else types, dtype)
    each = [
        (linears, Case(GGUF_FILE, kind, bits=code_bits(subject, scheme), dtype=ends, **artifact_facts(scheme)))
        for kind, (scheme, linears) in zip(kinds, groups, strict=True)
    ]
    details: dict[str, object] = {"layout": ", ".join(dict.fromkeys(kinds)), "dtype": str(dtype).removeprefix("torch.")}
    details |= {"bytes": vars(sizes), "left_out": left_alone_counts(subject.model)}
    return Exported(mixed_consumers(each), details)


def _dtype(subject: Subject) -> torch.dtype:
    """Return what embedding and head are stored in."""
    return torch.bfloat16 if subject.model.dtype == torch.bfloat16 else torch.float16


def _check_scheme(subject: Subject) -> Check:
    """Return the check of a scheme by itself; of others than the subject's own it refuses zero points of Q4_1."""
    own = subject.scheme.every("weights")

    def check(scheme: ModelScheme) -> None:
        zeros = _kind(scheme) == "Q4_1" and not (scheme.weights and scheme.weights.offset)
        if zeros and scheme.weights not in own:
            raise SchemeError("Q4_1 has its offsets in float16", facts=(("weights", scheme.weights),))

    return check


def _kind(scheme: ModelScheme) -> Kind:
    if scheme.weights is None:
        raise TypeError(scheme)
    return choose_type(scheme.weights)


def _check_model(subject: Subject) -> None:
    check_architecture(subject)
    add_vocabulary(gguf.GGUFWriter(None, architecture_of(subject.model).name), subject.model)
