"""Hadamard matrices and the orthonormal rotations made of them.

One convention holds everywhere: ``H_n = kron(H_K, H_P)`` with ``n = K * P``, where ``P`` is a power of two, ``H_P``
is Sylvester's matrix, and ``H_K`` is Paley's with the smallest ``K`` that exists (1 where ``n`` is a power of two).
Where Paley gives no ``K`` at all, ``H_K`` is Goethals and Seidel's; never elsewhere, not even where its ``K`` would
be smaller, because entries must not change under stored plans. ``H_K`` is in general *not* symmetric; vectors are
rows and are multiplied from the right.

Sylvester's factor is applied as products with matrices of order at most 64, which is a butterfly of radix 64. The
butterfly of radix 2 does fewer operations but reads and writes the whole tensor once for each factor of two; on a
CPU it was measured 1.7 to 8.6 times slower over the sizes of current models.
"""

from __future__ import annotations

from functools import lru_cache
from math import sqrt

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from qtool.errors import ShapeError
from qtool.numerics.hadamard_tables import is_tabled_order, tabled_matrix
from qtool.numerics.paley import is_paley_order, paley_matrix

_MAX_RADIX = 64


def hadamard_matrix(order: int) -> Int8[Tensor, "n n"]:
    """Build ``H_n``, whose entries are +1 and -1 and for which ``H_n @ H_n.T = n I``.

    Constructions: Sylvester's doubling of 1, of Paley's matrices over fields of any odd prime-power size, and of
    eight matrices of Goethals and Seidel. Together they reach every possible order up to 260, and many above.

    Args:
        order: ``n``: 1, 2 or a multiple of 4.

    Returns:
        A new tensor: the matrix that ``hadamard_rotate`` applies, without the ``1 / sqrt(n)``.

    Raises:
        ShapeError: No construction gives this order. The hint names what is possible.

    References:
        Sylvester 1867; Paley 1933, On orthogonal matrices; Goethals and Seidel 1967.
    """
    core, power = hadamard_factors(order)
    matrix = _core_matrix(core)
    pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")
    for _ in range(power.bit_length() - 1):
        matrix = torch.kron(matrix, pair)
    return matrix


def hadamard_factors(n: int) -> tuple[int, int]:
    """Split ``n = K * P`` so that ``H_n = kron(H_K, H_P)``, with ``P`` a power of two and ``K`` as small as possible.

    The smallest ``K`` of Paley's counts; the others serve where Paley has none.

    Raises:
        ShapeError: No such ``K`` can be constructed. The hint names the largest power of two that divides ``n``.
    """
    factors = _factors(n)
    if factors is not None:
        return factors
    below = next((str(k) for k in range(n - 1, 0, -1) if _factors(k)), "none")
    above = next(k for k in range(max(n + 1, 1), 2 * max(n, 1) + 1) if _factors(k))
    nearby = f"the nearest orders are {below} below and {above} above"
    block = n & -n
    raise ShapeError(
        f"no Hadamard matrix of order `{n}` can be constructed",
        facts=(
            ("expected", "1, 2 or a multiple of 4 that a known construction reaches"),
            ("received", n),
        ),
        hint=f"rotate in blocks: block_size={block} divides {n}; {nearby}" if n > 0 and block > 1 else nearby,
    )


