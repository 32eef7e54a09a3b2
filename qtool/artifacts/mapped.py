"""Stored tensors as memory that is mapped from their file, each by itself.

What is not looked at is not read, and a tensor that is dropped gives its pages back. Nothing is parsed on the way: the
library parses the header of a file again with each opening, and keeps the whole file mapped while it is open.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qtool.artifacts.layout import AGAIN, TensorSlot
from qtool.errors import ArtifactError

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_slot(path: Path, slot: TensorSlot, *, size: int = 0) -> Tensor:
    """Return a stored tensor. Writing to it does not change the file.

    Args:
        path: The file.
        slot: Where the tensor lies in it.
        size: Bytes that the file must have.

    Raises:
        ArtifactError: The file cannot be read, is shorter than its header says, or has a type that torch lacks.
    """
    try:
        dtype = _DTYPES[slot.dtype]
        if not slot.nbytes:
            return torch.empty(slot.shape, dtype=dtype)
        first = slot.start % mmap.ALLOCATIONGRANULARITY
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < size:
                raise ValueError(f"less than {size} bytes")
            pages = mmap.mmap(file.fileno(), first + slot.nbytes, access=mmap.ACCESS_COPY, offset=slot.start - first)
        return torch.frombuffer(pages, dtype=torch.uint8, offset=first).view(dtype).reshape(slot.shape)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"cannot read the tensors of `{path}`", facts=(("reason", error),), hint=AGAIN) from error
