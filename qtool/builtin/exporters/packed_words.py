"""A GPTQ or AWQ checkpoint as a subject, whoever wrote it: its codes, scales and zero points as they are.

What numbers are counts, not what a config calls them: zero points in the middle of the grid, in all linears of one
description, are those of symmetric integers, and float16 scales of a bfloat16 model are bfloat16 where that has them.
Columns in an order of their own (``desc_act``) share scales that no neighbours have, so they are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import AutoConfig

from qtool.artifacts.manifest import Manifest, Step
from qtool.builtin.exporters.packed_codes import CodesArtifact
from qtool.builtin.exporters.packed_model import PackedModel, refuse_codes, refuse_tensors
from qtool.builtin.exporters.packed_schemes import FLOATS, scheme_of, unread
from qtool.engine.grid import Grid
from qtool.engine.packed import PackedLinear
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError
from qtool.model.files import CONFIG, folder_digest
from qtool.model.graph import LinearSite
from qtool.model.naming import Place
from qtool.model.reading import DTYPES, read_place
from qtool.model.source import family_of
from qtool.numerics.packing import packed_size
from qtool.plugins import Plugins
from qtool.scheme import GroupParameters, ModelScheme, Strategy, TensorScheme

if TYPE_CHECKING:
    from qtool.builtin.exporters.words import IntegerWords

_ORDER = "g_idx"


@dataclass(frozen=True)
class WordsModel(PackedModel):
    """What such a checkpoint holds besides the weights of its quantized linears."""

    leaves: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", _ORDER)
    scale: ClassVar[str] = "scales"
    codes: ClassVar[tuple[str, ...]] = ("qweight",)
    needed: ClassVar[tuple[str, ...]] = ("scales", "qzeros")

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Where every tensor lies, but for biases of 0 that some tools store where the model has none."""
        places, odd = super().places, set[str]()
        biased = [f"{one.name}.bias" for one in self.coded if f"{one.name}.bias" in places]
        if biased:
            odd = {name for name in biased if name not in self.parameters and not read_place(places[name]).any()}
        return {name: place for name, place in places.items() if name not in odd}

    def rows(self, linear: LinearSite) -> int:
        """Return the outputs of a linear, of which each has a column of scales."""
        return self.packed[f"{linear.name}.scales"].shape[-1]

    def stored_of(self, linear: LinearSite, *leaves: str) -> dict[str, torch.Tensor]:
        """Read tensors of a linear as the checkpoint has them, keyed by the last parts of their names: some, or all."""
        names = {leaf: f"{linear.name}.{leaf}" for leaf in leaves or self.leaves}
        return {leaf: read_place(self.packed[name]) for leaf, name in names.items() if name in self.packed}


def open_words(layout: IntegerWords, directory: Path, plugins: Plugins, *, cache: Path, identity: str) -> Subject:
    """Open a checkpoint of integers in words as what is to be packed.

    Args:
        layout: The layout that its config names.
        directory: The checkpoint.
        plugins: Where families and formats are found.
        cache: Where digests of large files are remembered.
        identity: What the original model is called; the checkpoint's own digest if empty.

    Raises:
        SchemeError: The config says something that is not read.
        ArtifactError: Tensors do not fit the config, or columns are in an order of their own; names the first linear.
    """
    said = json.loads((directory / CONFIG).read_text(encoding="utf-8"))["quantization_config"]
    config, own = AutoConfig.from_pretrained(directory), layout.read_config(said)
    del config.quantization_config
    model = WordsModel(directory, config, family_of(config, plugins.every("families")), identity)
    if not model.coded:
        raise ArtifactError(f"`{directory}` has no scales of weights", hint="check that the download is complete")
    refuse_codes(model)
    model = replace(model, id=identity or folder_digest(directory, cache))
    configs = {linear.name: layout.config_of(_stored_name(model, linear), own) for linear in model.coded}
    schemes = _schemes(layout, model, configs)
    found = {name: ModelScheme(weights) for name, weights in schemes.items()}
    for weights in {*schemes.values()}:
        plugins.format(weights.format).check(weights)
    scheme = scheme_of(found, [linear.name for linear in model.graph.linears if linear.name not in found])
    refuse_tensors(model, scheme)
    step = Step("pack", _exporter(own, layout), 1, "checkpoint")
    manifest = Manifest("quantized", step, {}, model.id, model.family.name, scheme.to_json())
    reads = partial(_read, layout, model, configs)
    artifact = CodesArtifact(directory, manifest, scheme, plugins, model.coded, reads)
    return Subject(model, plugins, scheme=scheme, quantized=artifact)


