"""LLM.int8(): a product of INT8 vectors beside one in full precision, for the input's columns with large values.

References:
    Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, equations 5 and 8: vector-wise quantization and mixed-precision
    decomposition.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def absmax_int8(rows: Float[Tensor, "rows n"]) -> tuple[Float[Tensor, "rows n"], Float[Tensor, " rows"]]:
    """Return integers from -127 to 127, and the constant of each row; of a row of zeros that is 1."""
    constants = torch.tensor([max(abs(value) for value in row) or 1.0 for row in rows.tolist()], dtype=torch.float64)
    return torch.round(127 * rows / constants[:, None]), constants


def llm_int8_oracle(
    x: Float[Tensor, "tokens in"], weight: Float[Tensor, "out in"], threshold: float
) -> Float[Tensor, "tokens out"]:
    """Multiply, for the tokens of one window.

    The weight is INT8 altogether, and decoded where the input is not.

    Args:
        x: Inputs. Not modified.
        weight: Full-precision weight. Not modified.
        threshold: A column of ``x`` that reaches this magnitude is not quantized.
    """
    x, weight = x.double(), weight.double()
    large = [col for col in range(x.shape[1]) if any(abs(value) >= threshold for value in x[:, col].tolist())]
    small = [col for col in range(x.shape[1]) if col not in large]
    w_codes, w_constants = absmax_int8(weight)
    y = x[:, large] @ (w_codes[:, large] * w_constants[:, None] / 127).T
    if small:
        x_codes, x_constants = absmax_int8(x[:, small])
        products = (x_codes.long() @ w_codes[:, small].long().T).double()
        y += products * torch.outer(x_constants, w_constants) / 127**2
    return y
