"""A quantized linear whose codes stay packed as they are stored, since most layouts want them so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qtool.engine.grid import Grid
from qtool.engine.problem import QuantizedLinear
from qtool.numerics.groups import each_parameter
from qtool.numerics.packing import unpack_codes
from qtool.scheme import GroupParameters

ROWS = 32
"""Rows whose codes of any bits fill whole words where a layout packs them along the rows."""
_PIECE = 1 << 20


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one core, also as a decorator: moving codes is so short that threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class PackedLinear:
    """Codes and parameters of a linear of one scheme, without what lies beside them.

    Attributes:
        stream: Its codes as ``pack_codes`` makes them.
        bits: Bits of a code.
        n_in: Codes in a row.
        parameters: Scales and zero points, and the tensor-level multiplier.
    """

    stream: UInt8[Tensor, "out bytes"]
    bits: int
    n_in: int
    parameters: GroupParameters

    def codes(self, rows: slice) -> UInt8[Tensor, "rows in"]:
        """Return the codes of some rows, unpacked."""
        return unpack_codes(self.stream[rows], self.bits, self.n_in)

    def take(self, rows: slice) -> PackedLinear:
        """Return some rows."""
        n_out = len(self.stream)
        parameters = each_parameter(self.parameters, lambda one: take_rows(one, rows, n_out))
        return replace(self, stream=self.stream[rows], parameters=parameters)

    def rows(self, rows: slice) -> QuantizedLinear:
        """Return some rows, unpacked."""
        return QuantizedLinear(self.codes(rows), (self.take(rows).parameters,))

    @one_thread()
    def weight(self, grid: Grid, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Return the decoded weight in a dtype, made piece by piece."""
        whole = self.stream.new_empty((len(self.stream), self.n_in), dtype=dtype)
        for rows in self.pieces():
            whole[rows] = self.rows(rows).weight(grid)
        return whole

    def pieces(self) -> Iterator[slice]:
        """Yield the rows in pieces that a cache holds unpacked, of whole multiples of ``ROWS`` but for the last."""
        n_out = len(self.stream)
        step = max(1, _PIECE // self.n_in // ROWS) * ROWS
        return (slice(start, min(start + step, n_out)) for start in range(0, n_out, step))


def take_rows(tensor: Tensor, rows: slice, n_out: int, axis: int = 0) -> Tensor:
    """Return the part of a linear's tensor that is of some rows; what has no axis of rows is of all.

    Args:
        tensor: Anything of the linear. Not modified.
        rows: Which rows.
        n_out: Rows of the linear; several may share an entry of the tensor.
        axis: Where the tensor has its rows.
    """
    if tensor.ndim < 2 and tensor.shape != (n_out,):
        return tensor
    length = tensor.shape[axis]
    start, stop = rows.start * length // n_out, -(-rows.stop * length // n_out)
    return tensor.narrow(axis, start, stop - start)