def _schemes(
    layout: IntegerWords, model: WordsModel, configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, TensorScheme]:
    """Return the scheme of each linear's weights, by what all linears of one description have in common.

    Raises:
        SchemeError: Scales are of a type that is not read.
        ArtifactError: As ``_checked_zeros`` does.
    """
    found: dict[str, TensorScheme] = {}
    symmetric, short = set[TensorScheme](), set[TensorScheme]()
    for linear in model.coded:
        said, stored = configs[linear.name], model.packed[f"{linear.name}.scales"].stored.slot.dtype
        scale = FLOATS.get(DTYPES.get(stored, torch.int8))
        if scale is None:
            raise unread(f"scales in `{stored}`", dict(said))
        size = None if said["group_size"] == -1 else said["group_size"]
        strategy: Strategy = "channel" if size is None else "group"
        form, claimed = f"int{said['bits']}", bool(said.get("sym"))
        own = TensorScheme(form, symmetric=claimed, strategy=strategy, group_size=size, scale=scale)
        zeros, first = _checked_zeros(layout, model, linear, said), own not in found.values()
        if bool((zeros == 1 << said["bits"] - 1).all()) and (first or own in symmetric):
            symmetric.add(own)
        else:
            symmetric.discard(own)
        if scale == "fp16" and model.dtype == torch.bfloat16 and (first or own in short):
            scales = model.stored_of(linear, "scales")["scales"].float()
            (short.add if torch.equal(scales.bfloat16().float(), scales) else short.discard)(own)
        found[linear.name] = own
    return {
        name: replace(own, symmetric=own in symmetric, scale="bf16" if own in short else own.scale)
        for name, own in found.items()
    }


def _read(
    layout: IntegerWords,
    model: WordsModel,
    configs: Mapping[str, Mapping[str, Any]],
    linear: LinearSite,
    weights: TensorScheme,
    grid: Grid,
) -> PackedLinear:
    """Return a linear's codes, scales and zero points."""
    tensors, n_in = model.stored_of(linear), model.graph.width(linear.spec.reads)
    bits = grid.parts[0].format.bits
    zeros, _ = layout.read_groups(_with_order(tensors, n_in, weights.group_size), configs[linear.name])
    stream = layout.read_stream(tensors["qweight"])[:, : packed_size(n_in, bits)].contiguous()
    scale = tensors["scales"].T.float().contiguous()
    return PackedLinear(stream, bits, n_in, GroupParameters(scale, None if weights.symmetric else zeros.float()))


def _checked_zeros(
    layout: IntegerWords, model: WordsModel, linear: LinearSite, said: Mapping[str, Any]
) -> torch.Tensor:
    """Return the zero points of a linear whose tensors have the shapes that the config gives them.

    Raises:
        ArtifactError: They have not, columns are in an order of their own, or zero points are beyond the codes.
    """
    n_in, size = model.graph.width(linear.spec.reads), said["group_size"]
    there = {leaf: model.packed[f"{linear.name}.{leaf}"].shape for leaf in ("qweight", "qzeros", "scales")}
    wanted = layout.shapes(model.rows(linear), n_in, said)
    odd = next((leaf for leaf, shape in there.items() if wanted[leaf] != shape), None)
    if odd is not None or n_in % (n_in if size == -1 else size):
        facts = (
            (odd or "inputs", there.get(odd or "", n_in)),
            ("expected", wanted.get(odd or "", f"groups of {size}")),
        )
        raise ArtifactError(f"the tensors of `{linear.name}` do not fit the config", facts=facts)
    unread = {"qweight": torch.empty(there["qweight"], device="meta")}
    tensors = model.stored_of(linear, "qzeros", _ORDER) | unread
    group = n_in if size == -1 else size
    try:
        zeros, order = layout.read_groups(_with_order(tensors, n_in, size), said)
    except ValueError as error:
        raise ArtifactError(f"cannot read the zero points of `{linear.name}`", facts=(("reason", error),)) from error
    if not torch.equal(order.long(), torch.arange(n_in) // group):
        raise ArtifactError(
            f"columns of `{linear.name}` are in an order of their own (`desc_act`), and groups are no neighbours",
            facts=(("config", dict(said)),),
            hint="quantize the original model again, without it: qtool mitigate MODEL",
        )
    if bool((zeros >= 1 << said["bits"]).any()):
        raise ArtifactError(
            f"zero points of `{linear.name}` wrapped round, which readers take for 0 or for {1 << said['bits']}",
            facts=(("checkpoint_format", said.get("checkpoint_format")),),
            hint="quantize the original model again: qtool mitigate MODEL",
        )
    return zeros


def _with_order(tensors: Mapping[str, torch.Tensor], n_in: int, size: int | None) -> Mapping[str, torch.Tensor]:
    """Return tensors with the group of each input, in the order of the inputs where none is stored."""
    return {_ORDER: torch.arange(n_in) // (n_in if size in (None, -1) else size), **tensors}


def _exporter(said: Mapping[str, Any], layout: IntegerWords) -> str:
    """Return the name of the exporter that writes this very layout."""
    return str(said.get("checkpoint_format", layout.layout)).replace("_", "-")


def _stored_name(model: WordsModel, linear: LinearSite) -> str:
    return model.packed[f"{linear.name}.scales"].name.rpartition(".")[0]
