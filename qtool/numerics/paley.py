"""Paley's Hadamard matrices, from the quadratic residues of finite fields of any odd prime-power size.

Type I gives order ``q + 1`` where ``q % 4 == 3``, type II gives order ``2 (q + 1)`` where ``q % 4 == 1``.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from jaxtyping import Int8
from torch import Tensor

from qtool.errors import ShapeError

MAX_PALEY_ORDER = 4096
"""None is looked for above this: as the core of a rotation it would cost as much as a dense matrix."""


@lru_cache(maxsize=4096)
def is_paley_order(order: int) -> bool:
    """Whether ``paley_matrix`` can build this order."""
    if order % 4 or not 0 < order <= MAX_PALEY_ORDER:
        return False
    return _is_field(order - 1, residue=3) or _is_field(order // 2 - 1, residue=1)


def paley_matrix(order: int) -> Int8[Tensor, "n n"]:
    """Build Paley's Hadamard matrix, of type I (not symmetric) where it exists, else of type II (symmetric).

    Returns:
        A new tensor of +1 and -1 with ``H @ H.T = n I``.

    Raises:
        ShapeError: Neither type has this order.

    References:
        Paley 1933, On orthogonal matrices.
    """
    if not is_paley_order(order):
        raise ShapeError(f"Paley's constructions give no Hadamard matrix of order `{order}`")
    return _paley_matrix(order).clone()


def prime_power(number: int) -> tuple[int, int] | None:
    """Write ``number`` as ``prime ** exponent``, or return None where that is impossible."""
    if number < 2:
        return None
    prime = next((d for d in range(2, int(number**0.5) + 1) if number % d == 0), number)
    exponent, rest = 0, number
    while rest % prime == 0:
        rest //= prime
        exponent += 1
    return (prime, exponent) if rest == 1 else None


def jacobsthal_matrix(field_size: int) -> Int8[Tensor, "q q"]:
    """Tabulate ``Q[i, j] = chi(a_i - a_j)`` over the elements ``a`` of the finite field ``GF(q)``.

    ``chi`` is 0 at zero, 1 at nonzero squares and -1 elsewhere. ``Q @ Q.T = q I - J`` with ``J`` all ones; ``Q``
    is symmetric where ``q % 4 == 1`` and skew where ``q % 4 == 3``. Element number ``i`` is the polynomial whose
    coefficients are the digits of ``i`` in base ``p``, lowest first.

    Args:
        field_size: ``q``, an odd prime power.

    Raises:
        ShapeError: ``q`` is not an odd prime power.
    """
    power = prime_power(field_size)
    if power is None or field_size % 2 == 0:
        raise ShapeError(f"a Jacobsthal matrix needs an odd prime power, got `{field_size}`")
    prime, degree = power
    weights = prime ** torch.arange(degree, device="cpu")
    digits = torch.arange(field_size, device="cpu").unsqueeze(1) // weights % prime
    difference = torch.zeros(field_size, field_size, dtype=torch.int64, device="cpu")
    for column, weight in zip(digits.unbind(1), weights, strict=True):
        difference += (column[:, None] - column[None, :]).remainder(prime) * weight
    return _quadratic_character(prime, degree)[difference]


def _quadratic_character(prime: int, degree: int) -> Tensor:
    """``chi`` of every element: the even powers of a generator of the multiplicative group are its squares."""
    size = prime**degree
    moduli = product(range(prime), repeat=degree)
    powers = next(p for p in (_powers_of_x(prime, lower) for lower in moduli) if len(p) == size - 1)
    character = torch.zeros(size, dtype=torch.int8, device="cpu")
    character[powers[0::2]] = 1
    character[powers[1::2]] = -1
    return character


def _powers_of_x(prime: int, lower: tuple[int, ...]) -> list[int]:
    """The distinct powers ``1, x, x**2, …`` modulo ``x**degree - sum_k lower[k] * x**k``, as element numbers.

    Where all ``q - 1`` nonzero elements appear, each of them is invertible: the ring is the field ``GF(q)``
    and ``x`` generates its multiplicative group, so no separate search for an irreducible polynomial is needed.
    """
    if lower[0] == 0:  # x divides the modulus: it has no inverse, and its powers never return to 1
        return []
    one = (1,) + (0,) * (len(lower) - 1)
    powers, element = [], one
    while True:
        powers.append(sum(digit * prime**k for k, digit in enumerate(element)))
        top, shifted = element[-1], (0, *element[:-1])
        element = tuple((s + top * c) % prime for s, c in zip(shifted, lower, strict=True))
        if element == one:
            return powers


def _is_field(size: int, *, residue: int) -> bool:
    return size % 4 == residue and prime_power(size) is not None


@lru_cache(maxsize=32)
def _paley_matrix(order: int) -> Tensor:
    with torch.inference_mode(mode=False):  # a cached inference tensor could not serve a later backward pass
        if _is_field(order - 1, residue=3):
            skew = _border(jacobsthal_matrix(order - 1), corner=-1)
            return skew + torch.eye(order, dtype=torch.int8, device="cpu")
        conference = _border(jacobsthal_matrix(order // 2 - 1), corner=1)
        diagonal = torch.eye(order // 2, dtype=torch.int8, device="cpu")
        off_diagonal_block = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")
        diagonal_block = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8, device="cpu")
        return torch.kron(conference, off_diagonal_block) + torch.kron(diagonal, diagonal_block)


def _border(jacobsthal: Tensor, *, corner: int) -> Tensor:
    """Add a first row of ones and a first column of ``corner`` (1: symmetric, -1: skew), with 0 where they meet."""
    size = jacobsthal.shape[0] + 1
    bordered = torch.full((size, size), corner, dtype=torch.int8, device="cpu")
    bordered[0] = 1
    bordered[0, 0] = 0
    bordered[1:, 1:] = jacobsthal
    return bordered
