"""The dense Hadamard matrix in Sylvester's order, by its definition.

References:
    Sylvester 1867; entry ``(i, j)`` is ``(-1) ** popcount(i & j)``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def sylvester_oracle(n: int) -> Float[Tensor, "n n"]:
    """Return the matrix with entries +1 and -1, not normalized, in float64.

    Args:
        n: A power of two.

    Returns:
        ``H_n``; divide by ``sqrt(n)`` for the orthonormal one.

    Raises:
        ValueError: ``n`` is not a power of two.
    """
    if n < 1 or n.bit_count() != 1:
        message = f"{n} is not a power of two"
        raise ValueError(message)
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    return torch.tensor(rows, dtype=torch.float64)


def is_hadamard(matrix: Float[Tensor, "n n"]) -> bool:
    """Say whether all entries are +1 or -1 and ``H @ H.T = n I``, both exactly; any order, not only 2^k."""
    n = matrix.shape[0]
    signs = bool((matrix.abs() == 1).all())
    gram = matrix.double() @ matrix.double().T
    return signs and bool((gram == n * torch.eye(n, dtype=torch.float64)).all())
