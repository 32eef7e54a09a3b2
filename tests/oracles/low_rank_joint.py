"""Methods that choose codes and a low-rank correction together, on tokens instead of second moments.

Every step is a least-squares problem over explicit inputs ``X [in, tokens]``, solved as such: no Hessian is formed but
the one that the codes are chosen under, no root is taken and nothing is inverted. ``quantize(target, hessian)`` returns
the decoded weight.

References:
    Li et al. 2024, SVDQuant, arXiv:2411.05007. Saha et al. 2024, CALDERA, arXiv:2405.18886, algorithms 1 and 2.
    Scetbon and Hensman 2024, LRC, arXiv:2412.07902. GPTQ with an intrinsic correction, arXiv:2606.01412.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Quantize = Callable[[Tensor, Tensor], Tensor]
Pair = tuple[Tensor, Tensor]


def regressed(outputs: Float[Tensor, "out tokens"], inputs: Float[Tensor, "n tokens"]) -> Float[Tensor, "out n"]:
    """Return the ``B`` with the least ``||outputs - B inputs||``."""
    solution: Tensor = torch.linalg.lstsq(inputs.T, outputs.T, driver="gelsd").solution
    return solution.T


def reduced_rank(
    outputs: Float[Tensor, "out tokens"], inputs: Float[Tensor, "n tokens"], rank: int
) -> Float[Tensor, "out n"]:
    """Return the ``B`` of a rank with the least ``||outputs - B inputs||``: the fitted outputs, truncated, fitted."""
    u, sigma, vh = torch.linalg.svd(regressed(outputs, inputs) @ inputs, full_matrices=False)
    return regressed(u[:, :rank] @ torch.diag(sigma[:rank]) @ vh[:rank], inputs)


def moment(inputs: Float[Tensor, "n tokens"]) -> Float[Tensor, "n n"]:
    """Return the mean of ``x x.T``, token by token."""
    total = torch.zeros(len(inputs), len(inputs), dtype=torch.float64)
    for x in inputs.T:
        total += torch.outer(x, x)
    return total / inputs.shape[1]


def svdquant_oracle(
    weight: Float[Tensor, "out in"], inputs: Float[Tensor, "in tokens"], quantize: Quantize, rank: int, iterations: int
) -> list[Pair]:
    """Return ``Ŵ`` and ``LR`` of each iteration; the branch comes first."""
    pairs, decoded = [], torch.zeros_like(weight)
    for _ in range(iterations):
        u, sigma, vh = torch.linalg.svd(weight - decoded)
        branch = sum(float(sigma[i]) * torch.outer(u[:, i], vh[i]) for i in range(rank))
        decoded = quantize(weight - branch, moment(inputs))
        pairs.append((decoded, branch))
    return pairs


def caldera_oracle(
    weight: Float[Tensor, "out in"], inputs: Float[Tensor, "in tokens"], quantize: Quantize, rank: int, iterations: int
) -> list[Pair]:
    """Return ``Ŵ`` and ``LR`` of each iteration with factors in full precision; the codes come first."""
    pairs, correction = [], torch.zeros_like(weight)
    for _ in range(iterations):
        decoded = quantize(weight - correction, moment(inputs))
        correction = reduced_rank((weight - decoded) @ inputs, inputs, rank)
        pairs.append((decoded, correction))
    return pairs


def lrc_oracle(
    weight: Float[Tensor, "out in"], streams: tuple[Tensor, Tensor], quantize: Quantize, rank: int, iterations: int
) -> list[Pair]:
    """Return ``Ŵ`` and ``LR`` of each iteration from the inputs before and after rounding; the codes come first."""
    full, rounded = streams
    pairs, branch = [], torch.zeros_like(weight)
    for _ in range(iterations):
        decoded = quantize(regressed((weight - branch) @ full, rounded), moment(rounded))
        branch = reduced_rank(weight @ full - decoded @ rounded, full, rank)
        pairs.append((decoded, branch))
    return pairs


def intrinsic_oracle(
    weight: Float[Tensor, "out in"], inputs: Float[Tensor, "in tokens"], quantize: Quantize, rank: int
) -> Pair:
    """Return ``Ŵ`` and ``LR`` from the singular vectors of the inputs."""
    leading = torch.linalg.svd(inputs)[0][:, :rank]
    apart = inputs - leading @ (leading.T @ inputs)
    decoded = quantize(weight, moment(apart))
    return decoded, (weight - decoded) @ leading @ leading.T
