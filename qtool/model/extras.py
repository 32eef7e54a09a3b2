"""Tensors in a model's files that nothing here reads or changes, and why: they are copied as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

from qtool.model.family import Family
from qtool.model.naming import Place, split_block

_MTP = ("mtp.", "model.mtp.")
FURTHER_HEADS = "a head that predicts further tokens (MTP); nothing that is executed reads it"
# What older versions of transformers saved beside the weights.
_BUFFERS = ("inv_freq", "masked_bias")
_BUFFER = "a buffer, which loaders compute anew"


def left_alone(places: Mapping[str, Place], family: Family, num_layers: int) -> dict[str, str]:
    """Return the tensors that are left alone, with the reason.

    Blocks beyond those of the config are heads for further tokens only if they hold what no other block does; a config
    that counts too few blocks is no reason to leave the others alone.

    Args:
        places: Every tensor of the model.
        family: Says what else is left alone, and which parts of that write the residual and are folded nevertheless.
        num_layers: Number of blocks by the config.
    """
    blocks = _inner_names(places, family)
    ordinary = set().union(*(blocks.get(f"{family.layers}.{layer}.", ()) for layer in range(num_layers)))
    further = {
        block
        for block, names in blocks.items()
        if int(block.split(".")[-2]) >= num_layers and not ordinary.issuperset(names)
    }
    found = {name: _reason(name, place, family, further) for name, place in places.items()}
    return {name: why for name, why in found.items() if why}


def _reason(name: str, place: Place, family: Family, further: set[str]) -> str:
    """Return why a tensor is left alone; nothing where it is not."""
    if name.rpartition(".")[0] in family.writers:
        return ""
    if name.startswith(_MTP) or split_block(name, family)[0] in further:
        return FURTHER_HEADS
    if _is_buffer(name, place):
        return _BUFFER
    return next((why for start, why in family.untouched.items() if name.startswith(start)), "")


def _inner_names(names: Collection[str], family: Family) -> dict[str, set[str]]:
    """Return the names inside each block."""
    blocks: dict[str, set[str]] = {}
    for name in names:
        block, inside = split_block(name, family)
        if block:
            blocks.setdefault(block, set()).add(inside)
    return blocks


def _is_buffer(name: str, place: Place) -> bool:
    """Say whether a tensor is a buffer: by its name, or a mask of integers for all batches and heads."""
    shape, dtype = place.shape, place.stored.slot.dtype
    is_mask = len(shape) == 4 and prod(shape[:2]) == 1 and dtype in ("BOOL", "U8", "I64")
    return name.endswith(_BUFFERS) or is_mask
