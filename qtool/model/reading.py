"""Reading tensors from safetensors files: slices of stacked experts, float8 blocks, and a look for NaN."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.artifacts.mapped import read_slot
from qtool.errors import ModelError, NumericalError
from qtool.model.naming import SCALE, Place
from qtool.model.prequantized import BlockShape, dequantize_blocks

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Floating-point types that weights may be stored in, by their names in safetensors headers."""
FLOAT8 = "F8_E4M3"
CODES = (FLOAT8, "F8_E5M2", "F8_E8M0", "U8", "I8")
"""Types that only the codes of a quantized weight are stored in."""


def read_tensors(places: Mapping[str, Place], dtype: torch.dtype, block: BlockShape | None = None) -> dict[str, Tensor]:
    """Read tensors of a model, experts' weights as ``[out, in]``.

    Args:
        places: Where they lie, by the names that they are returned under.
        dtype: What float8 weights become.
        block: Rows and columns of float8 weights that share a scale; None if there are no such weights.

    Raises:
        ModelError: A tensor holds codes that have no scales.
        NumericalError: A tensor holds NaN or Inf.
    """
    found = {}
    for name, place in places.items():
        require_readable(name, place, block)
        tensor = read_place(place)
        if place.scale is not None and block is not None:
            scale = read_place(Place(f"{place.name}{SCALE}", place.scale))
            tensor = dequantize_blocks(tensor, scale, block).to(dtype)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            facts = (("file", place.stored.file),)
            raise NumericalError(f"the weight `{name}` holds NaN or Inf", facts=facts, hint="download it again")
        found[name] = tensor
    return found


def read_place(place: Place) -> Tensor:
    """Read one tensor as it is stored, or the transposed slice of one that belongs to an expert."""
    return slice_of_expert(place, read_slot(place.stored.file, place.stored.slot))


def slice_of_expert(place: Place, whole: Tensor) -> Tensor:
    """Return of a stored tensor the transposed slice that belongs to a place's expert; the tensor if it is of none."""
    if place.expert is None:
        return whole
    part = whole[place.expert]
    return part.mT.contiguous() if part.ndim > 1 else part


def require_readable(name: str, place: Place, block: BlockShape | None) -> None:
    """Refuse a float8 weight without scales, or with another number of them than its blocks need.

    Args:
        name: What the weight is called in the message.
        place: Where it lies.
        block: As for ``read_tensors``.

    Raises:
        ModelError: It is such a weight.
    """
    if place.stored.slot.dtype not in CODES or not name.endswith(".weight"):
        return
    hint = "start from the original model in 16 bits, or in float8 with a scale for each block"
    if place.scale is None or block is None or place.stored.slot.dtype != FLOAT8:
        raise ModelError(
            f"the tensor `{name}` holds codes without scales that are known here",
            facts=(("stored as", place.stored.slot.dtype), ("scales expected", f"{place.name}{SCALE}")),
            hint=hint,
        )
    expected = tuple(-(-length // size) for length, size in zip(place.shape, block, strict=False))
    if place.scale.slot.shape != expected:
        facts = (("expected", expected), ("received", place.scale.slot.shape))
        raise ModelError(f"the scales of `{name}` do not fit its blocks", facts=facts, hint=hint)
