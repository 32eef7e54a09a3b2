"""What becomes of every parameter of a model: quantized, folded, kept (and why), or unknown to its family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from qtool.artifacts.layout import TensorSlot
from qtool.errors import ModelError
from qtool.model.completeness import promised_tensors
from qtool.model.naming import SCALE
from qtool.model.source import Model
from qtool.steps.description import Table

Fate = Literal["quantized", "folded", "kept", "unknown", "missing"]
COLUMNS = ("parameter", "tensors", "linears", "shape", "dtype", "fate", "why")
SHOWN = 5

_FOLDED_NORM = "moves into the linears behind it where a plan asks for it"


@dataclass(frozen=True)
class Parameter:
    """One stored tensor.

    Attributes:
        name: What the files call it.
        slot: What is stored; None where the family expects a tensor that no file has.
        fate: What becomes of it.
        why: The reason.
        linears: Number of linears whose weights it holds: one, or as many as there are experts in it.
    """

    name: str
    slot: TensorSlot | None
    fate: Fate
    why: str
    linears: int = 0


def parameters_of(model: Model) -> tuple[Parameter, ...]:
    """Return every stored parameter of a model, and those that its family expects but no file has."""
    fates = dict(_fates(model))
    held: dict[str, list[str]] = {}
    for name, place in model.places.items():
        held.setdefault(place.name, []).append(name)
    found = {name: _parameter(name, held[name], fates, model) for name in held}
    scales = [name for name in model.stored if name not in held]
    missing = [name for name, _ in promised_tensors(model) if name not in model.places]
    return (
        *found.values(),
        *(_scales(name, found[name.removesuffix(SCALE)], model) for name in scales),
        *(Parameter(name, None, "missing", "the family expects it, and no file has it") for name in missing),
    )


def require_known(parameters: tuple[Parameter, ...], model: Model) -> None:
    """Refuse a model with parameters that its family does not describe, or without some that it does.

    Raises:
        ModelError: There are such; names the first.
    """
    unknown = [one for one in parameters if one.fate in ("unknown", "missing")]
    if unknown:
        raise ModelError(
            f"the family `{model.family.name}` and this model differ in {len(unknown)} parameters",
            facts=tuple((one.name, one.why) for one in unknown[:SHOWN]),
            hint="describe them as data: see qtool.model.family.Family and the hook register_families",
        )


def parameter_table(parameters: tuple[Parameter, ...]) -> Table:
    """Return the parameters as a table; those of all blocks and all experts that are alike share a row."""
    rows: Counter[tuple[str, ...]] = Counter()
    linears: Counter[tuple[str, ...]] = Counter()
    for one in parameters:
        shape, dtype = ("", "") if one.slot is None else ("x".join(map(str, one.slot.shape)), one.slot.dtype)
        row = (_pattern(one.name), shape, dtype, one.fate, one.why)
        rows[row] += 1
        linears[row] += one.linears
    ordered = sorted(rows, key=lambda row: ("*" in row[0], row[0]))
    return Table(COLUMNS, [(row[0], rows[row], linears[row] or None, *row[1:]) for row in ordered])


def _fates(model: Model) -> Iterator[tuple[str, tuple[Fate, str, int]]]:
    """Yield what becomes of the tensors that the family names, with the number of linears that each holds."""
    family, graph = model.family, model.graph
    look_up = f"a look-up in 16 bits without {family.embedding}=SCHEME; rotations of the residual are folded into it"
    yield f"{family.embedding}.weight", ("kept", look_up, 0)
    kept = f"in 16 bits without {family.head}=SCHEME; rotations of the residual are folded into it"
    yield f"{family.head}.weight", ("kept", kept, 1)
    norms = [family.final_norm.module]
    for layer in range(graph.dims.num_layers):
        sites = (graph.norm_of(site) for site in graph.input_sites_of(layer))
        norms += [f"{graph.block_name(layer)}.{norm.module}" for norm in sites if norm is not None]
        for linear in graph.readers_of(layer):
            site = linear.spec.reads.rpartition(".")[2]
            if linear.spec.kept:
                why = f"{linear.spec.kept}; operators of {site} are folded into it"
                yield f"{linear.name}.weight", ("kept", why, 1)
            else:
                yield f"{linear.name}.weight", ("quantized", f"reads {site}", 1)
            yield f"{linear.name}.bias", ("kept", "added in 16 bits; operators are folded into it", 0)
    for place in norms:
        yield from ((f"{place}.{leaf}", ("folded", _FOLDED_NORM, 0)) for leaf in ("weight", "bias"))
    for writer in family.writers:
        why = "writes the residual, whose rotations are folded into it"
        yield from ((f"{writer}.{leaf}", ("kept", why, 0)) for leaf in ("weight", "bias"))
    yield from ((name, ("kept", why, 0)) for name, why in model.left_alone.items())


def _parameter(name: str, held: list[str], fates: Mapping[str, tuple[Fate, str, int]], model: Model) -> Parameter:
    """Return what becomes of a stored tensor that holds one of the model's, or one of each expert."""
    slot = model.stored[name].slot
    known = [fates[one] for one in held if one in fates]
    if len(known) < len(held):
        in_block = all(one.startswith(f"{model.family.layers}.") for one in held)
        vector = in_block and len(slot.shape) <= 1
        vector_fate: tuple[Fate, str] = ("kept", "a vector; the block applies it as it is")
        return Parameter(name, slot, *(vector_fate if vector else ("unknown", "the family does not describe it")))
    fate, why, _ = known[0]
    if model.places[held[0]].scale is not None:
        why = f"{why}; float8, dequantised on reading"
    if len(held) > 1:
        why = f"{why}; of all experts"
    return Parameter(name, slot, fate, why, sum(linears for _, _, linears in known))


def _scales(name: str, weight: Parameter, model: Model) -> Parameter:
    """Return what becomes of the scales of a float8 weight."""
    return Parameter(name, model.stored[name].slot, weight.fate, "scales of the weight, multiplied in on reading")


def _pattern(name: str) -> str:
    """Return a name with ``*`` in place of every number: the block's, the expert's."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
