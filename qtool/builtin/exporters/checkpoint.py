"""A checkpoint folder as transformers lays it out: safetensors shards, ``config.json``, tokenizer.

Made one decoder block at a time and written one shard at a time, so that memory holds one shard. What is not quantized
(embedding, norms, biases, routers, head) has the plan folded in and is stored in 16 bits, whatever the model had: a
checkpoint is made for deployment. What a model in 16 bits, or its loader, keeps in float32 stays so; what is left
alone is copied as it is.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qtool.artifacts.store import disk_errors
from qtool.builtin.exporters.read_back import empty_model, wide_names
from qtool.builtin.exporters.shards import Shards, write_json
from qtool.builtin.exporters.stored_names import as_stored
from qtool.engine.storage import in_order
from qtool.engine.stored import COMPENSATION
from qtool.engine.subject import Subject
from qtool.errors import UsageError
from qtool.model.files import CONFIG
from qtool.model.graph import LinearSite
from qtool.model.source import Model

TEXT = "text_config"
"""Where the config of a model with several towers has that of its text tower."""
BATCH_BYTES = 1_000_000_000
_PARTS = {
    **dict.fromkeys(("weight", "weight_packed", "qweight"), "codes"),
    **dict.fromkeys(("weight_scale", "weight_scale_2", "weight_global_scale", "scales"), "scales"),
    **dict.fromkeys(("weight_zero_point", "qzeros"), "zeros"),
}
"""What the tensors of a quantized linear are of, by their names in all layouts; others are the layout's own."""
_DENSE = (torch.bfloat16, torch.float16, torch.float32)
# What goes with the weights as it is: how to generate, how to tokenize, and under which licence.
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "*processor*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)

