"""Single weights in 16 bits in front of a dense matrix of codes, as compressed sparse rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float16, Int32
from torch import Tensor


@dataclass(frozen=True)
class Outliers:
    """Weights that stand in place of what their codes decode to.

    Attributes:
        row_ptr: Where the entries of each row begin, and where those of the last end.
        col: Column of each entry, ascending in a row.
        values: The weights.
    """

    row_ptr: Int32[Tensor, " rows_and_end"]
    col: Int32[Tensor, " entries"]
    values: Float16[Tensor, " entries"]

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], places: Bool[Tensor, "out in"]) -> Outliers:
        """Return the entries of a weight at some places, rounded to float16."""
        counts = torch.cat([places.new_zeros(1, dtype=torch.int64), places.sum(1).cumsum(0)])
        return cls(counts.int(), places.nonzero()[:, 1].int(), weight[places].half())

    @property
    def rows(self) -> Tensor:
        """Row of each entry."""
        lengths = self.row_ptr.diff().long()
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    def put(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return a weight with the entries in it."""
        return weight.index_put((self.rows, self.col.long()), self.values.to(weight.dtype))

    def places(self, n_in: int) -> Bool[Tensor, "out in"]:
        """Return where entries are in a weight of ``n_in`` columns."""
        nowhere = self.col.new_zeros(len(self.row_ptr) - 1, n_in, dtype=torch.bool)
        return nowhere.index_put((self.rows, self.col.long()), nowhere.new_ones(()))
