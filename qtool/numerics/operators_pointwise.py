"""Operators that treat channels one by one: ``shift``, ``diag``, ``signs`` and ``perm``."""

# ruff: noqa: D102 (the interface, `Operator`, documents every method that a kind has)

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from qtool.errors import NumericalError, ShapeError
from qtool.numerics.operator_interface import JsonScalar, Operator, OperatorGroup, check_heads, over_heads


@dataclass(frozen=True, eq=False)
class Shift(Operator):
    """Subtract a constant from every channel: ``x - z``; ``T`` is the identity.

    Attributes:
        z: What is subtracted, in units of the activations: ``[n]``, or ``[heads, n]``.
        heads: How many heads have values of their own.
    """

    kind: ClassVar[str] = "shift"
    group: ClassVar[OperatorGroup] = "shift"
    z: Float[Tensor, "*heads n"]
    heads: int = 1

    def __post_init__(self) -> None:
        check_heads(self, self.z, axes=1)

    @property
    def dim(self) -> int:
        return self.z.shape[-1]

    def act(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return over_heads(self, x, lambda v: v - _per_channel(self.z, v))

    def act_inverse(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return over_heads(self, x, lambda v: v + _per_channel(self.z, v))

    def weight_in(self, w: Float[Tensor, "*out n"]) -> Float[Tensor, "*out n"]:
        return over_heads(self, w, torch.clone)

    def weight_out(self, w: Float[Tensor, "*n in"]) -> Float[Tensor, "*n in"]:
        return self.weight_in(w.movedim(-1, 0)).movedim(0, -1).contiguous()

    def bias_in(self, w: Float[Tensor, "out *in"], b: Float[Tensor, " out"] | None) -> Float[Tensor, " out"]:
        wide = w.to(torch.promote_types(w.dtype, torch.float32))
        z = self.act_inverse(torch.zeros_like(wide[:1]))
        correction = (wide * z).flatten(1).sum(1)
        return correction.to(w.dtype) if b is None else (b + correction).to(b.dtype)

    def to_dense(self) -> Float[Tensor, "n n"]:
        return torch.eye(self.heads * self.dim, dtype=torch.float64, device="cpu")

    def inverse(self) -> Shift:
        return Shift(-self.z, self.heads)

    def log_condition(self) -> float:
        return 0.0

    def flops(self) -> int:
        return self.z.numel()

    def state(self) -> tuple[dict[str, Tensor], dict[str, JsonScalar]]:
        return {"z": self.z}, {"heads": self.heads}


@dataclass(frozen=True, eq=False)
class Diag(Operator):
    """Multiply every channel by a factor: ``T = diag(s)``.

    Attributes:
        s: Nonzero factors of any sign: ``[n]``, or ``[heads, n]``.
        heads: How many heads have factors of their own.
    """

    kind: ClassVar[str] = "diag"
    group: ClassVar[OperatorGroup] = "diag"
    s: Float[Tensor, "*heads n"]
    heads: int = 1

    def __post_init__(self) -> None:
        check_heads(self, self.s, axes=1)
        if not bool(((self.s != 0) & self.s.isfinite()).all()):
            raise NumericalError("a `diag` operator holds a factor that is zero or not finite")

    @property
    def dim(self) -> int:
        return self.s.shape[-1]

    def act(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return over_heads(self, x, lambda v: v * _per_channel(self.s, v))

    def act_inverse(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return over_heads(self, x, lambda v: v / _per_channel(self.s, v))

    def weight_in(self, w: Float[Tensor, "*out n"]) -> Float[Tensor, "*out n"]:
        return self.act_inverse(w)

    def inverse(self) -> Diag:
        return Diag((1.0 / self.s.to(torch.float64)).to(self.s.dtype), self.heads)

    def log_condition(self) -> float:
        magnitude = self.s.detach().to(torch.float64).abs()
        return log(float(magnitude.max()) / float(magnitude.min()))

    def flops(self) -> int:
        return self.s.numel()

    def state(self) -> tuple[dict[str, Tensor], dict[str, JsonScalar]]:
        return {"s": self.s}, {"heads": self.heads}


@dataclass(frozen=True, eq=False)
class Signs(Operator):
    """Flip the sign of some channels: ``T = diag(s)`` with entries +1 and -1.

    Attributes:
        s: Entries +1 or -1 of any signed dtype: ``[n]``, or ``[heads, n]``. int8 takes the least room in a plan.
        heads: How many heads have signs of their own.
    """

    kind: ClassVar[str] = "signs"
    group: ClassVar[OperatorGroup] = "signs"
    s: Real[Tensor, "*heads n"]
    heads: int = 1

    def __post_init__(self) -> None:
        check_heads(self, self.s, axes=1)
        check_signs(self, self.s)

    @property
    def dim(self) -> int:
        return self.s.shape[-1]

    def act(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return over_heads(self, x, lambda v: v * _per_channel(self.s, v))

    def act_inverse(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self.act(x)

    def weight_in(self, w: Float[Tensor, "*out n"]) -> Float[Tensor, "*out n"]:
        return self.act(w)

    def inverse(self) -> Signs:
        return self

    def log_condition(self) -> float:
        return 0.0

    def flops(self) -> int:
        return self.s.numel()

    def state(self) -> tuple[dict[str, Tensor], dict[str, JsonScalar]]:
        return {"s": self.s}, {"heads": self.heads}


@dataclass(frozen=True, eq=False)
class Perm(Operator):
    """Reorder channels: output channel ``j`` is input channel ``index[j]``.

    Attributes:
        index: Every channel number once.
    """

    kind: ClassVar[str] = "perm"
    group: ClassVar[OperatorGroup] = "perm"
    index: Int[Tensor, " n"]

    def __post_init__(self) -> None:
        if not torch.equal(self.index.sort().values, torch.arange(self.dim).to(self.index)):
            raise ShapeError(f"the index of a `perm` operator is not a permutation of {self.dim} channels")

    @property
    def dim(self) -> int:
        return self.index.shape[0]

    def act(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return over_heads(self, x, lambda v: v.index_select(-1, self.index.to(v.device)))

    def act_inverse(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self.inverse().act(x)

    def weight_in(self, w: Float[Tensor, "*out n"]) -> Float[Tensor, "*out n"]:
        return self.act(w)

    def inverse(self) -> Perm:
        return Perm(self.index.argsort().to(self.index.dtype))

    def log_condition(self) -> float:
        return 0.0

    def flops(self) -> int:
        return 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, JsonScalar]]:
        return {"index": self.index}, {}


def check_signs(operator: Operator, signs: Tensor) -> None:
    """Refuse entries other than +1 and -1.

    Raises:
        NumericalError: There are some.
    """
    if not bool((signs.abs() == 1).all()):
        raise NumericalError(f"the signs of a `{operator.kind}` operator are not all +1 or -1")


def _per_channel(parameter: Tensor, like: Tensor) -> Tensor:
    """To the dtype and device of the values; a leading axis of one head goes, so that it adds no axis to them."""
    return (parameter.squeeze(0) if parameter.ndim > 1 else parameter).to(like)
