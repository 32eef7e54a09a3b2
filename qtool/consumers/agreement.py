"""Whether the files of a checkpoint hold what its config says, by the names, types and shapes in their heads.

A config that belongs to other weights is found so, before a consumer fails on them or fills what it lacks with noise.
Files may call modules otherwise than configs do, so a linear counts as named wherever the ends of names agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeAlias

from qtool.artifacts.layout import TensorSlot, read_header
from qtool.consumers.case import CT, EMBEDDINGS, HEADS, Case
from qtool.consumers.checkpoint import quantization_of, read_object
from qtool.consumers.config import cases_of
from qtool.consumers.presets import with_presets
from qtool.consumers.shapes import LAYOUTS, Misfit, misfit
from qtool.errors import ArtifactError, ModelError
from qtool.model.completeness import promised_tensors
from qtool.model.family import Family
from qtool.model.files import CONFIG, StoredTensor
from qtool.model.naming import canonical_name, places_of, split_block
from qtool.model.prequantized import hint_of_file
from qtool.model.reading import DTYPES
from qtool.model.source import Model, family_of

Said: TypeAlias = str | Sequence[Case]
"""What a config says of a linear: why it has no codes, or what they may be; nothing where that is not known."""
_EXPERT = re.compile(r"\.\d+\.")
_GENERATE = ("ForCausalLM", "ForConditionalGeneration")
_HINT = "check that config.json belongs to these weights, and that the download is complete"


def require_agreement(folder: Path, families: Mapping[str, Family]) -> None:
    """Refuse a checkpoint whose files do not hold what its config says.

    Args:
        folder: A folder whose config is understood; one without a config, or a file, promises nothing.
        families: Those whose linears are known, by name; of others only tensors tell how many inputs a linear has.

    Raises:
        ArtifactError: Names the first linear, what the config says of it and what the file has, or the first tensor
            that the files lack.
    """
    if not (folder / CONFIG).is_file():
        return
    config, files = read_object(folder / CONFIG), sorted(folder.glob("*.safetensors"))
    stored = {name: StoredTensor(file, slot) for file in files for name, slot in read_header(file).slots.items()}
    model = _model(folder, families)
    if model is not None:
        _refuse_missing(model, stored)
    quantization = quantization_of(folder, config)
    if not quantization:
        _refuse_unsaid_codes(folder, config, stored)
        return
    widths = {} if model is None else _widths(model)
    said_of = _reader(with_presets(quantization))
    if model is not None and quantization.get("quantization_status") == "compressed":
        _refuse_plain(model, stored, said_of)
    for name, slots in _coded(str(quantization.get("quant_method", "")), stored):
        known = name if model is None else canonical_name(f"{name}.weight", model.family).removesuffix(".weight")
        said = said_of(_names(name, known))
        if isinstance(said, str):
            odd: Sequence[Misfit | None] = [Misfit(said, ", ".join(slots))]
        else:
            odd = [misfit(case, slots, widths.get(known)) for case in said]
        if odd and odd[0] is not None and None not in odd:
            raise ArtifactError(
                f"the checkpoint will not load: `{name}` is not stored as its config says",
                facts=(("config says", odd[0].said), ("file has", odd[0].found)),
                hint=_HINT,
            )


def _refuse_plain(model: Model, stored: Mapping[str, StoredTensor], said_of: Callable[[Sequence[str]], Said]) -> None:
    """Refuse weights in 16 bits where a config says that there are codes; of experts it may say what files do not have.

    Raises:
        ArtifactError: Names the first linear.
    """
    linears = {linear.name for linear in model.graph.linears if linear.expert is None}
    for name, tensor in stored.items():
        owner, _, leaf = name.rpartition(".")
        known = canonical_name(name, model.family).removesuffix(".weight")
        if leaf != "weight" or known not in linears or tensor.slot.dtype not in DTYPES:
            continue
        said = said_of(_names(owner, known))
        if not isinstance(said, str) and said and all((case.method, case.layout) in LAYOUTS for case in said):
            raise ArtifactError(
                f"the checkpoint will not load: `{owner}` is not stored as its config says",
                facts=(("config says", f"codes as {said[0].layout}"), ("file has", f"a weight in {tensor.slot.dtype}")),
                hint=f"`ignore` has to list it, or {_HINT}",
            )


def _refuse_unsaid_codes(folder: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> None:
    """Refuse codes of which a config says nothing: what reads it has no weights for them.

    Raises:
        ArtifactError: Names the first linear.
    """
    if any("quantization_config" in one for one in config.values() if isinstance(one, Mapping)):
        return  # of the text model within
    coded = next(
        (one for method in dict.fromkeys(method for method, _ in LAYOUTS) for one in _coded(method, stored)), None
    )
    if coded is not None:
        raise ArtifactError(
            f"the checkpoint will not load: `{coded[0]}` has codes, and config.json says nothing of them",
            facts=(("file has", ", ".join(coded[1])),),
            hint=hint_of_file(folder) or _HINT,
        )


def _coded(method: str, stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, dict[str, TensorSlot]]]:
    """Yield the linears that have codes or scales in a layout of a method, with their tensors.

    Weights that are floats, of which scales may lie beside them, are quantized as they are loaded, if at all.
    """
    marks = {leaf for (own, _), one in LAYOUTS.items() for leaf in (one.codes, one.scale) if own == method}
    found: dict[str, dict[str, TensorSlot]] = {}
    for name, tensor in stored.items():
        owner, _, leaf = name.rpartition(".")
        found.setdefault(owner, {})[leaf] = tensor.slot
    for owner, slots in found.items():
        plain = "weight" in slots and slots["weight"].dtype in DTYPES
        if slots.keys() & (marks - {"weight"}) and not plain:
            yield owner, slots


def _names(name: str, known: str) -> tuple[str, ...]:
    """Return what a linear may be called: in the files, then in the graph, and a head as any."""
    front, _, leaf = name.rpartition(".")
    others = (f"{front}.{one}".removeprefix(".") for one in HEADS if leaf in HEADS)
    return tuple(dict.fromkeys((name, known, *others)))


def _reader(config: Mapping[str, Any]) -> Callable[[Sequence[str]], Said]:
    """Return what tells of a linear, by the names that it may have, what a config says of it."""
    readers = {CT: _compressed, "gptq": _gptq, "modelopt": _modelopt}
    return readers.get(str(config.get("quant_method", "")), _of_all)(config)


def _compressed(config: Mapping[str, Any]) -> Callable[[Sequence[str]], Said]:
    """Return a reader of groups, of which the nearest that names a linear counts: by name, by pattern, by class."""
    groups = [group for group in config["config_groups"].values() if group.get("weights")]
    cases = [cases_of({**config, "config_groups": {"group": group}}) for group in groups]
    sparse = bool(config.get("sparsity_config"))

    def said(names: Sequence[str]) -> Said:
        if sparse or not groups:
            return ()
        listed = [one for one in config.get("ignore") or () if _matches(one, names[0])]
        if listed:
            return f"`ignore` lists it, by `{listed[0]}`"
        ranks = [max((_rank(target, names) for target in group.get("targets", ())), default=0) for group in groups]
        if not any(ranks):
            return "no group names it, so it has weights in 16 bits"
        return [case for rank, own in zip(ranks, cases, strict=True) if rank == max(ranks) for case in own]

    return said


def _matches(target: str, name: str) -> bool:
    """Say whether a target is a name, or a pattern that it begins with."""
    pattern = target.removeprefix("re:")
    return target == name if pattern == target else re.match(pattern, name) is not None


def _rank(target: str, names: Sequence[str]) -> int:
    """Return how nearly a target names a linear: 3 by name, 2 by a pattern, 1 by its class, and 0 if not at all."""
    if target.startswith("re:"):
        return 2 if any(re.search(target.removeprefix("re:"), name) for name in names) else 0
    if any(_alike(target, name) for name in names):
        return 3
    looked_up = names[0].rpartition(".")[2] in EMBEDDINGS
    return int(target[:1].isupper() and "." not in target and looked_up == (target == "Embedding"))


def _alike(one: str, other: str) -> bool:
    """Say whether one of two names is the other, or its end."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def _gptq(config: Mapping[str, Any]) -> Callable[[Sequence[str]], Said]:
    """Return a reader of ``dynamic``, of whose rules the first that matches counts."""
    formats = {str(config.get(key) or "gptq").lower() for key in ("format", "checkpoint_format")}
    alike = {**config, "dynamic": None}
    cases = {rule: cases_of({**alike, **change}) for rule, change in (config.get("dynamic") or {}).items()}
    of_others = _of_all(alike)

    def said(names: Sequence[str]) -> Said:
        if not formats <= {"gptq", "gptq_v2"}:
            return ()
        for rule, own in cases.items():
            if any(re.match(rule.removeprefix("-:").removeprefix("+:"), name) for name in names):
                return f"`dynamic` leaves it in 16 bits, by `{rule}`" if rule.startswith("-:") else own
        return of_others(names)

    return said


