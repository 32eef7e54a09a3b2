"""What becomes of every parameter of a model: quantized, folded, kept (and why), or unknown to its family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qtool.artifacts.layout import TensorSlot, read_header
from qtool.errors import ModelError
from qtool.model.source import Model
from qtool.steps.description import Table

Fate = Literal["quantized", "folded", "kept", "unknown"]
COLUMNS = ("parameter", "layers", "shape", "dtype", "fate", "why")
SHOWN = 5


@dataclass(frozen=True)
class Parameter:
    """One stored tensor: its name, what is stored, and what becomes of it."""

    name: str
    slot: TensorSlot | None
    fate: Fate
    why: str


def parameters_of(model: Model) -> tuple[Parameter, ...]:
    """Return every parameter of a model, and those that its family expects but no file has."""
    slots: dict[str, TensorSlot] = {}
    for file in sorted(set(model.files.values())):
        slots |= read_header(file).slots
    expected = [f"{linear.name}.weight" for linear in model.graph.linears]
    rules = _rules(model)
    stored = tuple(Parameter(name, slot, *_fate(name, slot, model, rules)) for name, slot in slots.items())
    why = "the family expects it, and no file has it"
    return (*stored, *(Parameter(name, None, "unknown", why) for name in expected if name not in slots))


def require_known(parameters: tuple[Parameter, ...], model: Model) -> None:
    """Refuse a model with parameters that its family does not describe.

    Raises:
        ModelError: There are such; names the first.
    """
    unknown = [one for one in parameters if one.fate == "unknown"]
    if unknown:
        raise ModelError(
            f"the family `{model.family.name}` does not describe {len(unknown)} parameters of this model",
            facts=tuple((one.name, one.why) for one in unknown[:SHOWN]),
            hint="describe them as data: see qtool.model.family.Family and the hook register_families",
        )


def parameter_table(parameters: tuple[Parameter, ...], model: Model) -> Table:
    """Return the parameters as a table; those of all blocks that are alike share a row."""
    rows: dict[tuple[str, str, str, Fate, str], int] = {}
    for one in parameters:
        shape, dtype = ("", "") if one.slot is None else ("x".join(map(str, one.slot.shape)), one.slot.dtype)
        row = (_pattern(one.name, model), shape, dtype, one.fate, one.why)
        rows[row] = rows.get(row, 0) + 1
    ordered = sorted(rows, key=lambda row: ("*" in row[0], row[0]))
    return Table(COLUMNS, [(row[0], rows[row], *row[1:]) for row in ordered])


def _rules(model: Model) -> Mapping[str, tuple[Fate, str]]:
    """Return what becomes of the parameters that the family names, by name (inside a block: with ``*``)."""
    family = model.family
    block = f"{family.layers}.*"
    rules: dict[str, tuple[Fate, str]] = {
        f"{family.embedding}.weight": ("kept", "a look-up; rotations of the residual are folded into it"),
        f"{family.head}.weight": ("kept", "the head stays in 16 bits; rotations of the residual are folded into it"),
    }
    for norm in (family.final_norm, *family.norms.values()):
        place = norm.module if norm is family.final_norm else f"{block}.{norm.module}"
        for leaf in ("weight", "bias"):
            rules[f"{place}.{leaf}"] = ("folded", "moves into the linears behind it where a plan asks for it")
    for linear in family.linears:
        rules[f"{block}.{linear.module}.weight"] = ("quantized", f"reads {linear.reads}")
        rules[f"{block}.{linear.module}.bias"] = ("kept", "added in 16 bits; operators are folded into it")
    return rules


def _fate(name: str, slot: TensorSlot, model: Model, rules: Mapping[str, tuple[Fate, str]]) -> tuple[Fate, str]:
    pattern = _pattern(name, model)
    if pattern in rules:
        return rules[pattern]
    if "*" in pattern and len(slot.shape) <= 1:
        return "kept", "a vector; the block applies it as it is"
    return "unknown", "the family does not describe it"


def _pattern(name: str, model: Model) -> str:
    """Return a name with ``*`` in place of the block's index."""
    prefix = f"{model.family.layers}."
    if not name.startswith(prefix):
        return name
    index, dot, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}*.{rest}" if dot and index.isdecimal() else name
