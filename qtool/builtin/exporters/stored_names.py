"""Tensors of a checkpoint under the names, and in the layout, of the files that the model came from.

So whoever loads the original model finds what it looks for: ``block_sparse_moe.experts.3.w1.weight``, or one tensor of
all experts where the files have one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.model.naming import split_block
from qtool.model.source import Model


def stored_tensor_name(model: Model, name: str) -> str:
    """Return what files call a tensor, perhaps one that only a quantized checkpoint has, by the name of its module."""
    module, _, leaf = name.rpartition(".")
    beside = f"{module}.weight"
    if name in model.places or beside not in model.places:
        return model.stored_name(name)
    return f"{model.stored_name(beside).rpartition('.')[0]}.{leaf}"


def as_stored(model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as files hold them: renamed, and the experts' stacked again where the model's files stack them.

    Args:
        model: The original model.
        tensors: By the names that the graph knows; of stacked ones, those of every expert.
    """
    stored: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        place = model.places.get(name)
        if place is None or place.expert is None:
            stored[stored_tensor_name(model, name)] = tensor
        else:
            stacks.setdefault(place.name, {})[place.expert] = tensor.mT if tensor.ndim > 1 else tensor
    return stored | {name: torch.stack([by[expert] for expert in sorted(by)]) for name, by in stacks.items()}


def expected_shapes(model: Model, modules: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors by their names in files.

    Args:
        model: The original model; what is left alone has the names and shapes of its files.
        modules: Shapes of the tensors of the consumer's modules, in which the first expert stands for all.
    """
    untouched = tuple(model.family.untouched)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in modules.items():
        if name in model.left_alone or (name.startswith(untouched) and name not in model.places):
            continue
        for one in _of_every_expert(model, name):
            place = model.places.get(one)
            stacked = place is not None and place.expert is not None
            shapes[stored_tensor_name(model, one)] = place.stored.slot.shape if place and stacked else shape
    return shapes | {model.places[name].name: model.places[name].shape for name in model.left_alone}


def _of_every_expert(model: Model, name: str) -> tuple[str, ...]:
    """Return the names of a tensor of the first expert for all experts; the name alone for any other tensor."""
    block, inside = split_block(name, model.family)
    experts = model.family.experts
    first = f"{experts.module}.0." if experts is not None else ""
    if experts is None or not block or not inside.startswith(first):
        return (name,)
    rest = inside.removeprefix(first)
    return tuple(f"{block}{experts.module}.{expert}.{rest}" for expert in range(model.graph.dims.experts))