def _modelopt(config: Mapping[str, Any]) -> Callable[[Sequence[str]], Said]:
    """Return a reader of one algorithm, or of one for each linear."""
    layers = {name: one["quant_algo"] for name, one in (config.get("quantized_layers") or {}).items()}
    mixed = str(config["quant_algo"]).upper() == "MIXED_PRECISION"
    kinds = {*layers.values()} if mixed else {config["quant_algo"]}
    cases = {kind: cases_of({**config, "quant_algo": kind}) for kind in kinds}

    def said(names: Sequence[str]) -> Said:
        ignored = config.get("ignore") or config.get("exclude_modules") or ()
        listed = [one for one in ignored if fnmatch(names[0], one)]
        if listed:
            return f"it is left in 16 bits, by `{listed[0]}`"
        if not mixed:
            return cases[config["quant_algo"]]
        kind = next((kind for one, kind in layers.items() if any(_alike(one, name) for name in names)), None)
        return "`quantized_layers` does not name it" if kind is None else cases[kind]

    return said


def _of_all(config: Mapping[str, Any]) -> Callable[[Sequence[str]], Said]:
    """Return a reader of a config that says one thing of all linears but of those that it leaves out."""
    cases = cases_of(config)

    def said(names: Sequence[str]) -> Said:
        left_out = config.get("modules_to_not_convert") or ()
        listed = [one for one in left_out if f".{one}." in f".{names[0]}."]
        return f"`modules_to_not_convert` lists it, by `{listed[0]}`" if listed else cases

    return said


