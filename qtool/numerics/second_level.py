"""Scales and zero points that are quantized themselves: neighbouring rows share a range, which is stored in floats.

The least value of a block and the value of one code are stored, and not a zero point in codes: blocks of scales are
narrow and far from 0, where a zero point would need more digits than float16 has.

References:
    Dettmers et al. 2023, SpQR, arXiv:2306.03078, section 4: bilevel quantization.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qtool.numerics.groups import repeat_rows
from qtool.numerics.scales import LIMITS, decode_scale, encode_scale
from qtool.scheme import GroupParameters, ScaleFormat, SecondLevel


def fit_second_level(
    values: Float[Tensor, "rows groups"],
    *,
    num_bits: int,
    block: int,
    scale_format: ScaleFormat = "fp16",
    positive: bool = False,
) -> SecondLevel:
    """Round ``(value - low) / step`` to codes, ``step = (high - low) / (2^b - 1)``, in blocks of rows.

    Args:
        values: Scales or zero points. Not modified.
        num_bits: Bits of a code, 1 to 8.
        block: Neighbouring rows that share a range; the last block takes what is left.
        scale_format: How ``low`` and ``step`` are stored: a float format.
        positive: Whether decoded values are to be above 0, as scales are.

    Returns:
        Codes, and what decodes them as it is stored.
    """
    least, most = LIMITS[scale_format]

    def stored(found: Tensor) -> Tensor:
        return decode_scale(encode_scale(found.clamp(-most, most), scale_format), scale_format)

    n_out, groups = values.shape
    filled = torch.cat([values.float(), values[-1:].float().expand(-n_out % block, groups)])
    blocks = filled.reshape(-1, block, groups)
    low = stored(blocks.amin(1).clamp(min=least) if positive else blocks.amin(1))
    step = stored((blocks.amax(1) - low).clamp(min=0.0) / (2**num_bits - 1))
    codes = ((blocks - low.unsqueeze(1)) / step.masked_fill(step == 0, 1.0).unsqueeze(1)).round_()
    codes = codes.clamp_(0, 2**num_bits - 1).reshape(-1, groups)[:n_out].to(torch.uint8)
    return SecondLevel(codes, repeat_rows(low, block, n_out), repeat_rows(step, block, n_out))


def decode_second_level(found: SecondLevel) -> Float[Tensor, "*rows"]:
    """Return ``low + step * code`` in float32."""
    return found.low + found.step * found.codes


def store_second_level(
    parameters: GroupParameters,
    silent: Bool[Tensor, "rows groups"],
    *,
    num_bits: int,
    block: int,
    scale_format: ScaleFormat,
) -> GroupParameters:
    """Return parameters whose scales, and zero points if there are some, are codes.

    Zero points are not derived from the scales as stored: with scales of 3 bits that loses more (up to 5 % at INT4).

    Args:
        parameters: As they were fitted. Not modified.
        silent: Groups of zeros: any scale suits them, so theirs is the least.
        num_bits: As for ``fit_second_level``.
        block: Likewise.
        scale_format: Likewise.
    """

    def fitted(values: Tensor, *, positive: bool) -> SecondLevel:
        return fit_second_level(values, num_bits=num_bits, block=block, scale_format=scale_format, positive=positive)

    scales = fitted(parameters.scale.masked_fill(silent, 0.0), positive=True)
    zeros = None if parameters.zero_point is None else fitted(parameters.zero_point, positive=False)
    return GroupParameters(
        decode_second_level(scales),
        None if zeros is None else decode_second_level(zeros),
        scale_codes=scales,
        zero_point_codes=zeros,
    )
