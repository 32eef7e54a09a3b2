"""Scales and zero points that are quantized themselves: neighbouring rows share a range in float16.

The least value of a block and the value of one code are stored, and not a zero point in codes: blocks of scales are
narrow and far from 0, where a zero point would need more digits than float16 has.

References:
    Dettmers et al. 2023, SpQR, arXiv:2306.03078, section 4: bilevel quantization.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.scheme import SecondLevel

_HALF = torch.finfo(torch.float16)
_LEAST_SCALE = 2.0**-24  # the least float16


def fit_second_level(
    values: Float[Tensor, "rows groups"], *, num_bits: int, block: int, positive: bool = False
) -> SecondLevel:
    """Round ``(value - low) / step`` to codes, ``step = (high - low) / (2^b - 1)``, in blocks of rows.

    Args:
        values: Scales or zero points. Not modified.
        num_bits: Bits of a code, 1 to 8.
        block: Neighbouring rows that share a range; the last block takes what is left.
        positive: Whether decoded values are to be above 0, as scales are.

    Returns:
        Codes, and what decodes them as it is stored.
    """
    rows, groups = values.shape
    filled = torch.cat([values.float(), values[-1:].float().expand(-rows % block, groups)])
    blocks = filled.reshape(-1, block, groups)
    low = _half(blocks.amin(1).clamp(min=_LEAST_SCALE) if positive else blocks.amin(1))
    step = _half((blocks.amax(1) - low).clamp(min=0.0) / (2**num_bits - 1))
    codes = ((blocks - low.unsqueeze(1)) / step.masked_fill(step == 0, 1.0).unsqueeze(1)).round_()
    codes = codes.clamp_(0, 2**num_bits - 1).reshape(-1, groups)[:rows].to(torch.uint8)
    return SecondLevel(codes, low, step, num_bits, block)


def decode_second_level(found: SecondLevel) -> Float[Tensor, "rows groups"]:
    """Return ``low + step * code`` in float32."""
    rows = len(found.codes)
    low, step = (one.repeat_interleave(found.block, dim=0)[:rows] for one in (found.low, found.step))
    return low + step * found.codes


def join_second_levels(found: Sequence[SecondLevel]) -> SecondLevel:
    """Put the groups of several side by side."""
    codes, low, step = (
        torch.cat([getattr(one, name) for one in found], dim=1).contiguous() for name in ("codes", "low", "step")
    )
    return SecondLevel(codes, low, step, found[0].bits, found[0].block)


def _half(values: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Round to float16, as far as that reaches."""
    return values.clamp(_HALF.min, _HALF.max).half().float()
