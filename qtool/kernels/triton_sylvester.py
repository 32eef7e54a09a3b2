"""The Triton program of ``triton_hadamard``. Importing this module imports Triton.

Read row-major as ``[outer, size, inner]``, the values hold ``outer * inner`` vectors of ``size`` entries that lie
``inner`` apart. One launch multiplies each of them by Sylvester's matrix of order ``size``; one program takes several
neighbouring vectors. Because ``H_{ab} = kron(H_a, H_b)``, an order above ``MAX_SIZE`` is two launches or more:
first with ``inner = 1``, then over what is left of the axis with ``inner`` equal to what is done.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

MAX_SIZE = 8192
"""Entries of a vector that one program holds in registers."""

_TILE = 4096
_ENTRIES_PER_THREAD = 32


def sylvester(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Return ``x @ H_n / sqrt(n)`` for a power of two ``n``: float32 sums, the shape and dtype of ``x``."""
    values, left, inner = x.contiguous(), x.shape[-1], 1
    while True:
        size = min(left, MAX_SIZE if inner == 1 else MAX_SIZE // 32)
        left //= size
        result = torch.empty_like(values, dtype=x.dtype if left == 1 else torch.float32)
        _launch(values, result, size, inner)
        if left == 1:
            return result
        values, inner = result, inner * size


def _launch(values: Tensor, result: Tensor, size: int, inner: int) -> None:
    vectors = values.numel() // size
    vectors_per_program = max(1, _TILE // size)
    warps = size * vectors_per_program // (32 * _ENTRIES_PER_THREAD)
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        _sylvester[(triton.cdiv(vectors, vectors_per_program),)](
            values,
            result,
            vectors,
            inner,
            SIZE=size,
            BITS=size.bit_length() - 1,
            VECTORS=vectors_per_program,
            num_warps=warps,
        )


@triton.jit
@no_type_check  # Triton compiles the function's source, which a wrapper around it would hide
def _sylvester(values, result, vectors, inner, SIZE: tl.constexpr, BITS: tl.constexpr, VECTORS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    first = vector // inner * SIZE * inner + vector % inner
    where = first[:, None] + tl.arange(0, SIZE)[None, :] * inner
    there = (vector < vectors)[:, None]
    x = tl.load(values + where, mask=there, other=0.0).to(tl.float32)
    for bit in tl.static_range(BITS):
        # Halving before every second step is exact, and no sum outgrows the vector's norm by more than sqrt(2).
        if bit % 2 == 0:
            x = x * (0.5 if bit + 1 < BITS else 0.7071067811865476)
        # The lowest bit of the index is transformed and becomes the highest: after BITS steps each is in its place.
        even, odd = tl.split(tl.reshape(x, (VECTORS, SIZE // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (VECTORS, SIZE))
    tl.store(result + where, x, mask=there)
