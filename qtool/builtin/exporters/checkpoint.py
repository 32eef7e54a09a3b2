"""A checkpoint folder as transformers lays it out: safetensors shards, ``config.json``, tokenizer.

Written one decoder block at a time: each block becomes a part on disk, and parts are joined into shards by streaming.
So memory holds one block, and the disk one shard more than is needed. What is not quantized (embedding, norms, biases,
head) has the plan folded in and is stored in 16 bits, whatever the model had: a checkpoint is made for deployment.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.artifacts.store import disk_errors
from qtool.builtin.exporters.shards import Shards, write_json
from qtool.engine.subject import Subject
from qtool.errors import UsageError
from qtool.model.graph import LinearSite

CONFIG = "config.json"
# What goes with the weights as it is: how to generate, how to tokenize, and under which licence.
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)

LinearTensors = Callable[[LinearSite, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Makes what is stored of a linear, named below it, from the linear and its block's folded tensors.

What it names ``weight…`` counts as the quantized linear's bytes; a ``bias`` replaces the folded one.
"""


@dataclass(frozen=True)
class Sizes:
    """Bytes of tensors in a checkpoint: of the quantized linears (without biases), and of everything."""

    linears: int
    model: int


def write_checkpoint(
    subject: Subject,
    directory: Path,
    linear_tensors: LinearTensors,
    *,
    dtype: torch.dtype,
    quantization: Mapping[str, Any] | None = None,
) -> Sizes:
    """Write a whole checkpoint into an empty folder.

    Args:
        subject: Gives everything but the linears' weights.
        directory: The folder.
        linear_tensors: Makes what is stored in place of a linear's weight, as it is to be stored.
        dtype: What floating-point tensors that are not quantized are stored in.
        quantization: ``quantization_config`` of the config, or None.

    Returns:
        The bytes written.

    Raises:
        ResourceError: The disk is full.
        UsageError: The plan needs a bias that the model does not have.
    """
    model, graph = subject.model, subject.model.graph
    shards, linears = Shards(directory), 0
    ends = _stored_ends(subject)
    shards.add(_cast(ends, dtype))
    for layer in range(graph.dims.num_layers):
        state = subject.folded(layer)
        made: dict[str, Tensor] = {}
        for linear in graph.linears_of(layer):
            stored = linear_tensors(linear, state)
            made |= {f"{linear.name}.{name}": tensor for name, tensor in stored.items()}
            linears += sum(tensor.nbytes for name, tensor in stored.items() if name.startswith("weight"))
            del state[f"{linear.spec.module}.weight"]
        others = {f"{graph.block_name(layer)}.{name}": tensor for name, tensor in state.items()}
        _refuse_new_biases(subject, others | made)
        shards.add(_cast(others, dtype) | made)
    blocks = tuple(f"{graph.block_name(layer)}." for layer in range(graph.dims.num_layers))
    known = {*ends, f"{model.family.head}.weight"}
    rest = [name for name in model.files if not name.startswith(blocks) and name not in known]
    shards.add(_cast({name: model.tensor(name) for name in rest}, dtype))
    shards.finish()
    _write_config(subject, directory, dtype, quantization)
    _copy_files(model.path, directory)
    return Sizes(linears, shards.total)


def _stored_ends(subject: Subject) -> dict[str, Tensor]:
    """Return embedding, final norm and head, without a head that is still tied."""
    ends, tied = subject.ends(), subject.model.graph.dims.tied
    if tied and not subject.plan.unties_head(tied=tied):
        del ends[f"{subject.model.family.head}.weight"]
    return ends


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


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
    for replaced in ("_name_or_path", "dtype"):
        config.pop(replaced, None)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    tied = subject.model.graph.dims.tied
    config["tie_word_embeddings"] = tied and not subject.plan.unties_head(tied=tied)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    write_json(directory / CONFIG, config)


def _copy_files(source: Path, directory: Path) -> None:
    """Copy what goes with the weights, byte for byte."""
    found = {file for pattern in COPIED for file in source.glob(pattern) if file.is_file()}
    with disk_errors(directory):
        for file in sorted(found):
            shutil.copyfile(file, directory / file.name)