LinearTensors = Callable[[LinearSite, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Makes what is stored of a linear, named below it, from the linear and its block's folded tensors.

All of it but ``bias…``, ``input_…`` and ``output_…`` counts as the quantized linear's bytes; a ``bias`` replaces the
folded one. Of a linear that is not quantized, what it makes replaces the folded tensors, and is cast like all others.
"""


@dataclass(frozen=True)
class Sizes:
    """Bytes of tensors in a checkpoint.

    Attributes:
        linears: Of the quantized linears, without biases and scales of inputs and outputs.
        model: Of everything.
        parts: Of the quantized linears, and the scales of their inputs and outputs; see ``qtool.engine.storage``.
        ends: Of a quantized head or embedding, likewise; they are none of those linears.
    """

    linears: int
    model: int
    parts: Mapping[str, int]
    ends: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Mapping[str, int], model: int, ends: Mapping[str, int] = MappingProxyType({})) -> Sizes:
        """Return the sizes of a checkpoint from the bytes of each part, and of everything."""
        linears = sum(size for part, size in parts.items() if part != "inputs")
        return cls(linears, model, in_order(parts), in_order(ends))


def write_checkpoint(
    subject: Subject,
    directory: Path,
    linear_tensors: LinearTensors,
    *,
    dtype: torch.dtype,
    quantization: Mapping[str, Any] | None = None,
    calibrated: Mapping[str, Tensor] = MappingProxyType({}),
) -> Sizes:
    """Write a whole checkpoint into an empty folder.

    Args:
        subject: Gives everything but the linears' weights.
        directory: The folder.
        linear_tensors: Makes what is stored in place of a linear's weight, as it is to be stored, and in place of those
            of a quantized head and embedding, of which it is given no tensors.
        dtype: What floating-point tensors that are not quantized are stored in.
        quantization: ``quantization_config`` of the config, or None.
        calibrated: Scales, and matrices of rotations, that are no linear's, by full name, stored as they are.

    Returns:
        The bytes written.

    Raises:
        ResourceError: The disk is full.
        UsageError: The plan needs a bias that the model does not have.
    """
    model, graph = subject.model, subject.model.graph
    cast = _Cast(model, dtype)
    shards, parts, of_ends = Shards(directory), Counter[str](), Counter[str]()
    ends = stored_ends(subject, dtype)
    shards.add(as_stored(model, cast(ends)) | as_stored(model, calibrated))
    for end in subject.coded_ends:
        stored = linear_tensors(end, {})
        shards.add(as_stored(model, {f"{end.name}.{name}": tensor for name, tensor in stored.items()}))
        for name, tensor in stored.items():
            of_ends[_part_of(name, tensor)] += tensor.nbytes
    for name, tensor in calibrated.items():
        parts["operators" if name.endswith(".weight") else "inputs"] += tensor.nbytes
    for layer in range(graph.dims.num_layers):
        state = subject.beside(layer, torch.float32)
        made: dict[str, Tensor] = {}
        for linear in graph.readers_of(layer):
            stored, module = linear_tensors(linear, state), linear.spec.module
            if linear.spec.kept:
                state |= {f"{module}.{name}": tensor for name, tensor in stored.items()}
                continue
            if linear.name in subject.kept:
                state |= {f"{module}.{name}": tensor for name, tensor in stored.items()}
                name = f"{module}.weight"
                parts["unquantized"] += cast({f"{linear.name}.weight": state[name]})[f"{linear.name}.weight"].nbytes
                continue
            made |= {f"{linear.name}.{name}": tensor for name, tensor in stored.items()}
            for name, tensor in stored.items():
                parts[_part_of(name, tensor)] += 0 if name.startswith("bias") else tensor.nbytes
        others = {f"{graph.block_name(layer)}.{name}": tensor for name, tensor in state.items()}
        _refuse_new_biases(subject, others | made)
        shards.add(as_stored(model, cast(others) | made))
    blocks = tuple(f"{graph.block_name(layer)}." for layer in range(graph.dims.num_layers))
    known = {*ends, *(f"{end.name}.weight" for end in graph.ends)}
    rest = [name for name in model.places if not name.startswith(blocks) and name not in known]
    for names in _batches(model, [name for name in model.places if name in {*rest, *model.left_alone}]):
        shards.add(as_stored(model, cast({name: model.tensor(name) for name in names})))
    shards.finish()
    _write_config(subject, directory, dtype, quantization)
    _copy_files(model.path, directory)
    return Sizes.of(parts, shards.total, of_ends)


def _part_of(name: str, tensor: Tensor) -> str:
    """Return the part that a tensor of a quantized linear is of, by its name below it."""
    if name.startswith(("input_", "output_", "hadamard_")):
        return "operators" if name.startswith("hadamard_") else "inputs"
    return "unquantized" if name == "weight" and tensor.dtype in _DENSE else _PARTS.get(name, "layout")


def refuse_compensation(subject: Subject) -> None:
    """Refuse what is added to the outputs of blocks: no loader of a checkpoint has a place for it.

    Raises:
        UsageError: Names the first block.
    """
    slots = subject.quantized.header.slots if subject.quantized is not None else ()
    found = next((name for name in slots if COMPENSATION in name), None)
    if found is not None:
        raise UsageError(
            "checkpoints have no place for what is added to the outputs of blocks",
            facts=(("first", found.partition(COMPENSATION)[0]),),
            hint="qtool mitigate without the method that adds it, or qtool eval SOURCE, which runs it",
        )


def left_alone_counts(model: Model) -> dict[str, int]:
    """Return the number of tensors that are copied as they are, by the reason."""
    return dict(Counter(model.left_alone.values()))


def require_held(name: str, cast: Tensor, own: Tensor | None = None) -> None:
    """Refuse a tensor that became NaN or Inf as it was cast.

    Args:
        name: What it is called.
        cast: The tensor in the dtype that it is stored in.
        own: What it was before, if that is at hand.

    Raises:
        UsageError: It did.
    """
    if cast.numel() == 0 or bool(torch.stack(torch.aminmax(cast)).isfinite().all()):
        return
    dtype = str(cast.dtype).removeprefix("torch.")
    raise UsageError(
        f"`{name}` has values that {dtype} does not have",
        facts=() if own is None else (("largest", f"{own.abs().max():.3g}"),),
        hint="quantize with scales in bfloat16, such as --weights int4-sym-g32-sbf16, or pack --to hf"
        if cast.dtype == torch.float16
        else "look at the model: no type of 16 bits has them",
    )


class _Cast:
    """Casts tensors that are not quantized to what a checkpoint stores them in.

    Args:
        model: The original model.
        dtype: What most are stored in.
    """

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        half = model.dtype in (torch.bfloat16, torch.float16)
        wide = {name for name, place in model.places.items() if half and place.stored.slot.dtype in ("F32", "F64")}
        self.wide = wide | wide_names(empty_model(deepcopy(model.config), model), tuple(model.places), dtype)

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors cast; integers, and those that are left alone, as they are.

        Raises:
            UsageError: One has values that its dtype does not have.
        """
        cast = {name: tensor.to(self._dtype(name, tensor)) for name, tensor in tensors.items()}
        for name, tensor in cast.items():
            if tensor.dtype != tensors[name].dtype:
                require_held(name, tensor, tensors[name])
        return cast

    def _dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        if not tensor.is_floating_point() or name in self.model.left_alone:
            return tensor.dtype
        return torch.float32 if name in self.wide else self.dtype


def _batches(model: Model, names: Iterable[str]) -> Iterator[list[str]]:
    """Group tensors so that a group is not much larger than ``BATCH_BYTES``."""
    batch: list[str] = []
    size = 0
    for name in names:
        batch.append(name)
        size += model.places[name].stored.slot.nbytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def stored_ends(subject: Subject, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return embedding, final norm, head and what else writes the residual, without a head that is still tied."""
    ends, model = subject.ends(dtype), subject.model
    head, tied = f"{model.family.head}.weight", model.graph.dims.tied
    if tied and not subject.unties_head and not model.has(head):
        del ends[head]
    return ends


def _refuse_new_biases(subject: Subject, named: Mapping[str, Tensor]) -> None:
    """Refuse biases that only the plan brought: the model's modules have no place for them."""
    new = [name for name in named if name.endswith(".bias") and not subject.model.has(name)]
    if new:
        raise UsageError(
            "the plan shifts activations, which needs biases that this model does not have",
            facts=(("first", new[0]), ("family", subject.model.family.name)),
            hint="leave the transform that shifts out of the plan",
        )


def _write_config(
    subject: Subject, directory: Path, dtype: torch.dtype, quantization: Mapping[str, Any] | None
) -> None:
    """Write the model's own config with what the checkpoint changes."""
    config = json.loads((subject.model.path / CONFIG).read_text(encoding="utf-8"))
    tied = subject.model.graph.dims.tied
    for part in (config, config.get(TEXT)):
        for replaced in ("_name_or_path", "dtype", "quantization_config", "compression_config"):
            (part or {}).pop(replaced, None)
        if part is not None:
            part["torch_dtype"] = str(dtype).removeprefix("torch.")
            part["tie_word_embeddings"] = tied and not subject.unties_head
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    write_json(directory / CONFIG, config)


def _copy_files(source: Path, directory: Path) -> None:
    """Copy what goes with the weights, byte for byte."""
    found = {file for pattern in COPIED for file in source.glob(pattern) if file.is_file()}
    with disk_errors(directory):
        for file in sorted(found):
            shutil.copyfile(file, directory / file.name)
