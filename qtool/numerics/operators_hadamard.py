"""Operators made of Hadamard matrices: ``hadamard`` over channels, ``head_mix`` over the heads of an axis."""

# ruff: noqa: D102 (the interface, `Operator`, documents every method that a kind has)

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float, Real
from torch import Tensor

from qtool.errors import ShapeError
from qtool.numerics.hadamard import hadamard_factors, hadamard_rotate
from qtool.numerics.operator_interface import JsonScalar, Operator, OperatorGroup, over_heads
from qtool.numerics.operators_pointwise import check_signs


@runtime_checkable
class Rotation(Protocol):
    """A way to compute ``hadamard_rotate`` without signs, for instance by a kernel."""

    def __call__(self, x: Float[Tensor, "*batch n"], *, transpose: bool) -> Float[Tensor, "*batch n"]:
        """Return ``x @ H_n / sqrt(n)``, or its inverse."""
        ...


@dataclass(frozen=True, eq=False)
class Hadamard(Operator):
    """Randomized Hadamard rotation in blocks: ``T = diag(signs) @ kron(I, H_b) / sqrt(b)``, or its transpose.

    Attributes:
        n: Size of the last axis.
        signs: Entries +1 or -1 over all ``n`` channels, of any signed dtype; int8 is what a plan stores.
        block_size: ``b``, which divides ``n``; None is one block of ``n``.
        transposed: Act by ``T.T``, the inverse rotation.
        core_order: ``K`` of ``H_b = kron(H_K, H_P)``. It is stored so that a plan made with another construction
            of ``H_b`` is refused instead of being applied with other bits; None fills in the present one.
    """

    kind: ClassVar[str] = "hadamard"
    group: ClassVar[OperatorGroup] = "orthogonal"
    n: int
    signs: Real[Tensor, " n"] | None = None
    block_size: int | None = None
    transposed: bool = False
    core_order: int | None = None

    def __post_init__(self) -> None:
        block = self.n if self.block_size is None else self.block_size
        if block < 1 or self.n % block:
            raise ShapeError("the block size does not divide the axis", facts=(("axis", self.n), ("received", block)))
        if self.signs is not None:
            check_signs(self, self.signs)
            if self.signs.shape != (self.n,):
                raise ShapeError(
                    "signs do not fit a `hadamard` operator",
                    facts=(("expected", (self.n,)), ("received", tuple(self.signs.shape))),
                )
        object.__setattr__(self, "block_size", block)
        object.__setattr__(self, "core_order", _checked_core(block, self.core_order))

    @property
    def dim(self) -> int:
        return self.n

    @property
    def span(self) -> int:
        return self.block_size or self.n

    def act(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self.act_by(hadamard_rotate, x)

    def act_inverse(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self.act_by(hadamard_rotate, x, inverse=True)

    def weight_in(self, w: Float[Tensor, "*out n"]) -> Float[Tensor, "*out n"]:
        return self.act(w)

    def inverse(self) -> Hadamard:
        return Hadamard(self.n, self.signs, self.block_size, not self.transposed, self.core_order)

    def log_condition(self) -> float:
        return 0.0

    def flops(self) -> int:
        flips = 0 if self.signs is None else self.n
        return flips + self.n * _flops_per_channel(self.block_size or self.n)

    def state(self) -> tuple[dict[str, Tensor], dict[str, JsonScalar]]:
        tensors = {} if self.signs is None else {"signs": self.signs}
        return tensors, {
            "n": self.n,
            "block_size": self.block_size,
            "transposed": self.transposed,
            "core_order": self.core_order,
        }

    def act_by(
        self, rotation: Rotation, x: Float[Tensor, "*batch n"], *, inverse: bool = False
    ) -> Float[Tensor, "*batch n"]:
        """Return what ``act`` or ``act_inverse`` returns, with every block rotated by ``rotation``."""
        return over_heads(self, x, partial(self._rotated, rotation, self.transposed != inverse))

    def _rotated(self, rotation: Rotation, transpose: bool, v: Tensor) -> Tensor:
        """Rotate the blocks of the last axis, signs in front or behind."""
        block = self.block_size or self.n
        signs = None if self.signs is None else self.signs.to(v)
        if signs is not None and not transpose:
            v = v * signs
        y = rotation(v.reshape(*v.shape[:-1], self.n // block, block), transpose=transpose).flatten(-2)
        return y * signs if signs is not None and transpose else y


@dataclass(frozen=True, eq=False)
class HeadMix(Operator):
    """Mix the heads that lie side by side in one axis: ``T = kron(H_heads, I_head_dim) / sqrt(heads)``.

    Attributes:
        num_heads: Heads in the axis.
        head_dim: Channels of one head.
        transposed: Act by ``T.T``, the inverse rotation.
        core_order: As for ``Hadamard``, here of ``H_heads``.
    """

    kind: ClassVar[str] = "head_mix"
    group: ClassVar[OperatorGroup] = "orthogonal"
    num_heads: int
    head_dim: int
    transposed: bool = False
    core_order: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "core_order", _checked_core(self.num_heads, self.core_order))

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim

    def act(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self.act_by(hadamard_rotate, x)

    def act_inverse(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self.act_by(hadamard_rotate, x, inverse=True)

    def weight_in(self, w: Float[Tensor, "*out n"]) -> Float[Tensor, "*out n"]:
        return self.act(w)

    def inverse(self) -> HeadMix:
        return HeadMix(self.num_heads, self.head_dim, not self.transposed, self.core_order)

    def log_condition(self) -> float:
        return 0.0

    def flops(self) -> int:
        return self.dim * _flops_per_channel(self.num_heads)

    def state(self) -> tuple[dict[str, Tensor], dict[str, JsonScalar]]:
        return {}, {
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "transposed": self.transposed,
            "core_order": self.core_order,
        }

    def act_by(
        self, rotation: Rotation, x: Float[Tensor, "*batch n"], *, inverse: bool = False
    ) -> Float[Tensor, "*batch n"]:
        """Return what ``act`` or ``act_inverse`` returns, with the heads mixed by ``rotation``."""
        transpose = self.transposed != inverse

        def mixed(v: Tensor) -> Tensor:
            by_channel = v.reshape(*v.shape[:-1], self.num_heads, self.head_dim).mT
            return rotation(by_channel, transpose=transpose).mT.flatten(-2)

        return over_heads(self, x, mixed)


def _checked_core(order: int, stored: int | None) -> int:
    core, _ = hadamard_factors(order)
    if stored not in (None, core):
        raise ShapeError(
            f"the plan was made with another Hadamard matrix of order `{order}`",
            facts=(("expected core", stored), ("received core", core)),
        )
    return core


def _flops_per_channel(order: int) -> int:
    core, power = hadamard_factors(order)
    return power.bit_length() - 1 + (core if core > 1 else 0)
