"""LDLQ: adaptive rounding with linear feedback taken from an LDL factorization of the Hessian.

The feedback acts on the errors of the *original* weight, and no inverse occurs; that it gives the codes of
GPTQ is a theorem, not an implementation detail.

References:
    Chee et al. 2023, QuIP, arXiv:2307.13304, section 3 (LDLQ) and theorem 6 (its equivalence with OPTQ).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .gptq import Decode, Encode, Fit, Order, dampen, fit_groups, stack_groups, visiting_order


def unit_upper_ldl(hessian: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """Factor ``H = (F + I) D (F + I).T`` with ``F`` strictly upper triangular.

    Args:
        hessian: Symmetric and positive definite. Not modified.

    Returns:
        The feedback ``F`` and the diagonal of ``D``.

    Raises:
        ArithmeticError: A pivot is not positive.
    """
    rest: list[list[float]] = hessian.double().tolist()
    n = len(rest)
    feedback = [[0.0] * n for _ in range(n)]
    pivots = [0.0] * n
    for k in reversed(range(n)):
        pivots[k] = rest[k][k]
        if not pivots[k] > 0:
            message = f"pivot {k} is {pivots[k]}"
            raise ArithmeticError(message)
        for i in range(k):
            feedback[i][k] = rest[i][k] / pivots[k]
        for i in range(k):
            for j in range(k):
                rest[i][j] -= feedback[i][k] * pivots[k] * feedback[j][k]
    return torch.tensor(feedback, dtype=torch.float64), torch.tensor(pivots, dtype=torch.float64)


def ldlq_oracle(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    fit: Fit,
    encode: Encode,
    decode: Decode,
    group_size: int,
    dampening_frac: float = 0.01,
    order: Order = "natural",
) -> tuple[
    Int[Tensor, "out in"],
    Float[Tensor, "out in"],
    Float[Tensor, " out"],
    Float[Tensor, "out groups"],
    Shaped[Tensor, "out groups"] | None,
]:
    """Round ``q_k = Q(w_k + (w_<k - q_<k) F_<k,k)`` in visiting order, with static group parameters.

    Args:
        weight: Full-precision weight. Not modified.
        hessian: ``X @ X.T / tokens``. Not modified.
        fit: See ``gptq_oracle``.
        encode: See ``gptq_oracle``.
        decode: See ``gptq_oracle``.
        group_size: Storage columns that share parameters.
        dampening_frac: See ``dampen``.
        order: See ``visiting_order``.

    Returns:
        As ``gptq_oracle``; the loss of a row is ``sum_k D_k (w_k + feedback_k - q_k)^2``.
    """
    original, damped = dampen(weight, hessian, dampening_frac)
    groups = fit_groups(original, fit, group_size)
    visits = visiting_order(damped, order, group_size)
    feedback, pivots = unit_upper_ldl(damped[visits][:, visits])
    codes: dict[int, Tensor] = {}
    values = torch.zeros_like(original)
    loss = torch.zeros_like(original[:, 0])
    for k, col in enumerate(visits):
        target = original[:, col].clone()
        for i, earlier in enumerate(visits[:k]):
            target += (original[:, earlier] - values[:, earlier]) * feedback[i, k]
        scale, zero = groups[col // group_size]
        codes[col] = encode(target.clone(), scale, zero)
        values[:, col] = decode(codes[col], scale, zero).double()
        loss += pivots[k] * (target - values[:, col]) ** 2
    stored = torch.stack([codes[col] for col in range(original.shape[1])], dim=1)
    return stored, values, loss, *stack_groups(groups)
