"""A GGUF file, dequantized once into a folder that transformers loads.

transformers reads the configuration, the vocabulary and the weights. What it does wrong or leaves out without a word
is handled here; for SmolLM2 this was compared with a second reading of the file, tokens and weights alike:

- a byte-level vocabulary whose split into words it does not know is split as GPT-2's is. For ``smollm`` and its
  kin, which also separate digits, the right split is put in; for a split that nobody here knows the file is refused;
- tensors that it has no place for, and keys that it does not know, are dropped; such a file is refused;
- a norm's epsilon comes out as ``9.999999747378752e-06``, and the context length is not told to the tokenizer.

Weights are stored in the first of bfloat16, float16 and float32 that holds every one of them exactly, so the folder
is the file's model to the bit; for quantized files, whose values are a float16 scale times a code, that is float32.
The model's card says what such weights were decoded from.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from qtool.artifacts.store import disk_errors
from qtool.errors import ModelError, ResourceError, UsageError
from qtool.model.card import ModelCard, write_card
from qtool.model.files import share
from qtool.model.gguf_keys import refuse_other_keys

# Values of `tokenizer.ggml.pre`: the digits apart, then GPT-2's split; and GPT-2's split alone.
DIGITS_THEN_WORDS = ("smollm", "starcoder")
WORDS = ("gpt-2",)
_PLAIN = {"F64", "F32", "F16", "BF16"}


def convert_gguf(path: Path, output: Path) -> None:
    """Write the model of a GGUF file as a folder of ``config.json``, safetensors and tokenizer files.

    The folder appears whole or not at all, under a temporary name beside it until it is finished.

    Args:
        path: The GGUF file.
        output: Folder to make; its parents are made too.

    Raises:
        UsageError: Something is at ``output`` already.
        ModelError: The file is missing, truncated, not GGUF, or of a model that cannot be carried over exactly.
        ResourceError: The disk is full or may not be written.
    """
    if output.exists():
        raise UsageError(f"the output path is taken: `{output}`", hint="choose another path, or remove it")
    keys, num_values, kinds = _read_gguf(path)
    with staged_folder(output) as folder:
        with _reading(path), redirect_stderr(io.StringIO()):  # transformers' progress bars
            tokenizer = _tokenizer(path, keys)
            model = _model(path, _config(path, keys), num_values)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.to(exact_dtype(model.state_dict().values()))
        _save(model, folder)
        tokenizer.save_pretrained(folder)
        _name_tokenizer_class(folder)
        write_card(folder, ModelCard(path.stem, _footnote(kinds)))


def describe_gguf(path: Path, output: Path) -> None:
    """Write the config and the tokenizer of a GGUF file as a folder of transformers', without weights.

    Args:
        path: The GGUF file.
        output: Folder to make; its parents are made too.

    Raises:
        UsageError: Something is at ``output`` already.
        ModelError: As ``convert_gguf`` does, but for the weights, which are not looked at.
        ResourceError: The disk is full or may not be written.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    keys, _, _ = _read_gguf(path)
    with staged_folder(output) as folder:
        with _reading(path), redirect_stderr(io.StringIO()):
            tokenizer = _tokenizer(path, keys)
            config = _config(path, keys)
        tokenizer.model_max_length = config.max_position_embeddings
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _name_tokenizer_class(folder)
        write_card(folder, ModelCard(path.stem, ""))


