"""A GGUF file as a subject, whoever wrote it: its blocks as codes, its floats as the model, its keys as config.

Nothing is decoded: codes, scales and offsets are read when an exporter asks for them, floats where they lie. Rows of
queries and keys come in the order of transformers again. Offsets of Q4_1 that are a scale times a whole number, in all
linears of that type, are zero points; float16 scales of a bfloat16 model are bfloat16 where that has them. An embedding
of codes that stands for the head gives both their codes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import cast

import gguf
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig

from qtool.artifacts.identity import digest_file
from qtool.artifacts.layout import TensorSlot
from qtool.artifacts.manifest import Manifest, Step
from qtool.builtin.exporters.gguf_architecture import names_of, row_order
from qtool.builtin.exporters.gguf_blocks import read_blocks
from qtool.builtin.exporters.gguf_file import FLOATS
from qtool.builtin.exporters.gguf_types import BLOCKS, SCALED, Kind
from qtool.builtin.exporters.packed_codes import CodesArtifact
from qtool.builtin.exporters.packed_layouts import check_reciprocal, is_reciprocal
from qtool.builtin.exporters.packed_schemes import plain_scheme, scheme_of
from qtool.builtin.exporters.read_back import empty_model
from qtool.engine.grid import Grid
from qtool.engine.packed import PackedLinear
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError
from qtool.model.files import CONFIG, StoredTensor
from qtool.model.gguf import describe_gguf, exact_dtype
from qtool.model.graph import LinearSite
from qtool.model.naming import Place, stored_name
from qtool.model.reading import DTYPES, read_place
from qtool.model.source import Model, family_of
from qtool.numerics.groups import each_parameter
from qtool.plugins import Plugins
from qtool.scheme import GroupParameters, ModelScheme, TensorScheme

_ORIGINAL = "qtool mitigate FILE, which decodes it and quantizes it again, or the original model"
_HALF = {"F16": torch.float16, "BF16": torch.bfloat16}
_SCALE, _INPUT_SCALE = "scale", "input_scale"


@dataclass(frozen=True)
class GGUFModel(Model):
    """What a GGUF file holds besides the codes of its quantized linears.

    Attributes:
        file: The file; ``path`` is the folder of its config and its tokenizer.
    """

    file: Path = Path()

    @cached_property
    def tensors_there(self) -> Mapping[str, gguf.ReaderTensor]:
        """Every tensor of the file, by its name there."""
        return {tensor.name: tensor for tensor in gguf.GGUFReader(self.file, "c").tensors}

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensors of the model that transformers makes of the config; a tied head is none of them."""
        tied = {f"{self.family.head}.weight"} if self.graph.dims.tied else set()
        parameters = empty_model(deepcopy(self.config), self).named_parameters()
        return {name: tuple(one.shape) for name, one in parameters if name not in tied}

    @cached_property
    def names(self) -> Mapping[str, str]:
        """What the file calls these tensors."""
        owners = {name: name.rpartition(".")[0] for name in self.shapes}
        modules = names_of(self, {*owners.values()})
        return {name: f"{modules.get(owner, owner)}{name.removeprefix(owner)}" for name, owner in owners.items()}

    @cached_property
    def coded(self) -> tuple[LinearSite, ...]:
        """The linears whose weights are codes; head and embedding come last."""
        ends = tuple(end for end in self.graph.ends if self.kind(end) not in FLOATS.values())
        linears = (one for one in self.graph.linears if self.kind(one) not in FLOATS.values())
        return (*linears, *ends)

    def kind(self, linear: LinearSite) -> str:
        """Return the type of a linear's weight, of a head without one of its own that of the embedding."""
        return _kind(self.blocks_of(linear))

    def blocks_of(self, linear: LinearSite) -> gguf.ReaderTensor:
        """Return the stored weight of a linear, of a head without one of its own that of the embedding."""
        name = self.names.get(f"{linear.name}.weight") or self.names[f"{self.family.embedding}.weight"]
        return self.tensors_there[name]

    def found_places(self) -> Mapping[str, Place]:
        """Return where every tensor lies; of codes a place without bytes, of the shape that they decode to."""
        coded = {f"{linear.name}.weight" for linear in self.coded}
        places = {name: self._place(self.tensors_there[own], coded=name in coded) for name, own in self.names.items()}
        return {name: replace(place, name=stored_name(name, self.family)) for name, place in places.items()}

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of matrices that are floats; without any, float16, which scales are in."""
        floats = [one for one in self.tensors_there.values() if len(one.shape) > 1 and one.tensor_type.name in DTYPES]
        kinds = {one.tensor_type.name for one in floats}
        if kinds <= {*_HALF} and len(kinds) < len(_HALF):
            return next((_HALF[kind] for kind in kinds), torch.float16)
        return exact_dtype(read_place(self._place(one, coded=False)).float() for one in floats)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, as transformers has it."""
        return self._as_transformers(name, super().tensor(name))

    def tensors(self, prefix: str, *, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Read the tensors below ``prefix``, as transformers has them, but no weights that are codes."""
        coded = {f"{linear.name}.weight" for linear in self.coded}
        found = super().tensors(prefix, without={*without, *coded})
        return {leaf: self._as_transformers(f"{prefix}{leaf}", tensor) for leaf, tensor in found.items()}

    def _as_transformers(self, name: str, tensor: Tensor) -> Tensor:
        """Return rows in transformers' order, and the weight of a norm without what the family adds to it."""
        offset = self.family.final_norm.offset if tensor.ndim < 2 and name.endswith("norm.weight") else 0.0
        order = row_order(self, name.rpartition(".")[0])
        tensor = tensor if order is None else tensor[order.argsort()]
        return (tensor.double() - offset).to(tensor.dtype) if offset else tensor

    def _place(self, tensor: gguf.ReaderTensor, *, coded: bool) -> Place:
        shape = tuple(int(length) for length in reversed(tensor.shape))
        if coded:
            dtype = next(kind for kind, dtype in DTYPES.items() if dtype == self.dtype)
            return Place(tensor.name, StoredTensor(self.file, TensorSlot(dtype, shape, 0, 0)))
        start = int(tensor.data_offset)
        slot = TensorSlot(tensor.tensor_type.name, shape, start, start + int(tensor.n_bytes))
        return Place(tensor.name, StoredTensor(self.file, slot))


def open_gguf(path: Path, plugins: Plugins, *, cache: Path, identity: str = "") -> Subject:
    """Open a GGUF file, or the folder of one, as what is to be packed.

    Args:
        path: The file, or a folder with no other.
        plugins: Where families and formats are found.
        cache: Where its config and tokenizer are kept, as transformers reads them.
        identity: What the original model is called; the file's own digest if empty.

    Raises:
        ArtifactError: It has no codes, codes of a type that is not read, or other tensors than its model.
        ModelError: The file is damaged, or transformers does not read its config or its tokenizer as it is.
    """
    file = next(iter(path.glob("*.gguf"))) if path.is_dir() else path
    digest = digest_file(file)
    folder = cache / "gguf" / f"{digest[:16]}-described"
    if not (folder / CONFIG).is_file():
        describe_gguf(file, folder)
    config = AutoConfig.from_pretrained(folder)
    model = GGUFModel(folder, config, family_of(config, plugins.every("families")), identity or digest, file=file)
    _refuse_other_tensors(model)
    if not model.coded:
        raise ArtifactError(
            f"`{path}` holds nothing to pack",
            facts=(("expected", "quantized"), ("received", "model")),
            hint=f"qtool mitigate {file} --method rtn --scheme W4A16",
        )
    found = {name: ModelScheme(weights) for name, weights in _schemes(model, plugins).items()}
    scheme = scheme_of(found, [linear.name for linear in model.graph.linears if linear.name not in found])
    step = Step("pack", "gguf", 1, "checkpoint")
    manifest = Manifest("quantized", step, {}, model.id, model.family.name, scheme.to_json())
    scaled = [linear.name for linear in model.coded if model.kind(linear) == "NVFP4"]
    artifact = CodesArtifact(file, manifest, scheme, plugins, model.coded, partial(_read, model), scaled)
    return Subject(model, plugins, scheme=scheme, quantized=artifact)


def check_multipliers(subject: Subject, to: str) -> int:
    """Refuse multipliers of NVFP4 weights that others would turn into other weights, and count inexact ones."""
    artifact, inexact = subject.quantized, 0
    for name in artifact.scaled if isinstance(artifact, CodesArtifact) and to == "compressed-tensors" else ():
        parameters = cast("CodesArtifact", artifact).read(name).parameters
        check_reciprocal(name, parameters)
        inexact += parameters.global_scale is not None and not is_reciprocal(parameters.global_scale)
    return inexact


def _read(model: GGUFModel, linear: LinearSite, weights: TensorScheme, grid: Grid) -> PackedLinear:
    """Return a linear's codes, scales, and offsets or zero points, with rows in transformers' order."""
    tensor, kind = model.blocks_of(linear), cast("Kind", model.kind(linear))
    stream, parameters = _numbers(tensor, kind)
    if weights.offset or kind != "Q4_1":
        zeros = None
    else:
        zeros, parameters = _zero_points(parameters), replace(parameters, offset=None)
    if kind == "NVFP4":
        scale = model.tensors_there.get(tensor.name.replace(".weight", f".{_SCALE}"))
        one = torch.ones(()) if scale is None else torch.tensor(float(scale.data[0]))
        parameters = replace(parameters, global_scale=one)
    parameters = replace(parameters, zero_point=zeros)
    if (order := row_order(model, linear.name)) is not None:
        own = order.argsort()
        stream, parameters = stream[own], each_parameter(parameters, lambda values: values[own])
    return PackedLinear(stream, grid.parts[0].format.bits, model.graph.width(linear.spec.reads), parameters)


def _numbers(tensor: gguf.ReaderTensor, kind: Kind) -> tuple[Tensor, GroupParameters]:
    """Return codes, scales and offsets as they are stored."""
    stream, scale, offset = read_blocks(torch.from_numpy(tensor.data), kind)
    return stream, GroupParameters(scale, offset=offset)


def _zero_points(parameters: GroupParameters) -> Float[Tensor, "out groups"] | None:
    """Return the codes of 4 bits that stand for zero, if offsets are those of some; None if they are not."""
    scale, offset = parameters.scale.double(), cast("Tensor", parameters.offset).double()
    zeros = torch.where(scale == 0, 0.0, -offset / scale)
    codes = (zeros >= 0) & (zeros < 16) & (zeros.frac() == 0) & (-scale * zeros == offset)
    return zeros.float() if bool(codes.all()) else None


def _schemes(model: GGUFModel, plugins: Plugins) -> dict[str, TensorScheme]:
    """Return the scheme of each linear's weights, by what all of one type have in common."""
    kinds = {linear.name: model.kind(linear) for linear in model.coded}
    by_kind = {kind: [one for one in model.coded if kinds[one.name] == kind] for kind in dict.fromkeys(kinds.values())}
    found = {kind: _scheme(model, cast("Kind", kind), linears, plugins) for kind, linears in by_kind.items()}
    return {name: found[kind] for name, kind in kinds.items()}


def _scheme(model: GGUFModel, kind: Kind, linears: Iterable[LinearSite], plugins: Plugins) -> TensorScheme:
    if kind in ("MXFP4", "NVFP4"):
        return plain_scheme(kind.lower(), plugins.format)

    def every(holds: Callable[[GroupParameters], bool]) -> bool:
        return all(holds(_numbers(model.blocks_of(linear), kind)[1]) for linear in linears)

    def is_short(parameters: GroupParameters) -> bool:
        values = (parameters.scale, parameters.offset)
        return all(torch.equal(one.bfloat16().float(), one) for one in values if one is not None)

    offset = kind == "Q4_1" and not every(lambda own: _zero_points(own) is not None)
    scheme = TensorScheme(
        "int8" if kind == "Q8_0" else "int4",
        symmetric=kind != "Q4_1",
        strategy="group",
        group_size=SCALED[kind],
        scale="bf16" if model.dtype == torch.bfloat16 and every(is_short) else "fp16",
        offset=offset,
    )
    plugins.format(scheme.format).check(scheme)
    return scheme


def _refuse_other_tensors(model: GGUFModel) -> None:
    """Refuse files with more or fewer tensors than their model, and types of which no codes are read.

    Raises:
        ArtifactError: Names the first.
    """
    there, names = model.tensors_there, {*model.names.values()}
    scales = {
        name.replace(".weight", f".{_SCALE}") for name in names if name in there and _kind(there[name]) == "NVFP4"
    }
    odd = [*sorted(names - there.keys()), *sorted(there.keys() - names - scales)]
    if odd:
        inputs = odd[0].endswith(f".{_INPUT_SCALE}")
        what = "calibrated inputs, and only weights are transcoded" if inputs else "other tensors than its model"
        raise ArtifactError(f"`{model.file}` has {what}", facts=(("first", odd[0]),), hint=_ORIGINAL)
    for name, own in model.names.items():
        kind, shape = _kind(there[own]), tuple(int(length) for length in reversed(there[own].shape))
        facts: tuple[tuple[str, object], ...] = (("first", own), ("type", kind), ("read", ", ".join(BLOCKS)))
        if kind not in (*BLOCKS, *FLOATS.values()):
            raise ArtifactError(f"`{model.file}` has codes of a type that is not read", facts=facts, hint=_ORIGINAL)
        if shape != model.shapes[name]:
            facts = (("first", own), ("expected", model.shapes[name]), ("received", shape))
            raise ArtifactError(f"`{model.file}` has other shapes than its model", facts=facts, hint=_ORIGINAL)


def _kind(tensor: gguf.ReaderTensor) -> str:
    return str(tensor.tensor_type.name)