def hadamard_rotate(
    x: Float[Tensor, "*batch n"], *, signs: Float[Tensor, " n"] | None = None, transpose: bool = False
) -> Float[Tensor, "*batch n"]:
    """Rotate the last axis: ``x @ diag(signs) @ H_n / sqrt(n)``.

    ``H_n = kron(H_K, H_P)`` as ``hadamard_factors`` splits ``n``, applied factor by factor without being formed.
    The map is orthonormal: it keeps L2 norms. For ``y = x @ W.T`` rotate both ``x`` and ``W``; ``y`` is unchanged
    because ``(x R)(W R).T = x W.T``. Each factor carries its own scale, so that no partial sum outgrows the L2
    norm of its row.

    Args:
        x: Values to rotate. Computed in float32 or wider and cast back; fold into weights in float64.
        signs: Entries +1 or -1 that randomize the rotation.
        transpose: Apply the inverse, ``x @ H_n.T @ diag(signs) / sqrt(n)``. ``H_n`` is its own inverse only
            where it is symmetric, as it is for every power of two.

    Returns:
        A new tensor of the shape and dtype of ``x``.

    Raises:
        ShapeError: ``H_n`` cannot be constructed, or ``signs`` does not have ``n`` entries.

    References:
        Ashkboos et al. 2024, QuaRot, arXiv:2404.00456. Tseng et al. 2024, QuIP#, arXiv:2402.04396.

    Example:
        >>> hadamard_rotate(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    n = x.shape[-1]
    if signs is not None and signs.shape != (n,):
        raise ShapeError("signs do not fit the values", facts=(("expected", (n,)), ("received", tuple(signs.shape))))
    core, power = hadamard_factors(n)
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if signs is not None and not transpose:
        y = y * signs.to(y)
    inner = 1
    for radix in _balanced_radices(power):
        y = _multiply_axis(y, _orthonormal(radix, y.dtype, y.device), inner)
        inner *= radix
    if core > 1:
        matrix = _orthonormal(core, y.dtype, y.device)
        y = _multiply_axis(y, matrix.mT if transpose else matrix, inner)
    y = y.reshape(x.shape)
    if signs is not None and transpose:
        y = y * signs.to(y)
    return y.to(x.dtype)


def hadamard_core(x: Float[Tensor, "*batch n"], *, transpose: bool = False) -> Float[Tensor, "*batch n"]:
    """Apply only the factor ``H_K / sqrt(K)`` of ``hadamard_rotate``: what is left once its power of two has run.

    Args:
        x: Values; computed in float32 or wider and cast back.
        transpose: Apply ``H_K.T / sqrt(K)``.
    """
    core, power = hadamard_factors(x.shape[-1])
    if core == 1:
        return x
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    matrix = _orthonormal(core, y.dtype, y.device)
    return _multiply_axis(y, matrix.mT if transpose else matrix, power).reshape(x.shape).to(x.dtype)


def random_signs(n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
    """Draw ``n`` independent signs, +1 or -1 with equal probability, on the generator's device."""
    bits = torch.randint(0, 2, (n,), generator=generator, device=generator.device)
    return (1 - 2 * bits).to(torch.float32)


@lru_cache(maxsize=4096)
def _factors(n: int) -> tuple[int, int] | None:
    powers = [1 << bit for bit in reversed(range((n & -n).bit_length()))] if n > 0 else []
    if powers and n == powers[0]:
        return 1, n
    for is_core in (is_paley_order, is_tabled_order):
        for power in powers:
            if is_core(n // power):
                return n // power, power
    return None


def _core_matrix(order: int) -> Int8[Tensor, "n n"]:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8, device="cpu")
    return paley_matrix(order) if is_paley_order(order) else tabled_matrix(order)


def _multiply_axis(y: Tensor, matrix: Tensor, inner: int) -> Tensor:
    """Read ``y`` row-major as ``[outer, k, inner]`` and multiply ``matrix`` from the right onto axis ``k``."""
    size = matrix.shape[0]
    if inner == 1:
        return y.reshape(y.numel() // size, size) @ matrix
    return torch.matmul(matrix.mT, y.reshape(y.numel() // (size * inner), size, inner))


def _balanced_radices(power: int) -> list[int]:
    """Split a power of two into as few factors of at most ``_MAX_RADIX`` as possible, near equal, largest first."""
    bits, most = power.bit_length() - 1, _MAX_RADIX.bit_length() - 1
    count = max(1, -(-bits // most))
    return [1 << (bits // count + (i < bits % count)) for i in range(count)]


@lru_cache(maxsize=64)
def _orthonormal(order: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "n n"]:
    with torch.inference_mode(mode=False):  # a cached inference tensor could not serve a later backward pass
        return (hadamard_matrix(order).to(torch.float64) / sqrt(order)).to(device, dtype)