def _footnote(kinds: Iterable[str]) -> str:
    """Return what stands below tables with a model whose weights were of these types; nothing of floats."""
    codes = sorted(set(kinds) - _PLAIN)
    return f"its weights were dequantized from {', '.join(codes)}, so what quantizes them rounds again" if codes else ""


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """Give a new folder to fill, which is synced and renamed to ``output`` if the block ends well, else removed.

    Raises:
        UsageError: Something has come to be at ``output`` meanwhile.
        ResourceError: The disk is full or may not be written.
    """
    folder = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    with disk_errors(output):
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a process of this number that was killed
            folder.mkdir(parents=True)
            yield folder
            for entry in [*folder.rglob("*"), folder]:
                _sync(entry)
            folder.rename(output)
            _sync(output.parent)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise UsageError(f"the output path is taken: `{output}`", hint="choose another path") from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def exact_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the first of bfloat16, float16 and float32 that represents every value exactly.

    Args:
        tensors: Finite float32 values. Not modified.

    Raises:
        ModelError: A value is NaN or infinite.
    """
    candidates = [torch.bfloat16, torch.float16]
    for tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise ModelError("the model has weights that are not finite", hint="get the GGUF file again")
        candidates = [dtype for dtype in candidates if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)]
    return candidates[0] if candidates else torch.float32


def _read_gguf(path: Path) -> tuple[dict[str, Any], int, list[str]]:
    """Return the file's scalar keys, how many weights it holds, and their types; check that all bytes are there."""
    from gguf import GGUFReader, GGUFValueType

    if not path.is_file():
        raise ModelError(f"no such file `{path}`", hint="give the path of a GGUF file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"`{path}` is not a GGUF file",
            facts=(("first bytes expected", b"GGUF"), ("first bytes received", magic)),
            hint="give the path of a GGUF file, or the folder of a transformers model as it is",
        )
    with _reading(path):
        reader = GGUFReader(path)
        keys = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types and field.types[0] != GGUFValueType.ARRAY
        }
        kinds = [tensor.tensor_type.name for tensor in reader.tensors]
        return keys, sum(int(np.prod(tensor.shape)) for tensor in reader.tensors), kinds


def _tokenizer(path: Path, keys: Mapping[str, Any]) -> Any:  # noqa: ANN401 - transformers has no one type for it
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if keys.get("tokenizer.ggml.model") != "gpt2":
        return tokenizer
    split = keys.get("tokenizer.ggml.pre", "none")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    backend = tokenizer.backend_tokenizer
    if split in DIGITS_THEN_WORDS:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    elif split in WORDS:
        backend.pre_tokenizer = words
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):  # what transformers falls back to
        raise ModelError(
            f"`{path}` splits text into words in a way that is not known here",
            facts=(("known", ", ".join((*DIGITS_THEN_WORDS, *WORDS))), ("tokenizer.ggml.pre", split)),
            hint="use the folder of the original transformers model",
        )
    return tokenizer


def _config(path: Path, keys: Mapping[str, Any]) -> Any:  # noqa: ANN401 - as above
    """Return the config that transformers makes of a file, with what it leaves at the family's usual.

    Raises:
        ModelError: It lacks something else of the file's.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    length = keys.get(f"{keys['general.architecture']}.attention.key_length")
    if length is not None and hasattr(config, "head_dim"):
        config.head_dim = length
    refuse_other_keys(path, keys, config)
    for name, value in config.to_dict().items():
        if isinstance(value, float) and name.endswith(("_eps", "_epsilon")):
            setattr(config, name, float(str(np.float32(value))))  # the shortest decimal that gives the same float32
    return config


def _model(path: Path, config: Any, num_values: int) -> Any:  # noqa: ANN401 - as above
    """Load the weights in float32 and check that every one found its place."""
    from transformers import AutoModelForCausalLM, GgufConfig

    loader: Any = AutoModelForCausalLM  # its annotations do not know output_loading_info
    model, report = loader.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    odd = sorted(str(name) for names in report.values() for name in names)
    placed = sum(parameter.numel() for parameter in model.parameters())
    if odd or placed != num_values:
        raise ModelError(
            f"`{path}` and the model that transformers makes of it do not hold the same weights",
            facts=(("weights in the file", num_values), ("weights placed", placed), ("first odd one", odd[:1])),
            hint="use the folder of the original transformers model",
        )
    return model


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what the readers raise about a damaged file into one typed error."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, struct.error, OverflowError) as error:
        raise ModelError(
            f"`{path}` cannot be read: truncated, damaged, or of an unknown architecture",
            facts=(("bytes", path.stat().st_size), ("reason", error)),
            hint="get the GGUF file again and compare its SHA-256",
        ) from error


def _save(model: Any, folder: Path) -> None:  # noqa: ANN401 - as above
    try:
        with redirect_stderr(io.StringIO()):
            model.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):
            share(file)
    except SafetensorError as error:
        raise ResourceError(
            "cannot write the converted weights",
            facts=(("folder", folder.parent), ("reason", error)),
            hint="free some space on that disk",
        ) from error


def _name_tokenizer_class(folder: Path) -> None:
    """Name the class by which every version of transformers loads ``tokenizer.json`` as it is."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
