"""Reads what a checkpoint is from its config and from the heads of its files, never from its weights."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import SafetensorError, safe_open

from qtool.artifacts.store import CHECKPOINT_MANIFEST, open_artifact
from qtool.consumers.case import CT, DENSE, EMBEDDINGS, GGUF_FILE, HEADS, Case
from qtool.consumers.config import cases_of, dynamic_apart
from qtool.consumers.presets import named_presets, with_presets
from qtool.errors import ArtifactError
from qtool.model.files import INDEX
from qtool.scheme import ModelScheme, TensorScheme

ADAPTER = "adapter/adapter_config.json"
"""Where a LoRA adapter says what it is that lies in a folder of its own."""
_SCALES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "e4m3", "U8": "e8m0"}
_EXPERTS = re.compile(r"\.experts\.")
_STORED = {CT: (".weight_packed", ".weight_scale"), "gptq": (".qweight",), "awq": (".qweight",)}
_STORED["modelopt"] = (".weight_scale",)
_MODELOPT = "hf_quant_config.json"
_INPUT_SCALE = ".input_scale"
_WIDE = {"F16": 16, "BF16": 16, "F32": 32}
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_ENDS = ("activations", "outputs")
_PLAIN = ("F32", "F16", "BF16")


def artifact_facts(scheme: ModelScheme, *, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return the fields of a ``Case`` that a quantized artifact tells and no config does.

    Args:
        scheme: What the artifact quantizes.
        dtype: What its checkpoint is stored in.
    """
    cache, inputs = scheme.keys or scheme.values, scheme.activations
    rounded = ((name, " and ".join(dict.fromkeys(part.format for part in scheme.every(name)))) for name in _ENDS)
    parts = [f"{formats} {name}" for name, formats in rounded if formats]
    parts += [f"{cache.format} KV cache"] if cache is not None else []
    lost = " and ".join(parts)
    facts: dict[str, Any] = {
        "scale": "" if scheme.weights is None else scheme.weights.scale,
        "range_rule": "" if inputs is None else inputs.range_rule,
        "input_scale": "" if inputs is None or inputs.static else inputs.scale,
        "lost": f" (without the {lost} of the artifact)" if lost else "",
    }
    return facts if dtype is None else facts | {"dtype": str(dtype).removeprefix("torch.")}


def read_checkpoint(path: Path, bits_of: Callable[[str], int]) -> tuple[Case, ...]:
    """Return the kinds of linears in a checkpoint.

    Args:
        path: A folder with ``config.json``, a GGUF file, or a folder with one.
        bits_of: Bits of the codes of a format of qtool's, by its name.

    Raises:
        ArtifactError: There is none, or it cannot be read or understood.
    """
    if not path.exists():
        raise ArtifactError(
            f"there is no checkpoint `{path}`", hint="give a folder that holds config.json, or a GGUF file"
        )
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if path.is_dir() and (path / "config.json").is_file():
        cases = _read_folder(path)
    elif files and files[0].suffix == ".gguf":
        cases = _read_gguf(files[0])
    else:
        raise ArtifactError(
            f"`{path}` is no checkpoint: there is neither config.json nor a GGUF file",
            hint="qtool pack SOURCE --to compressed-tensors writes one",
        )
    return _of_artifact(path, cases, bits_of)


def _of_artifact(path: Path, cases: tuple[Case, ...], bits_of: Callable[[str], int]) -> tuple[Case, ...]:
    """Add what the manifest of a checkpoint that qtool wrote tells of the artifact behind it."""
    if not (path / CHECKPOINT_MANIFEST).is_file():
        return cases
    scheme = ModelScheme.from_json(open_artifact(path).manifest.schemes)
    found = (one for case in cases for one in _as_quantized(case, scheme, bits_of))
    return tuple(dict.fromkeys(found)) if scheme.every("weights") else cases


def _as_quantized(case: Case, scheme: ModelScheme, bits_of: Callable[[str], int]) -> Iterator[Case]:
    """Yield a case with what the artifact tells, once for each of its schemes that these linears may have."""
    unsaid = case.method in (DENSE, GGUF_FILE)
    parts = (case.bits, case.symmetric, case.group_size)[: 1 if unsaid else None]
    inputs = (case.input_bits, case.input_symmetric, case.input_group_size)
    whole = replace(scheme, rules=tuple(rule for rule in scheme.rules if rule.part in _ENDS))
    plain = replace(scheme, activations=None, outputs=None, rules=())
    options: tuple[ModelScheme, ...] = (whole,) if case.method != CT else (plain,)
    if case.inputs != "none":
        found = _alike(scheme.every("activations"), inputs, bits_of)
        options = tuple(replace(scheme, activations=one, rules=()) for one in found) or options
    for weights, own in product(_alike(scheme.every("weights"), parts, bits_of), options):
        facts = artifact_facts(replace(own, weights=weights))
        yield replace(case, **facts, bits=bits_of(weights.format) if unsaid else case.bits)


