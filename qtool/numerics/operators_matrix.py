"""Operators given by matrices: ``orthogonal``, ``affine``, ``kron`` and ``block``."""

# ruff: noqa: D102 (the interface, `Operator`, documents every method that a kind has)

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.errors import NumericalError, ShapeError
from qtool.numerics.operator_interface import JsonScalar, Operator, OperatorGroup, check_heads, over_heads


@dataclass(frozen=True, eq=False)
class Orthogonal(Operator):
    """Rotate: ``T = Q``.

    Attributes:
        q: ``Q`` with ``Q Q.T = I``: ``[n, n]``, or ``[heads, n, n]``. That is relied on and not checked: project a
            learned matrix before.
        heads: How many heads have a matrix of their own.
    """

    kind: ClassVar[str] = "orthogonal"
    group: ClassVar[OperatorGroup] = "orthogonal"
    q: Float[Tensor, "*heads n n"]
    heads: int = 1

    def __post_init__(self) -> None:
        check_heads(self, self.q, axes=2)

    @property
    def dim(self) -> int:
        return self.q.shape[-1]

    def act(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return over_heads(self, x, lambda v: _multiply(v, self.q))

    def act_inverse(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return over_heads(self, x, lambda v: _multiply(v, self.q.mT))

    def weight_in(self, w: Float[Tensor, "*out n"]) -> Float[Tensor, "*out n"]:
        return self.act(w)

    def inverse(self) -> Orthogonal:
        return Orthogonal(self.q.mT.contiguous(), self.heads)

    def log_condition(self) -> float:
        return 0.0

    def flops(self) -> int:
        return 2 * self.q.numel()

    def state(self) -> tuple[dict[str, Tensor], dict[str, JsonScalar]]:
        return {"q": self.q}, {"heads": self.heads}


@dataclass(frozen=True, eq=False)
class Affine(Operator):
    """Multiply by any invertible matrix: ``T = P``.

    Attributes:
        p: ``P``: ``[n, n]``, or ``[heads, n, n]``.
        p_inverse_transposed: ``P^-T``, which is relied on and not checked; ``from_matrix`` computes it.
        heads: How many heads have a matrix of their own.
    """

    kind: ClassVar[str] = "affine"
    group: ClassVar[OperatorGroup] = "general"
    p: Float[Tensor, "*heads n n"]
    p_inverse_transposed: Float[Tensor, "*heads n n"]
    heads: int = 1

    def __post_init__(self) -> None:
        check_heads(self, self.p, axes=2)
        if self.p.shape != self.p_inverse_transposed.shape:
            raise ShapeError(
                "a matrix and its inverse differ in shape",
                facts=(("expected", tuple(self.p.shape)), ("received", tuple(self.p_inverse_transposed.shape))),
            )

    @classmethod
    def from_matrix(cls, p: Float[Tensor, "*heads n n"], heads: int = 1) -> Affine:
        """Invert ``p`` in float64.

        Raises:
            NumericalError: ``p`` is singular.
        """
        return cls(p, _inverse(p).mT.contiguous().to(p.dtype), heads)

    @property
    def dim(self) -> int:
        return self.p.shape[-1]

    def act(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return over_heads(self, x, lambda v: _multiply(v, self.p))

    def act_inverse(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return over_heads(self, x, lambda v: _multiply(v, self.p_inverse_transposed.mT))

    def weight_in(self, w: Float[Tensor, "*out n"]) -> Float[Tensor, "*out n"]:
        return over_heads(self, w, lambda v: _multiply(v, self.p_inverse_transposed))

    def inverse(self) -> Affine:
        return Affine(self.p_inverse_transposed.mT.contiguous(), self.p.mT.contiguous(), self.heads)

    def log_condition(self) -> float:
        return _log_condition(self.p)

    def flops(self) -> int:
        return 2 * self.p.numel()

    def state(self) -> tuple[dict[str, Tensor], dict[str, JsonScalar]]:
        return {"p": self.p, "p_inverse_transposed": self.p_inverse_transposed}, {"heads": self.heads}


@dataclass(frozen=True, eq=False)
class Kron(Operator):
    """Multiply by a Kronecker product: ``T = kron(L, R)``; with ``x`` read row-major as ``V[a, b]``, ``L.T V R``.

    Attributes:
        left: ``L``, invertible.
        right: ``R``, invertible.

    References:
        Sun et al. 2024, FlatQuant, arXiv:2410.09426, section 3.
    """

    kind: ClassVar[str] = "kron"
    group: ClassVar[OperatorGroup] = "general"
    left: Float[Tensor, "a a"]
    right: Float[Tensor, "b b"]

    @property
    def dim(self) -> int:
        return self.left.shape[0] * self.right.shape[0]

    def act(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self._multiply(x, self.left, self.right)

    def act_inverse(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self._multiply(x, _inverse(self.left), _inverse(self.right))

    def weight_in(self, w: Float[Tensor, "*out n"]) -> Float[Tensor, "*out n"]:
        return self._multiply(w, _inverse(self.left).mT, _inverse(self.right).mT)

    def inverse(self) -> Kron:
        return Kron(_inverse(self.left).to(self.left.dtype), _inverse(self.right).to(self.right.dtype))

    def log_condition(self) -> float:
        return _log_condition(self.left) + _log_condition(self.right)

    def flops(self) -> int:
        return 2 * self.dim * (self.left.shape[0] + self.right.shape[0])

    def state(self) -> tuple[dict[str, Tensor], dict[str, JsonScalar]]:
        return {"left": self.left, "right": self.right}, {}

    def _multiply(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        def product(v: Tensor) -> Tensor:
            matrix = v.reshape(*v.shape[:-1], left.shape[0], right.shape[0])
            return torch.matmul(left.mT.to(v), matrix @ right.to(v)).flatten(-2)

        return over_heads(self, x, product)


@dataclass(frozen=True, eq=False)
class Block(Operator):
    """Multiply by a block-diagonal matrix of invertible blocks.

    Attributes:
        matrices: One matrix per block in order, or a single one that all blocks share.
        n: Size of the last axis, a multiple of the block size.
    """

    kind: ClassVar[str] = "block"
    group: ClassVar[OperatorGroup] = "general"
    matrices: Float[Tensor, "blocks b b"]
    n: int

    def __post_init__(self) -> None:
        count, size, _ = self.matrices.shape
        if self.n < 1 or self.n % size or count not in (1, self.n // size):
            raise ShapeError(
                f"blocks do not fit an axis of {self.n}",
                facts=(("expected", "one block that divides it, or one for each place"), ("received", (count, size))),
            )

    @property
    def dim(self) -> int:
        return self.n

    @property
    def span(self) -> int:
        return self.matrices.shape[-1]

    def act(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self._multiply(x, self.matrices)

    def act_inverse(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self._multiply(x, _inverse(self.matrices))

    def weight_in(self, w: Float[Tensor, "*out n"]) -> Float[Tensor, "*out n"]:
        return self._multiply(w, _inverse(self.matrices).mT)

    def inverse(self) -> Block:
        return Block(_inverse(self.matrices).to(self.matrices.dtype), self.n)

    def log_condition(self) -> float:
        return _log_condition(self.matrices)

    def flops(self) -> int:
        return 2 * self.n * self.matrices.shape[-1]

    def state(self) -> tuple[dict[str, Tensor], dict[str, JsonScalar]]:
        return {"matrices": self.matrices}, {"n": self.n}

    def _multiply(self, x: Tensor, matrices: Tensor) -> Tensor:
        size = matrices.shape[-1]
        return over_heads(
            self, x, lambda v: _multiply(v.reshape(*v.shape[:-1], self.n // size, size), matrices).flatten(-2)
        )


def _multiply(v: Tensor, matrix: Tensor) -> Tensor:
    """``v @ matrix`` on the last axis; several matrices each take their own place on the axis before it."""
    matrix = matrix.to(v)
    if matrix.ndim == 2 or matrix.shape[0] == 1:
        return v @ matrix.reshape(matrix.shape[-2:])
    product: Tensor = torch.einsum("...hi,hij->...hj", v, matrix)
    return product


def _inverse(matrix: Tensor) -> Tensor:
    """Invert in float64."""
    inverse: Tensor
    inverse, info = torch.linalg.inv_ex(matrix.to(torch.float64))
    if bool(info.any()) or not bool(inverse.isfinite().all()):
        raise NumericalError("the matrix of an operator is singular or not finite")
    return inverse


def _log_condition(matrix: Tensor) -> float:
    singular_values = torch.linalg.svdvals(matrix.detach().to(torch.float64))
    smallest = float(singular_values.min())
    return log(float(singular_values.max()) / smallest) if smallest > 0.0 else inf
