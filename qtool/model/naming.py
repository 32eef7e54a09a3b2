"""What the files of a model call its tensors, and where each lies: in a tensor of its own, or in one of all experts.

The graph knows modules by their names in transformers, and every expert's linears by names of their own. Files may say
``block_sparse_moe.`` for ``mlp.``, or hold one tensor ``[experts, in, out]`` for all experts of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qtool.model.family import Family
from qtool.model.files import StoredTensor

SCALE = "_scale_inv"
"""Ending of the tensor that holds the scales of a float8 weight, added to the weight's name."""
_BIAS = "_bias"


@dataclass(frozen=True)
class Place:
    """Where a tensor of the model lies.

    Attributes:
        name: Its name in the files.
        stored: The tensor of that name.
        expert: Which slice of it, for a tensor that holds the weights of all experts; a slice is transposed.
        scale: Scales of a float8 weight.
    """

    name: str
    stored: StoredTensor
    expert: int | None = None
    scale: StoredTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor as it is read."""
        shape = self.stored.slot.shape
        return shape if self.expert is None else shape[:0:-1]


def places_of(stored: Mapping[str, StoredTensor], family: Family) -> dict[str, Place]:
    """Return where every tensor lies, by the names that the graph knows.

    Args:
        stored: The tensors of the files, by their names there.
        family: Says how files name and stack tensors.
    """
    places: dict[str, Place] = {}
    for name, tensor in stored.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in stored:
            continue
        canonical = canonical_name(name, family)
        split = dict(_of_experts(canonical, tensor, family))
        if split:
            places |= {one: Place(name, tensor, expert) for one, expert in split.items()}
        else:
            places[canonical] = Place(name, tensor, scale=stored.get(f"{name}{SCALE}"))
    return places


def canonical_name(stored: str, family: Family) -> str:
    """Return what the graph calls a tensor (a stacked one: as its module is called in transformers)."""
    if not family.stored_as:
        return stored
    block, inside = split_block(_renamed(stored, family.stored_as), family)
    return f"{block}{_renamed(inside, family.stored_as)}" if block else inside


def stored_name(name: str, family: Family) -> str:
    """Return what files call a tensor that is not stacked, as the family says."""
    block, inside = split_block(name, family)
    renaming = {new: old for old, new in family.stored_as.items()}
    return _renamed(f"{block}{_renamed(inside, renaming)}" if block else name, renaming)


def split_block(name: str, family: Family) -> tuple[str, str]:
    """Return the name of the block that a tensor belongs to, with its dot, and the rest of its name.

    The first is empty for a tensor outside of the blocks.
    """
    prefix = f"{family.layers}."
    index, dot, inside = name.removeprefix(prefix).partition(".")
    if name.startswith(prefix) and dot and index.isdecimal():
        return f"{prefix}{index}.", inside
    return "", name


def _renamed(name: str, stored_as: Mapping[str, str]) -> str:
    """Undo a renaming of the beginning; of several that could be meant, the longest is, which may be the new name."""
    found = [(len(new), new, new) for new in stored_as if name.startswith(new)]
    found += [(len(old), old, new) for new, old in stored_as.items() if name.startswith(old)]
    if not found:
        return name
    _, old, new = max(found, key=lambda one: one[0])
    return new + name.removeprefix(old)


def _of_experts(name: str, tensor: StoredTensor, family: Family) -> Iterator[tuple[str, int]]:
    """Yield the names of the experts' tensors that one tensor holds, with their experts."""
    block, inside = split_block(name, family)
    experts = family.experts
    if experts is None or not experts.stacked or not inside.startswith(f"{experts.module}."):
        return
    module = inside.removeprefix(f"{experts.module}.")
    leaf, axes = ("bias", 2) if module.endswith(_BIAS) else ("weight", 3)
    module, shape = module.removesuffix(_BIAS), tensor.slot.shape
    if module in {spec.module for spec in experts.linears} and len(shape) == axes:
        yield from ((f"{block}{experts.module}.{expert}.{module}.{leaf}", expert) for expert in range(shape[0]))