def _alike(
    schemes: tuple[TensorScheme, ...], wanted: tuple[object, ...], bits_of: Callable[[str], int]
) -> tuple[TensorScheme, ...]:
    """Return the schemes with these bits, symmetry and group size, as far as any has them."""
    for place, value in enumerate(wanted):
        size = (one.group_size if one.strategy == "group" else -1 for one in schemes)
        of_each = ((bits_of(one.format), one.symmetric, own)[place] for one, own in zip(schemes, size, strict=True))
        schemes = tuple(one for one, own in zip(schemes, of_each, strict=True) if own == value) or schemes
    return schemes


def quant_method(folder: Path) -> str:
    """Return how the config in a folder says that its linears are packed; empty where it does not.

    That of a GGUF file, and of a folder with one and no config, is ``gguf``.
    """
    if folder.is_file():
        return GGUF_FILE if folder.suffix == ".gguf" else ""
    if not (folder / "config.json").is_file():
        return GGUF_FILE if len([*folder.glob("*.gguf")]) == 1 else ""
    config = quantization_of(folder, read_object(folder / "config.json"))
    return str(config.get("quant_method", "")) if isinstance(config, Mapping) else ""


def quantization_of(folder: Path, config: Mapping[str, Any]) -> Any:  # noqa: ANN401 - JSON, perhaps of a wrong type
    """Return the ``quantization_config``, which ModelOpt may have beside the config."""
    found = config.get("quantization_config")
    if found is None and (folder / _MODELOPT).is_file():
        return {"quant_method": "modelopt", **read_object(folder / _MODELOPT).get("quantization", {})}
    return found


def _read_folder(folder: Path) -> tuple[Case, ...]:
    config = read_object(folder / "config.json")
    quantization = quantization_of(folder, config)
    if quantization is not None and not isinstance(quantization, Mapping):
        raise ArtifactError(
            "cannot understand the `quantization_config`",
            facts=(("expected", "an object"), ("received", type(quantization).__name__)),
            hint="pack again, or report it with the config",
        )
    names, scale = _heads(folder)
    presets = named_presets(quantization)
    quantization = _with_names(quantization and with_presets(quantization), names)
    ends = _STORED.get(str((quantization or {}).get("quant_method", "")), ())
    stored = [name for name in names if name.endswith(ends)]
    of_experts = [bool(_EXPERTS.search(name)) for name in stored or names]
    about: dict[str, Any] = {
        "dtype": str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch."),
        "experts": any(of_experts),
        "alone": all(of_experts),
        "biased": any(f"{target}.bias" in names for target in _rotated(quantization)),
        "scale": scale,
        "adapter": (folder / ADAPTER).is_file(),
    }
    if whole := _whole_fp8(quantization, names):
        calibrated = {name.removesuffix(_INPUT_SCALE) for name in names if name.endswith(_INPUT_SCALE)}
        about["inputs"] = "static" if whole & calibrated else "dynamic"
    if presets:  # consumers other than the library itself look for schemes there
        about["unread"] = f"config_groups: {', '.join(presets)}"
    if (quantization or {}).get("dynamic"):
        about["apart"] = dynamic_apart(quantization or {}, {name.rpartition(".")[0] for name in names})
    cases = cases_of(quantization, **about)
    coded = {name.removesuffix(end).rpartition(".")[2] for name in stored for end in ends if name.endswith(end)}
    if coded & {*HEADS} and not any(case.head for case in cases):
        cases = tuple(replace(case, head="unnamed") for case in cases)
    if coded & {*EMBEDDINGS} and not any(case.embedding for case in cases):
        cases = tuple(replace(case, embedding="named") for case in cases)
    if names and ends and not stored:
        raise ArtifactError(
            f"the config says `{cases[0].method}`, and no tensor is stored so",
            facts=(("expected", " or ".join(f"*{end}" for end in ends)), ("tensors", len(names))),
            hint="pack again, or report it with the config",
        )
    return cases


def _whole_fp8(quantization: Mapping[str, Any] | None, names: Iterable[str]) -> set[str]:
    """Return the linears whose weights have one scale in ModelOpt's FP8, whose config does not tell of inputs."""
    said = quantization or {}
    layers = said.get("quantized_layers")
    if layers:
        return {name for name, one in layers.items() if str(one.get("quant_algo", "")).upper() == "FP8"}
    whole = str(said.get("quant_algo", "")).upper() == "FP8"
    return {name.rpartition(".")[0] for name in names} if whole else set()