def _model(folder: Path, families: Mapping[str, Family]) -> Model | None:
    """Return the model that a folder holds, without its weights; None where no family covers its config."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = Model(folder, config, family_of(config, families), id="")
        return model if model.graph.linears else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, StrictDataclassError, ModelError):
        return None


def _widths(model: Model) -> dict[str, int]:
    """Return the inputs of each linear, head and embedding."""
    return {one.name: model.graph.width(one.spec.reads) for one in (*model.graph.linears, *model.graph.ends)}


def _refuse_missing(model: Model, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse files without a module that others of its kind have, whatever its tensors are called.

    What no block has may be called otherwise, or be stored with something else, so nothing is said of it.

    Raises:
        ArtifactError: Names the first.
    """
    family = model.family
    there = {name.rpartition(".")[0] for name in places_of(stored, family)}
    heads = {family.head, *HEADS}
    if there & heads and model.graph.dims.tied:
        there.add(family.embedding)
    if there & heads or not any(one.endswith(_GENERATE) for one in model.config.architectures or ()):
        there |= heads

    def kind(module: str) -> str:
        block, inside = split_block(module, family)
        return _EXPERT.sub(".*.", inside) if block else ""

    promised = dict.fromkeys(name.rpartition(".")[0] for name, _ in promised_tensors(model))
    known = {kind(module) for module in promised if module in there and kind(module)}
    missing = [one for one in promised if one not in there and (kind(one) in known or (known and not kind(one)))]
    if missing:
        raise ArtifactError(
            "the checkpoint will not load: its files lack modules that its config promises",
            facts=(("first", missing[0]), ("lacking", len(missing)), ("family", family.name)),
            hint=_HINT,
        )
