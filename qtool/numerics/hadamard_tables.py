"""Goethals and Seidel's Hadamard matrices: the orders up to 260 that Paley's fields do not reach, and 428.

Four rows of length ``t`` with entries +1 and -1, whose periodic autocorrelations add up to zero at every shift but
0, give circulants with ``A A.T + B B.T + C C.T + D D.T = 4 t I``. With the back-diagonal ``R`` (ones where
``i + j = t - 1``) they fill an array of order ``4 t``::

     A     B R   C R   D R
    -B R   A     D'R  -C'R
    -C R  -D'R   A     B'R
    -D R   C'R  -B'R   A        with X' = X.T

**Where the rows come from.** Base sequences, ``a`` and ``b`` of one length, ``c`` and ``d`` of another, are four
sequences whose *aperiodic* autocorrelations add up to zero; the rows are then ``(a, c)``, ``(a, -c)``, ``(b, d)`` and
``(b, -d)``. A Golay pair ``f, g`` makes them: ``a = (1, f)``, ``b = (-1, f)``, ``c = d = g``; this is order 260, with
a pair of length 32. Turyn-type sequences ``x, y, z, w`` make them too: ``a = (z, w)``, ``b = (z, -w)``, ``c = x``,
``d = y``; these are orders 92, 116, 188, 236 and 428. Order 156 is ``a = (z, 1)``, ``b = (z, -1)``. The rows of
order 172 are constant on the cosets of the seventh roots of unity modulo 43. The sequences of order 428 are
Kharaghani and Tayfeh-Rezaie's, a short random search found the others; the tests prove each matrix.

References:
    Golay 1961, Complementary series. Goethals and Seidel 1967, Orthogonal matrices with zero diagonal. Turyn 1974,
    Hadamard matrices, Baumert-Hall units, four-symbol sequences, pulse compression, and surface wave encodings.
    Kharaghani and Tayfeh-Rezaie 2005, A Hadamard matrix of order 428.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Int8
from torch import Tensor

from qtool.errors import ShapeError

_ROWS = {
    92: "6a89f2 1509f2 73f6f2 0c76f2",
    116: "176f37ca 089737ca 1f88cbca 0070cbca",
    156: "6774c0a96c 188b30a96c 71ff88a96c 0e0078a96c",
    172: "5d18bc2e744 036761ef2a8 4b30a5af32c 37a83bbfe7a",
    188: "4f7f04b96570 308084b96570 62ed7b466570 1d12fb466570",
    236: "70044f2ab6ec796 0ffbb72ab6ec796 676018d549ec796 189fe0d549ec796",
    428: "5e121f53c21158b3e8768c88682 21ede0ac3a1158b3e8768c88682 "
    "4e10cdac15eea74c17768c88682 31ef3253edeea74c17768c88682",
}
"""Order to its four rows in base 16; entry ``j`` is -1 where bit ``j`` is set, bit 0 being the lowest."""

_GOLAY_ORDER = 260


def is_tabled_order(order: int) -> bool:
    """Whether ``tabled_matrix`` can build this order."""
    return order == _GOLAY_ORDER or order in _ROWS


def tabled_matrix(order: int) -> Int8[Tensor, "n n"]:
    """Build a Hadamard matrix of Goethals and Seidel's array, which is not symmetric.

    Returns:
        A new tensor of +1 and -1 with ``H @ H.T = n I``.

    Raises:
        ShapeError: No rows are known for this order.
    """
    if not is_tabled_order(order):
        raise ShapeError(f"no rows of Goethals and Seidel's array are known for order `{order}`")
    return _tabled_matrix(order).clone()


@lru_cache(maxsize=8)
def _tabled_matrix(order: int) -> Tensor:
    with torch.inference_mode(mode=False):  # a cached inference tensor could not serve a later backward pass
        rows = _golay_rows(order // 8) if order == _GOLAY_ORDER else _stored_rows(order)
        return _goethals_seidel(torch.tensor(rows, dtype=torch.int8, device="cpu"))


def _stored_rows(order: int) -> list[list[int]]:
    return [[1 - 2 * (int(row, 16) >> j & 1) for j in range(order // 4)] for row in _ROWS[order].split()]


def _golay_rows(length: int) -> list[list[int]]:
    """The rows of a Golay pair of some power of two: ``(f, g)`` doubles to ``(f, g)`` joined and ``(f, -g)`` joined."""
    f, g = [1], [1]
    while len(f) < length:
        f, g = f + g, f + _negated(g)
    return [[head, *f, *tail] for head in (1, -1) for tail in (g, _negated(g))]


def _negated(sequence: list[int]) -> list[int]:
    return [-entry for entry in sequence]


def _goethals_seidel(rows: Int8[Tensor, "4 t"]) -> Int8[Tensor, "n n"]:
    size = rows.shape[1]
    index = torch.arange(size, device="cpu")
    circulants = rows[:, (index[None, :] - index[:, None]) % size]
    a = circulants[0]
    b, c, d = circulants[1:].flip(2)  # B R, C R, D R
    bt, ct, dt = circulants[1:].mT.flip(2)  # B'R, C'R, D'R
    blocks = ((a, b, c, d), (-b, a, dt, -ct), (-c, -dt, a, bt), (-d, ct, -bt, a))
    return torch.cat([torch.cat(row, dim=1) for row in blocks])