def _with_names(quantization: Mapping[str, Any] | None, names: Iterable[str]) -> Mapping[str, Any] | None:
    """Return the config with the names of linears in place of the patterns that its groups have for them."""
    linears = [name.rpartition(".")[0] for name in names if name.endswith((".weight", ".weight_packed"))]

    def named(targets: Iterable[str]) -> Iterator[str]:
        for target in targets:
            pattern = target.removeprefix("re:")
            yield from (target,) if pattern == target else (name for name in linears if re.match(pattern, name))

    if not isinstance((quantization or {}).get("config_groups"), Mapping) or quantization is None:
        return quantization
    groups = {
        key: group | {"targets": list(named(group["targets"]))}
        if isinstance(group, dict) and "targets" in group
        else group
        for key, group in quantization["config_groups"].items()
    }
    return {**quantization, "config_groups": groups, "ignore": list(named(quantization.get("ignore") or ()))}


def _rotated(quantization: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the names of linears whose inputs are rotated in the forward pass."""
    groups = ((quantization or {}).get("transform_config") or {}).get("config_groups", {}).values()
    yield from (target for group in groups for apply in group.get("apply", ()) for target in apply.get("targets", ()))


def _heads(folder: Path) -> tuple[list[str], str]:
    """Return the names of all tensors, and the dtype of the scales, from the heads of the files."""
    names: list[str] = []
    scale = ""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                held = list(file.keys())
                found = next((name for name in held if name.endswith((".weight_scale", ".scales"))), None)
                if found is not None and not scale:
                    stored = file.get_slice(found).get_dtype()
                    scale = _SCALES.get(stored, stored)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"cannot read the head of `{path}`", facts=(("reason", error),), hint="pack or download it again"
            ) from error
        names += held
    _refuse_missing(folder, names)
    if not names:
        raise ArtifactError(
            f"`{folder}` holds no weights", facts=(("expected", "*.safetensors"),), hint="pack or download it again"
        )
    return names, scale


def _refuse_missing(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder whose index names files or tensors that are not there.

    Raises:
        ArtifactError: Names the first.
    """
    if not (folder / INDEX).is_file():
        return
    places = read_object(folder / INDEX).get("weight_map")
    table = {str(name): str(file) for name, file in places.items()} if isinstance(places, dict) else {}
    files = {file for file in table.values() if not (folder / file).is_file()}
    for what, missing in (("files", files), ("tensors", table.keys() - set(names))):
        if missing:
            raise ArtifactError(
                f"the index of `{folder}` names {what} that are not there",
                facts=(("first", min(missing)), ("missing", len(missing))),
                hint="check that the download is complete",
            )


def _read_gguf(path: Path) -> tuple[Case, ...]:
    """Return a case for each type of the matrices in the blocks; types of floats only where there is no other."""
    try:
        matrices = {tensor.name: tensor.tensor_type.name for tensor in _matrices(path)}
    except (ValueError, KeyError, IndexError, OSError, struct.error) as error:
        raise ArtifactError(
            f"cannot read the head of `{path}`", facts=(("reason", error),), hint="pack or download it again"
        ) from error
    types = list(dict.fromkeys(kind for name, kind in matrices.items() if name.startswith("blk.")))
    kinds = [kind for kind in types if kind not in _PLAIN] or types[:1]
    if not kinds:
        raise ArtifactError(f"`{path}` holds no blocks of a model", hint="give a GGUF file of a whole model")
    embedding = matrices.get("token_embd.weight", "")
    dtype = types_in_words(embedding, matrices.get("output.weight", embedding))
    return tuple(Case(GGUF_FILE, kind, bits=_block_bits(kind), dtype=dtype) for kind in kinds)


def _block_bits(kind: str) -> int:
    """Return the bits of a code, which the name of the type says, without scales; 0 where it does not."""
    digits = re.match(r"(?:I?Q|TQ|MXFP|NVFP)(\d)", kind)
    return int(digits[1]) if digits else _WIDE.get(kind, 0)


def types_in_words(embedding: str, head: str) -> str:
    """Return what embedding and head of a GGUF file are stored as, in this order, or what both are."""
    return " and ".join(dict.fromkeys(_FLOATS.get(kind, kind) for kind in (embedding, head)))


def _matrices(path: Path) -> Iterator[Any]:
    return (tensor for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1)


def read_object(path: Path) -> dict[str, Any]:
    """Read a file of JSON that holds an object.

    Raises:
        ArtifactError: It does not, or cannot be read.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"cannot read `{path}`", facts=(("reason", error),), hint="pack or download it again"
        ) from error
    if not isinstance(held, dict):
        raise ArtifactError(f"`{path}` holds no object", hint="pack or download it again")
    return held
