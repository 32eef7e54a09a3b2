"""Reading a checkpoint back: its tensors by module, and whether they are those that its consumer's model asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from qtool.builtin.exporters.stored_names import expected_shapes, stored_tensor_name
from qtool.engine.packed import ROWS, PackedLinear
from qtool.errors import ArtifactError
from qtool.model.files import stored_tensors
from qtool.model.graph import LinearSite
from qtool.model.naming import places_of
from qtool.model.reading import read_place, slice_of_expert
from qtool.model.source import Model


def versions(*packages: str) -> str:
    """Return packages with their versions, in words."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def empty_model(config: Any, model: Model) -> nn.Module:  # noqa: ANN401 - each family has its config
    """Build the model of a config without its weights, as the original model's family is loaded."""
    loader = getattr(transformers, model.family.loader)
    with init_empty_weights(include_buffers=False), no_init_weights():
        module: nn.Module = loader.from_config(config, trust_remote_code=model.trust_remote_code)
    return module


def loaded_model(directory: Path, model: Model) -> Any:  # noqa: ANN401 - a model of transformers
    """Have transformers load a checkpoint without reading weights.

    Args:
        directory: The checkpoint.
        model: The original model.

    Returns:
        The model, without values.

    Raises:
        ArtifactError: It misses a tensor, or finds one of another shape.
    """
    loader = getattr(transformers, model.family.loader)
    about = {"trust_remote_code": model.trust_remote_code, "ignore_mismatched_sizes": True}
    try:
        module, found = loader.from_pretrained(directory, device_map="meta", output_loading_info=True, **about)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        raise ArtifactError("transformers cannot load the checkpoint", facts=(("reason", reason),)) from error
    for fault in ("missing_keys", "mismatched_keys", "error_msgs"):
        if odd := sorted(map(str, found[fault])):
            facts = ((fault.replace("_", " "), len(odd)), ("first", odd[0]))
            raise ArtifactError("transformers does not find in the checkpoint what its model has", facts=facts)
    return module


def with_linear_experts(module: nn.Module, model: Model) -> nn.Module:
    """Put linears, which checkpoints speak of, in place of each block's experts: the first expert's, for all.

    transformers keeps the weights of all experts in parameters that no checkpoint of single experts has.

    Args:
        module: A model without weights. Modified.
        model: The original model.
    """
    graph, experts = model.graph, model.family.experts
    for layer in range(graph.dims.num_layers) if experts is not None else ():
        if experts is None or not graph.is_sparse(layer):
            continue
        first = nn.Module()
        for linear in graph.readers_of(layer):
            if linear.expert == 0:
                rows, columns = model.places[f"{linear.name}.weight"].shape
                has_bias = model.has(f"{linear.name}.bias")
                inside = linear.spec.module.removeprefix(f"{experts.module}.0.")
                first.add_module(inside, nn.Linear(columns, rows, bias=has_bias, device="meta"))
        owner, _, leaf = f"{graph.block_name(layer)}.{experts.module}".rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.ModuleList([first]))
    return module


def with_stored_shapes(
    module: nn.Module,
    linears: Iterable[LinearSite],
    shapes: Callable[[nn.Linear, LinearSite], Mapping[str, tuple[int, ...]]],
) -> nn.Module:
    """Put modules with the tensors that a checkpoint has, and the bias, in place of the linears that are quantized.

    Args:
        module: A model without weights, with linears as its experts. Modified.
        linears: Those linears.
        shapes: Names and shapes of what stands for the weight of a linear.
    """
    for linear in linears:
        if linear.expert in (None, 0):
            child = cast(nn.Linear, module.get_submodule(linear.name))
            stored = nn.Module()
            for name, shape in shapes(child, linear).items():
                stored.register_buffer(name, torch.empty(shape, device="meta"))
            if child.bias is not None:
                stored.register_buffer("bias", child.bias)
            module.set_submodule(linear.name, stored)
    return module


def weight_difference(name: str, decoded: Tensor, ours: Tensor) -> ArtifactError:
    """Return the error that names a weight which reads back as another, in numbers."""
    facts: tuple[tuple[str, object], ...] = (("ours", tuple(ours.shape)), ("read back", tuple(decoded.shape)))
    if decoded.shape == ours.shape:
        far = (decoded.double() - ours.double()).abs()
        differ = int((decoded != ours.to(decoded.dtype)).sum())
        facts = (("values that differ", differ), ("by up to", f"{far.max():.3g}"))
    return ArtifactError(
        f"the weight of `{name}` that was written is not the one that was quantized",
        facts=facts,
        hint="pack again; if it happens again, report it",
    )


