"""Second moments of weights and activations in blocks of channels, and what closed-form transforms make of them.

Blocks are stacked, ``[blocks, b, b]``, and computed together in float64: a model has thousands of them, all small.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.errors import NumericalError, ShapeError

_ROWS = 2048
"""Rows of a weight that are held in float64 at once."""


LARGEST_BLOCK = 128
"""Channels of a block of a Hessian that is kept in place of the whole: those of the largest groups in common use."""


def block_size(n: int) -> int:
    """Return the channels of the blocks that are kept of a Hessian of ``n``: a power of two that divides it.

    A group whose size is a power of two up to ``LARGEST_BLOCK`` and divides ``n`` lies in one block, so blocks are kept
    before anyone knows which groups a format is going to have.
    """
    return gcd(n, LARGEST_BLOCK)


def diagonal_blocks(matrix: Float[Tensor, "n n"], size: int) -> Float[Tensor, "blocks size size"]:
    """Return the square blocks along the diagonal, as a new tensor.

    Args:
        matrix: Such as a Hessian. Not modified.
        size: Rows of a block.

    Raises:
        ShapeError: ``size`` does not divide ``n``.
    """
    count = _count(matrix.shape[0], size)
    places = torch.arange(count, device=matrix.device)
    return matrix.reshape(count, size, count, size)[places, :, places, :]


def inner_blocks(blocks: Float[Tensor, "blocks b b"], columns: slice, size: int) -> Float[Tensor, "groups size size"]:
    """Return smaller blocks along the same diagonal, as a new tensor.

    Args:
        blocks: Of a Hessian, such as ``diagonal_blocks`` returns. Not modified.
        columns: Neighbouring ones, which the smaller blocks are of.
        size: Rows of a smaller block.

    Raises:
        ShapeError: ``size`` does not divide the columns, or a block lies across two of those that are given.
    """
    outer = blocks.shape[-1]
    count = _count(columns.stop - columns.start, size)
    first = columns.start + size * torch.arange(count, device=blocks.device)
    if bool((first // outer != (first + size - 1) // outer).any()):
        raise ShapeError(f"blocks of {size} do not lie in blocks of {outer}")
    places = first[:, None] + torch.arange(size, device=blocks.device)
    rows = places % outer
    return blocks[(places // outer)[:, :, None], rows[:, :, None], rows[:, None, :]]


def weight_moment_blocks(weights: Iterable[Float[Tensor, "_out n"]], size: int) -> Float[Tensor, "blocks size size"]:
    """Return the diagonal blocks of ``M_W = Σ WᵀW / Σ out`` over all weights that read the same input.

    Args:
        weights: One after the other, so that they need not all be in memory. Not modified.
        size: Channels of a block.

    Returns:
        The blocks in float64; they do not change if the weights are stacked or their rows reordered.

    Raises:
        ShapeError: ``size`` does not divide ``n``, or there are no weights.
    """
    total: Tensor | None = None
    rows = 0
    for weight in weights:
        count = _count(weight.shape[1], size)
        for part in torch.split(weight, _ROWS):
            by_block = part.to(torch.float64).reshape(len(part), count, size).permute(1, 2, 0)
            moment = by_block @ by_block.mT
            total = moment if total is None else total.add_(moment)
        rows += len(weight)
    if total is None:
        raise ShapeError("second moments of no weights at all")
    return total / rows


def dampened(moments: Float[Tensor, "*blocks b b"], fraction: float) -> Float[Tensor, "*blocks b b"]:
    """Return ``M + λ tr(M) / b I`` in float64, symmetric to the last bit; a block of zeros becomes the identity.

    Args:
        moments: Positive semidefinite, but for rounding. Not modified.
        fraction: ``λ``: the least eigenvalue as a fraction of the mean one.
    """
    wide = moments.to(torch.float64)
    wide = (wide + wide.mT) / 2
    mean = wide.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.where(mean > 0, fraction * mean, torch.ones_like(mean))
    return wide + torch.diag_embed(added.unsqueeze(-1).expand(wide.shape[:-1]))


def cholesky(matrices: Float[Tensor, "*blocks b b"]) -> Float[Tensor, "*blocks b b"]:
    """Return the lower triangular ``L`` with ``L Lᵀ = M``.

    Raises:
        NumericalError: A block is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(matrices)
    if bool(info.any()) or not bool(factor.isfinite().all()):
        raise _indefinite()
    return factor  # type: ignore[no-any-return]


def matrix_power(matrices: Float[Tensor, "*blocks b b"], exponent: float) -> Float[Tensor, "*blocks b b"]:
    """Return ``M`` to any real power by its eigenvectors: symmetric, with its eigenvalues to that power.

    Args:
        matrices: Symmetric and positive definite. Not modified.
        exponent: Such as 1/2 or -1/2.

    Raises:
        NumericalError: A block is not positive definite.
    """
    if not bool(matrices.isfinite().all()):
        raise _indefinite()
    values, vectors = torch.linalg.eigh(matrices)
    if not bool((values > 0).all()):
        raise _indefinite()
    power: Tensor = (vectors * values.pow(exponent).unsqueeze(-2)) @ vectors.mT
    return power


def geometric_mean(a: Float[Tensor, "*blocks b b"], b: Float[Tensor, "*blocks b b"]) -> Float[Tensor, "*blocks b b"]:
    """Return ``A # B = A^½ (A^-½ B A^-½)^½ A^½``, the ``G`` with ``G A⁻¹ G = B``.

    It is symmetric in its arguments, and for numbers the square root of their product.

    Args:
        a: Symmetric and positive definite. Not modified.
        b: The same. Not modified.

    Raises:
        NumericalError: A block of either is not positive definite.

    References:
        Bhatia 2007, Positive Definite Matrices, chapter 4.
    """
    root, inverse_root = matrix_power(a, 0.5), matrix_power(a, -0.5)
    inner = inverse_root @ b @ inverse_root
    mean = root @ matrix_power((inner + inner.mT) / 2, 0.5) @ root
    return (mean + mean.mT) / 2


def limit_condition(matrices: Float[Tensor, "*blocks b b"], most: float) -> Float[Tensor, "*blocks b b"]:
    """Bring the condition number of each block down to ``most`` by clamping its singular values.

    Both ends give way alike: values are kept within a factor ``√most`` of the geometric mean of the largest and the
    smallest. Singular vectors stay; a block within the limit stays as it is.

    Args:
        matrices: Invertible. Not modified.
        most: Largest condition number in the spectral norm, 1 or more.
    """
    left, values, right = torch.linalg.svd(matrices)
    middle = (values[..., :1] * values[..., -1:]).sqrt()
    clamped = values.clamp(middle / most**0.5, middle * most**0.5)
    within = (values[..., :1] <= most * values[..., -1:]).unsqueeze(-1)
    return torch.where(within, matrices, (left * clamped.unsqueeze(-2)) @ right)


def _count(n: int, size: int) -> int:
    if size < 1 or n % size:
        raise ShapeError(f"blocks of {size} do not divide an axis of {n}")
    return n // size


def _indefinite() -> NumericalError:
    return NumericalError("a second moment is not positive definite", hint="--set dampening=1")
