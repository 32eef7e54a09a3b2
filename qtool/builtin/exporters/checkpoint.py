"""A checkpoint folder as transformers lays it out: safetensors shards, ``config.json``, tokenizer.

Written one decoder block at a time: each block becomes a part on disk, and parts are joined into shards by streaming.
So memory holds one block, and the disk one shard more than is needed. What is not quantized (embedding, norms, biases,
head) has the plan folded in and is stored in 16 bits, whatever the model had: a checkpoint is made for deployment.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtool.artifacts.layout import TensorSlot, read_header, write_assembled
from qtool.artifacts.store import disk_errors
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, UsageError
from qtool.model.graph import LinearSite
from qtool.model.source import INDEX, WEIGHTS, tensor_files

SHARD_BYTES = 4_000_000_000
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


class Shards:
    """Collects tensors in parts and joins them into ``model.safetensors``, or numbered shards with an index.

    Args:
        directory: Folder of the shards; parts lie in it until they are joined.
        limit: Bytes to a shard; a single part may exceed it.
    """

    def __init__(self, directory: Path, *, limit: int = SHARD_BYTES) -> None:
        self.directory, self.limit = directory, limit
        self.total = 0
        self._parts: list[Path] = []
        self._pending = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that belong together.

        Raises:
            ResourceError: The disk is full.
        """
        if not tensors:
            return
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._parts and self._pending + size > self.limit:
            self._join()
        part = self.directory / f".part-{len(self._shards)}-{len(self._parts)}.safetensors"
        with disk_errors(self.directory):
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
        self._parts.append(part)
        self._pending += size
        self.total += size

    def finish(self) -> None:
        """Join what is left, give the shards their names and write the index.

        Raises:
            ResourceError: The disk is full.
        """
        self._join()
        count = len(self._shards)
        with disk_errors(self.directory):
            if count == 1:
                self._shards[0][0].rename(self.directory / WEIGHTS)
                return
            places: dict[str, str] = {}
            for index, (shard, names) in enumerate(self._shards, start=1):
                name = f"model-{index:05d}-of-{count:05d}.safetensors"
                shard.rename(self.directory / name)
                places |= dict.fromkeys(names, name)
            table = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(places.items()))}
            write_json(self.directory / INDEX, table)

    def _join(self) -> None:
        """Stream the parts at hand into one shard and remove them."""
        if not self._parts:
            return
        slots: dict[str, tuple[Path, TensorSlot]] = {}
        for part in self._parts:
            slots |= {name: (part, slot) for name, slot in read_header(part).slots.items()}
        shard = self.directory / f".shard-{len(self._shards)}.safetensors"
        with disk_errors(self.directory):
            with shard.open("wb") as output:
                write_assembled(output, slots, {"format": "pt"})
                output.flush()
                os.fsync(output.fileno())
            for part in self._parts:
                part.unlink()
        self._shards.append((shard, list(slots)))
        self._parts, self._pending = [], 0


def write_json(path: Path, value: object) -> None:
    """Write JSON as transformers does: indented, keys sorted.

    Raises:
        ResourceError: The disk is full.
    """
    with disk_errors(path):
        path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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


def empty_model(config: Any, *, trust_remote_code: bool) -> nn.Module:  # noqa: ANN401 - each family has its config
    """Build the model of a config without its weights."""
    with init_empty_weights(include_buffers=False):
        module: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=trust_remote_code
        )
    return module


class CheckpointReader:
    """Reads the tensors of a checkpoint by the module that they belong to.

    Args:
        directory: The checkpoint.

    Raises:
        ArtifactError: It holds no weights, or damaged ones.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = tensor_files(directory)
        self._leaves: dict[str, list[str]] = {}
        for name in self.files:
            module, _, leaf = name.rpartition(".")
            self._leaves.setdefault(module, []).append(leaf)

    def module(self, name: str) -> dict[str, Tensor]:
        """Return a module's own tensors, keyed by the last part of their names."""
        tensors = {}
        for leaf in self._leaves.get(name, ()):
            with safe_open(str(self.files[f"{name}.{leaf}"]), framework="pt") as file:
                tensors[leaf] = file.get_tensor(f"{name}.{leaf}")
        return tensors

    def compare(self, module: nn.Module, *, any_shape: str = "") -> None:
        """Compare names and shapes with those that a model asks for.

        Args:
            module: The model as its consumer builds it, without weights.
            any_shape: Ending of names whose shapes are not compared.

        Raises:
            ArtifactError: A tensor is missing, too many, or of another shape.
        """
        shared = getattr(module, "_tied_weights_keys", None) or ()
        tied = set(shared if getattr(module.config, "tie_word_embeddings", False) else ())
        wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if name not in tied}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self.files.values())):
            shapes |= {name: slot.shape for name, slot in read_header(file).slots.items()}
        for name in sorted(wanted.keys() | shapes.keys()):
            free = bool(any_shape) and name.endswith(any_shape) and name in wanted and name in shapes
            if wanted.get(name) != shapes.get(name) and not free:
                raise ArtifactError(
                    f"the checkpoint does not fit the model that transformers builds: `{name}`",
                    facts=(("shape asked for", wanted.get(name, "none")), ("shape written", shapes.get(name, "none"))),
                )