def compare_codes(name: str, read: PackedLinear, ours: PackedLinear) -> None:
    """Compare every code, scale and zero point of a linear; multipliers are left to the caller.

    Args:
        name: Name of the linear, for the message.
        read: What a checkpoint holds.
        ours: What was packed.

    Raises:
        ArtifactError: Something differs.
    """
    if not same_bytes(read.stream, ours.stream):
        whole = slice(0, len(ours.stream))
        raise weight_difference(name, read.rows(whole).codes, ours.rows(whole).codes)
    found, wanted = read.parameters, ours.parameters
    for theirs, own in ((found.scale, wanted.scale), (found.zero_point, wanted.zero_point)):
        if theirs is not None and own is not None and not torch.equal(theirs, own):
            raise weight_difference(name, theirs, own)
        if (theirs is None) != (own is None):
            raise ArtifactError(f"`{name}` was written with zero points, or lacks its own")


def same_bytes(one: UInt8[Tensor, "rows bytes"], other: UInt8[Tensor, "rows bytes"]) -> bool:
    """Say whether bytes are equal, eight at a time where they fill whole words."""
    whole = one.shape[-1] % 8 == 0 and one.is_contiguous() and other.is_contiguous()
    return torch.equal(*((each.flatten().view(torch.int64) if whole else each) for each in (one, other)))


def telling_rows(ours: PackedLinear, step: int) -> list[slice]:
    """Return the rows around the least and the largest scale of a linear: where a decoder would err, if anywhere.

    Args:
        ours: The linear.
        step: Rows that are stored together; slices begin and end at whole ones. All rows are one slice where those do
            not fill the axis.
    """
    scale, rows = ours.parameters.scale.abs(), len(ours.stream)
    of_rows = scale.reshape(len(scale), -1)
    step = max(step, ROWS)
    step = rows if rows % step else step
    places = {int(place) * rows // len(scale) // step for place in (of_rows.amin(1).argmin(), of_rows.amax(1).argmax())}
    return [slice(place * step, place * step + step) for place in sorted(places)]


class CheckpointReader:
    """Reads the tensors of a checkpoint by the module that they belong to, as the graph calls it.

    Args:
        directory: The checkpoint.
        model: The model that it was made from.

    Raises:
        ArtifactError: It holds no weights, or damaged ones.
    """

    def __init__(self, directory: Path, model: Model) -> None:
        self.model = model
        self.stored = stored_tensors(directory)
        self._places = places_of(self.stored, model.family)
        self._opened: Callable[[Path], Any] = lru_cache(1)(partial(safe_open, framework="pt"))
        self._leaves: dict[str, list[str]] = {}
        for name in self._places:
            module, _, leaf = name.rpartition(".")
            self._leaves.setdefault(module, []).append(leaf)

    def module(self, name: str) -> dict[str, Tensor]:
        """Return a module's own tensors, keyed by the last part of their names."""
        return {leaf: read_place(self._places[f"{name}.{leaf}"]) for leaf in self._leaves.get(name, ())}

    def name(self, module: str) -> str:
        """Return what files call a module, by the first of its own tensors."""
        return self._places[f"{module}.{self._leaves[module][0]}"].name.rpartition(".")[0]

    def weight(self, module: str) -> Tensor:
        """Return a module's weight as safetensors reads it; the file that was read last stays open."""
        place = self._places[f"{module}.weight"]
        return slice_of_expert(place, self._opened(place.stored.file).get_tensor(place.name))

    def compare(self, module: nn.Module, *, any_shape: str = "") -> None:
        """Compare names and shapes with those that a model asks for.

        Args:
            module: The model as its consumer builds it, without weights, but with linears as its experts.
            any_shape: Ending of names whose shapes are not compared.

        Raises:
            ArtifactError: A tensor is missing, too many, or of another shape.
        """
        modules = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        wanted = expected_shapes(self.model, modules)
        shapes = {name: tensor.slot.shape for name, tensor in self.stored.items()}
        if getattr(module.config, "tie_word_embeddings", False):
            shared = {
                stored_tensor_name(self.model, name) for name in getattr(module, "_tied_weights_keys", None) or ()
            }
            wanted = {name: shape for name, shape in wanted.items() if name in shapes or name not in shared}
        for name in sorted(wanted.keys() | shapes.keys()):
            free = bool(any_shape) and name.endswith(any_shape) and name in wanted and name in shapes
            if wanted.get(name) != shapes.get(name) and not free:
                raise ArtifactError(
                    f"the checkpoint does not fit the model that transformers builds: `{name}`",
                    facts=(("shape asked for", wanted.get(name, "none")), ("shape written", shapes.get(name, "none"))),
                )


def wide_names(module: nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> set[str]:
    """Return the tensors that a model's loader keeps in float32 whatever the rest is in.

    Args:
        module: The model as transformers builds it.
        names: Names of its tensors.
        dtype: What the rest is in; with float16 loaders keep more.
    """
    marks = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        marks |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return {name for name in names if any(f".{mark}." in f".{name}." for mark in marks)}
