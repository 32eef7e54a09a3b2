"""The interface of an invertible operator ``T``, the building block of a transform plan.

Vectors are rows. At the input of a linear layer ``y = x W.T + b`` an operator rewrites activations to ``(x - z) T``,
every consumer's weight to ``W T^-T`` and its bias to ``b + z W.T``; ``y`` stays what it was. A producer
``x = u W_p.T + b_p`` can absorb it instead: ``W_p`` becomes ``T.T W_p`` and ``b_p`` becomes ``(b_p - z) T``.
For ``T = T1 T2`` every side applies ``T1`` first and ``T2`` second.

**Axes.** An operator acts on vectors of ``dim`` channels. Several of them may lie side by side in the last axis, which
is then read row-major as ``[heads, repeat, dim]``. With ``heads == 1`` all share the operator. With more, each head has
its own parameters, ``[heads, …]``, and its ``repeat`` neighbours share them, as the query heads of one key/value head
do. ``x[..., heads, dim]`` is taken as well.

**Precision.** Everything is computed in the dtype of the values, but in float32 or wider, and cast back. Parameters
are stored as they are given, and cast to the dtype and device of the values when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.errors import ArtifactError, ShapeError

JsonScalar: TypeAlias = str | int | float | bool | None
"""A parameter that is not a tensor; a plan stores it in its JSON."""

OperatorGroup: TypeAlias = Literal["general", "orthogonal", "diag", "signs", "perm", "shift"]
"""What a planner decides foldability by; ``general`` is every invertible matrix, ``signs`` a diagonal of +1 and -1."""


@runtime_checkable
class Operator(Protocol):
    """One invertible map, a frozen dataclass; no method modifies its arguments or the operator.

    What kinds share has a body here, so that a class can inherit from this protocol and write only the rest.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    kind: ClassVar[str]
    """The name in a plan."""

    group: ClassVar[OperatorGroup]
    """The smallest group that the operator belongs to whatever its parameters are."""

    @property
    def dim(self) -> int:
        """Channels of one vector."""
        ...

    @property
    def heads(self) -> int:
        """How many vectors side by side have parameters of their own."""
        return 1

    @property
    def is_orthogonal(self) -> bool:
        """Whether ``T T.T = I`` for every value of the parameters."""
        return self.group in ("orthogonal", "signs", "perm")

    @property
    def is_diagonal(self) -> bool:
        """Whether ``T`` is diagonal for every value of the parameters."""
        return self.group in ("diag", "signs")

    @property
    def is_permutation(self) -> bool:
        """Whether ``T`` only reorders channels."""
        return self.group == "perm"

    @property
    def span(self) -> int:
        """Channels of a run that are mixed with each other and with no others: ``T`` is block-diagonal in such runs."""
        return 1 if self.is_diagonal or self.group == "shift" else self.dim

    def act(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Transform activations: ``(x - z) T``."""
        ...

    def act_inverse(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Undo ``act``: ``x T^-1 + z``."""
        ...

    def weight_in(self, w: Float[Tensor, "*out n"]) -> Float[Tensor, "*out n"]:
        """Transform a consumer's weight: ``W T^-T``."""
        ...

    def weight_out(self, w: Float[Tensor, "*n in"]) -> Float[Tensor, "*n in"]:
        """Transform a producer's weight: ``T.T W``."""
        return self.act(w.movedim(-1, 0)).movedim(0, -1).contiguous()

    def bias_in(self, w: Float[Tensor, "out *in"], b: Float[Tensor, " out"] | None) -> Float[Tensor, " out"] | None:
        """Transform a consumer's bias: ``b + z W.T``, with ``w`` as it is *before* ``weight_in``."""
        return b

    def bias_out(self, b: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Transform a producer's bias: ``(b - z) T``."""
        return self.act(b)

    def to_dense(self) -> Float[Tensor, "n n"]:
        """Form ``T`` for all heads side by side, ``n = heads * dim``, in float64 on the CPU; a shift has ``T = I``."""
        return self.act(torch.eye(self.heads * self.dim, dtype=torch.float64, device="cpu"))

    def inverse(self) -> Operator:
        """The operator whose ``act`` is this one's ``act_inverse``."""
        ...

    def log_condition(self) -> float:
        """Natural logarithm of the condition number of ``T`` in the spectral norm, over all heads together."""
        ...

    def flops(self) -> int:
        """Additions and multiplications that ``act`` needs for one token, all heads together."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, JsonScalar]]:
        """Tensors and scalars by field name: what ``from_state`` rebuilds the operator from."""
        ...

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], params: Mapping[str, JsonScalar]) -> Operator:
        """Rebuild an operator from what its ``state`` returned.

        Raises:
            ArtifactError: The names are not those of this kind.
            NumericalError: The values are not those of this kind.
        """
        declared = fields(cls)
        required = {field.name for field in declared if field.default is MISSING}
        given = {*tensors, *params}
        if not required <= given <= {field.name for field in declared} or set(tensors) & set(params):
            names = ", ".join(field.name for field in declared)
            raise ArtifactError(
                f"the state of a `{cls.kind}` operator is not what this kind holds",
                facts=(("expected", names), ("received", ", ".join(sorted(given)))),
            )
        return cls(**tensors, **params)


def over_heads(operator: Operator, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of ``[..., dim]``, or of ``[..., heads, dim]``, under the rules of axes and precision above.

    Args:
        operator: Says ``heads`` and ``dim``.
        x: Values in either layout.
        function: What to do with one vector, or with the vectors of all heads; it is given float32 or wider.

    Raises:
        ShapeError: The last axis holds no whole number of such vectors.
    """
    heads, dim = operator.heads, operator.dim
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.ndim and x.shape[-1] == dim and (heads == 1 or x.shape[-2:-1] == (heads,)):
        return function(wide).to(x.dtype)
    if x.ndim == 0 or x.shape[-1] == 0 or x.shape[-1] % (heads * dim):
        raise ShapeError(
            f"a `{operator.kind}` operator does not fit the values",
            facts=(("expected", f"a last axis of {heads} x {dim}, or a multiple"), ("received", tuple(x.shape))),
        )
    by_head = wide.reshape(*x.shape[:-1], heads, x.shape[-1] // (heads * dim), dim).transpose(-2, -3)
    return function(by_head).transpose(-2, -3).reshape(x.shape).to(x.dtype)


def check_heads(operator: Operator, parameter: Tensor, *, axes: int) -> None:
    """Refuse a parameter whose leading axis is not ``heads``; with one head it may be left out.

    Args:
        operator: Says ``heads``.
        parameter: A parameter of it.
        axes: How many axes one head's parameter has.

    Raises:
        ShapeError: The shape is another.
    """
    leading = tuple(parameter.shape[:-axes]) if parameter.ndim >= axes else None
    if leading != (operator.heads,) and not (operator.heads == 1 and leading == ()):
        raise ShapeError(
            f"a parameter of a `{operator.kind}` operator does not fit its {operator.heads} heads",
            facts=(("expected", f"{axes} axes behind {operator.heads} heads"), ("received", tuple(parameter.shape))),
        )
