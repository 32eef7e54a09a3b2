"""The invertible operators of a transform plan: every kind by its name, and lists of them applied in order.

The interface, and the rules of axes and precision, are in ``qtool.numerics.operator_interface``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.errors import PluginError, UsageError
from qtool.numerics.operator_interface import JsonScalar, Operator, OperatorGroup
from qtool.numerics.operators_hadamard import Hadamard, HeadMix
from qtool.numerics.operators_matrix import Affine, Block, Kron, Orthogonal
from qtool.numerics.operators_pointwise import Diag, Perm, Shift, Signs

__all__ = [
    "OPERATORS",
    "Affine",
    "Block",
    "Diag",
    "Hadamard",
    "HeadMix",
    "JsonScalar",
    "Kron",
    "Operator",
    "OperatorGroup",
    "Orthogonal",
    "Perm",
    "Shift",
    "Signs",
    "carry_hessian",
    "carry_hessian_blocks",
    "carry_mean",
    "compose_act",
    "operator_from_state",
]

_KINDS: tuple[type[Operator], ...] = (
    Shift, Diag, Signs, Perm, Hadamard, HeadMix, Orthogonal, Affine, Kron, Block,
)  # fmt: skip

OPERATORS: Mapping[str, type[Operator]] = MappingProxyType({cls.kind: cls for cls in _KINDS})
"""Every kind that the core knows, by its name in a plan."""


def operator_from_state(kind: str, tensors: Mapping[str, Tensor], params: Mapping[str, JsonScalar]) -> Operator:
    """Rebuild an operator from its kind and from what its ``state`` returned.

    Raises:
        PluginError: No such kind.
        ArtifactError: The names are not those of this kind.
        NumericalError: The values are not those of this kind.
    """
    if kind not in OPERATORS:
        raise PluginError(f"unknown operator kind `{kind}`", hint="known kinds: " + ", ".join(sorted(OPERATORS)))
    return OPERATORS[kind].from_state(tensors, params)


def compose_act(operators: Sequence[Operator], x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Apply ``T = T1 T2 …`` to activations, first to last."""
    for operator in operators:
        x = operator.act(x)
    return x


def carry_mean(operators: Sequence[Operator], mean: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Mean of the transformed activations: ``(mean - z) T``."""
    return compose_act(operators, mean)


def carry_hessian(
    operators: Sequence[Operator], hessian: Float[Tensor, "n n"], *, mean: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "n n"]:
    """Hessian of the transformed activations, ``T.T H T``, without seeing them again.

    A shift makes it ``H - m z.T - z m.T + z z.T``, which needs the mean ``m`` over the same tokens with the same
    weights, and weights that sum to one.

    Args:
        operators: Applied first to last.
        hessian: ``sum x x.T / tokens``.
        mean: ``sum x / tokens``; needed only where ``operators`` hold a shift.

    Raises:
        UsageError: There is a shift and no ``mean``.
    """
    for operator in operators:
        if operator.group == "shift":
            hessian = _moved(operator, hessian.unsqueeze(0), mean).squeeze(0)
        else:
            hessian = operator.act(operator.act(hessian).mT).mT
        mean = None if mean is None else operator.act(mean)
    return hessian


def carry_hessian_blocks(
    operator: Operator, blocks: Float[Tensor, "blocks b b"], *, mean: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "blocks b b"] | None:
    """Diagonal blocks of the Hessian of the transformed activations; None where those do not follow from the blocks.

    They do behind a shift, and behind what mixes channels inside of blocks only.

    Args:
        operator: What is applied.
        blocks: Those of ``sum x x.T / tokens`` along its diagonal.
        mean: ``sum x / tokens``; needed only for a shift.

    Raises:
        UsageError: There is a shift and no ``mean``.
    """
    count, size, _ = blocks.shape
    if operator.group == "shift":
        return _moved(operator, blocks, mean)
    if size % operator.span:
        return None

    def act(parts: Tensor) -> Tensor:
        """Apply the operator to the rows of all blocks, which are parts of the vectors that it acts on."""
        vectors = operator.act(parts.transpose(0, 1).reshape(size, count * size))
        return vectors.reshape(size, count, size).transpose(0, 1)

    return act(act(blocks).mT).mT.contiguous()


def _moved(
    shift: Operator, blocks: Float[Tensor, "blocks b b"], mean: Float[Tensor, " n"] | None
) -> Float[Tensor, "blocks b b"]:
    """Return blocks of ``H - m z.T - z m.T + z z.T``."""
    if mean is None:
        raise UsageError(
            "a Hessian can be carried through a shift only with the mean of the activations",
            hint="qtool calibrate MODEL --gather hessian,mean,min,max",
        )
    m, z = (one.reshape(len(blocks), -1, 1) for one in (mean, -shift.act(torch.zeros_like(mean))))
    return blocks - m * z.mT - z * m.mT + z * z.mT
