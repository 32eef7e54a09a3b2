"""Number formats one scalar at a time: integers, E2M1, E4M3, E8M0, and the block formats MXFP4 and NVFP4.

Arithmetic is in Python floats (float64), but every scale is rounded to its storage type *before* it is used,
as a decoder would see it. Rounding is half to even. A block is a list of floats that share one scale.

Blocks of zeros: an integer scale that is, or is stored as, 0 becomes 1; an E8M0 scale becomes its smallest;
an NVFP4 scale stays 0 and all codes are 0. Tools differ there, so compare decoded values on such blocks, not
bytes.

References:
    Rouhani et al. 2023, OCP Microscaling Formats (MX) v1.0. Micikevicius et al. 2022, FP8, arXiv:2209.05433.
    NVIDIA 2025, NVFP4, arXiv:2509.25149.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

IntRange: TypeAlias = Literal["tight", "full", "half", "signed_full", "asym"]
ExponentRule: TypeAlias = Literal["floor", "even", "rceil"]
ScaleDtype: TypeAlias = Literal["float64", "float32", "float16", "bfloat16", "e4m3"]

E2M1_MAX = 6.0
E2M1_EMAX = 2
E4M3_MAX = 448.0


def float_value(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """Decode the fields: ``2^(e - bias) (1 + m / 2^M)``, or ``2^(1 - bias) m / 2^M`` where ``e`` is 0."""
    mantissa = code % 2**mantissa_bits
    exponent = code // 2**mantissa_bits % 2**exponent_bits
    sign = -1.0 if code // 2 ** (mantissa_bits + exponent_bits) else 1.0
    if exponent == 0:
        return sign * math.ldexp(mantissa / 2**mantissa_bits, 1 - bias)
    return sign * math.ldexp(1 + mantissa / 2**mantissa_bits, exponent - bias)


E2M1_VALUES = [float_value(code, 2, 1, 1) for code in range(16)]
E2M3_VALUES = [float_value(code, 2, 3, 1) for code in range(64)]
E3M2_VALUES = [float_value(code, 3, 2, 3) for code in range(64)]
# S.1111.111 is the only NaN of E4M3fn; it has no infinities.
E4M3_VALUES = [math.nan if code % 128 == 127 else float_value(code, 4, 3, 7) for code in range(256)]


def nf4_values() -> list[float]:
    """Return NF4's values as QLoRA derives them: quantiles of the normal distribution, eight above 0 and seven below.

    ``0.9677083`` is the paper's released code's: half way between ``1 - 1/32`` and ``1 - 1/30``.
    """
    above, below = (
        torch.special.ndtri(torch.linspace(0.9677083, 0.5, n + 1, dtype=torch.float64))[:-1] for n in (8, 7)
    )
    return [*(-below / above[0]).tolist(), 0.0, *(above.flip(0) / above[0]).tolist()]


def nearest_code(value: float, table: Sequence[float]) -> int:
    """Search all codes of a sign-and-magnitude format; a tie goes to the even code, overflow saturates.

    Args:
        value: Not NaN. Its sign bit is kept, so that -0.0 has its own code.
        table: Value of each code; NaN entries are never chosen.

    Returns:
        The code.

    Raises:
        ValueError: The value is NaN.
    """
    if math.isnan(value):
        message = "NaN has no code"
        raise ValueError(message)
    largest = max(entry for entry in table if not math.isnan(entry))
    clipped = math.copysign(min(abs(value), largest), value)
    same_sign = [
        code
        for code, entry in enumerate(table)
        if not math.isnan(entry) and math.copysign(1.0, entry) == math.copysign(1.0, value)
    ]
    return min(same_sign, key=lambda code: (abs(table[code] - clipped), code % 2))


def encode_e2m1(value: float) -> int:
    """Return the 4-bit code of the nearest E2M1 value; bit 3 is the sign."""
    return nearest_code(value, E2M1_VALUES)


def decode_e2m1(code: int) -> float:
    """Return the value of a 4-bit code."""
    return E2M1_VALUES[code]


def encode_e4m3(value: float) -> int:
    """Return the 8-bit code of the nearest finite E4M3fn value."""
    return nearest_code(value, E4M3_VALUES)


def decode_e4m3(code: int) -> float:
    """Return the value of an 8-bit code, NaN for 127 and 255."""
    return E4M3_VALUES[code]


def decode_e8m0(code: int) -> float:
    """Return ``2 ** (code - 127)``, NaN for 255."""
    return math.nan if code == 255 else 2.0 ** (code - 127)


_SCALARS = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def store_scale(scale: float, dtype: ScaleDtype) -> float:
    """Round a scale to what the storage type can hold; E4M3 saturates."""
    if dtype == "e4m3":
        return decode_e4m3(encode_e4m3(scale))
    return float(_SCALARS[dtype](scale))


def int_limits(num_bits: int, kind: IntRange) -> tuple[int, int]:
    """Return the lowest and highest code, ``-2^(b-1) .. 2^(b-1) - 1`` or ``0 .. 2^b - 1`` for ``asym``."""
    return (0, 2**num_bits - 1) if kind == "asym" else (-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1)


def fit_int(
    block: Sequence[float], num_bits: int, kind: IntRange, scale_dtype: ScaleDtype = "float32"
) -> tuple[float, int]:
    """Choose scale and zero point of one block.

    Args:
        block: Values that share a scale.
        num_bits: Width of a code.
        kind: ``tight``: the least scale that clips nothing. ``full``: ``amax / qmax``. ``half``: ``amax / (qmax +
            0.5)``. ``signed_full``: ``-v / (qmax + 1)`` for the value ``v`` of the largest magnitude. ``asym``: the
            range is widened to hold 0, ``s = (max - min) / (2^b - 1)``, ``z = round(-min / s)`` clamped to the codes.
        scale_dtype: Type that the scale is rounded to before the zero point is derived from it.

    Returns:
        The stored scale and the zero point, 0 for symmetric kinds.
    """
    low, high = int_limits(num_bits, kind)
    if kind == "asym":
        bottom, top = min(0.0, *block), max(0.0, *block)
        scale = store_scale((top - bottom) / (high - low), scale_dtype) or 1.0
        return scale, min(max(round(-bottom / scale), low), high)
    amax = max(abs(value) for value in block)
    if kind == "full":
        return store_scale(amax / high, scale_dtype) or 1.0, 0
    if kind == "tight":
        return store_scale(max(value / (high if value > 0 else low) for value in block), scale_dtype) or 1.0, 0
    if kind == "signed_full":
        scale = store_scale(amax / -low, scale_dtype) or 1.0
        return (-scale if max(block) == amax > 0 else scale), 0
    return store_scale(amax / (high + 0.5), scale_dtype) or 1.0, 0


def encode_int(value: float, scale: float, zero_point: int, limits: tuple[int, int]) -> int:
    """Return ``clamp(round(value / scale) + zero_point)``."""
    return min(max(round(value / scale) + zero_point, limits[0]), limits[1])


def decode_int(code: int, scale: float, zero_point: int) -> float:
    """Return ``scale * (code - zero_point)``."""
    return scale * (code - zero_point)


def mx_exponent(
    block: Sequence[float],
    rule: ExponentRule,
    *,
    element_emax: int = E2M1_EMAX,
    element_max: float = E2M1_MAX,
    mantissa_bits: int = 1,
) -> int:
    """Choose the shared exponent of a block, in [-127, 127]; the E8M0 code is 127 more.

    Args:
        block: Values that share a scale.
        rule: ``floor``: ``floor(log2 amax) - emax``. ``even``: the same for amax plus half a unit in the last
            place of an element's mantissa. ``rceil``: the smallest exponent at which amax does not saturate.
        element_emax: Exponent of the largest element value.
        element_max: Largest element value.
        mantissa_bits: Stored mantissa bits of an element.

    Returns:
        The exponent; -127 for a block of zeros.
    """
    amax = max(abs(value) for value in block)
    if amax == 0:
        return -127
    fraction, exponent = math.frexp(amax)
    significand, exponent = 2 * fraction, exponent - 1
    if rule == "rceil":
        chosen = exponent - element_emax - 2
        while math.ldexp(element_max, chosen) < amax:
            chosen += 1
    elif rule == "even" and significand + 2.0 ** -(mantissa_bits + 1) >= 2:
        chosen = exponent + 1 - element_emax
    else:
        chosen = exponent - element_emax
    return min(max(chosen, -127), 127)


def encode_mxfp4(block: Sequence[float], rule: ExponentRule = "floor") -> tuple[int, list[int]]:
    """Return the E8M0 code of a block and the E2M1 codes of its values."""
    scale_code = mx_exponent(block, rule) + 127
    scale = decode_e8m0(scale_code)
    return scale_code, [encode_e2m1(value / scale) for value in block]


def decode_mxfp4(scale_code: int, codes: Sequence[int]) -> list[float]:
    """Return the values of a block."""
    return [decode_e8m0(scale_code) * decode_e2m1(code) for code in codes]


def nvfp4_global_scale(values: Sequence[float]) -> float:
    """Return ``amax / (6 * 448)`` in float32, the multiplier of a whole tensor; 1 for a tensor of zeros."""
    return store_scale(max(abs(value) for value in values) / (E2M1_MAX * E4M3_MAX), "float32") or 1.0


def encode_nvfp4(block: Sequence[float], global_scale: float) -> tuple[int, list[int]]:
    """Return the E4M3 code of a block's scale and the E2M1 codes of its values.

    Args:
        block: Values that share a block scale.
        global_scale: Multiplier of the tensor.

    Returns:
        ``s = E4M3(amax / 6 / global_scale)`` as a code, and ``E2M1(x / (global_scale * s))``. Where ``s``
        rounds to 0 all codes are 0.
    """
    scale_code = encode_e4m3(max(abs(value) for value in block) / E2M1_MAX / global_scale)
    scale = global_scale * decode_e4m3(scale_code)
    return scale_code, [encode_e2m1(value / scale) if scale else 0 for value in block]


def decode_nvfp4(scale_code: int, codes: Sequence[int], global_scale: float) -> list[float]:
    """Return the values of a block."""
    return [global_scale * decode_e4m3(scale_code) * decode_e2m1(code) for code in codes]


class Grid(NamedTuple):
    """The three callables that ``gptq_oracle`` and ``ldlq_oracle`` take: pass ``**grid._asdict()``."""

    fit: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    encode: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    decode: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _zeros(zero: Tensor | None, rows: int) -> list[int]:
    return [0] * rows if zero is None else [int(z) for z in zero.tolist()]


def int_grid(num_bits: int, kind: IntRange, scale_dtype: ScaleDtype = "float32") -> Grid:
    """Wrap the integer formats for the solvers; symmetric kinds have no zeros."""
    limits = int_limits(num_bits, kind)

    def fit(group: Tensor) -> tuple[Tensor, Tensor | None]:
        fitted = [fit_int(row, num_bits, kind, scale_dtype) for row in group.tolist()]
        scale = torch.tensor([scale for scale, _ in fitted], dtype=torch.float64)
        return scale, torch.tensor([zero for _, zero in fitted]) if kind == "asym" else None

    def encode(column: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        rows = zip(column.tolist(), scale.tolist(), _zeros(zero, len(column)), strict=True)
        return torch.tensor([encode_int(value, s, z, limits) for value, s, z in rows])

    def decode(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        rows = zip(codes.tolist(), scale.tolist(), _zeros(zero, len(codes)), strict=True)
        return torch.tensor([decode_int(code, s, z) for code, s, z in rows], dtype=torch.float64)

    return Grid(fit, encode, decode)


def _fp4_grid(block_scale: Callable[[list[float]], float]) -> Grid:
    def fit(group: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.tensor([block_scale(row) for row in group.tolist()], dtype=torch.float64), None

    def encode(column: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        rows = zip(column.tolist(), scale.tolist(), strict=True)
        return torch.tensor([encode_e2m1(value / s) if s else 0 for value, s in rows])

    def decode(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        rows = zip(codes.tolist(), scale.tolist(), strict=True)
        return torch.tensor([s * decode_e2m1(code) for code, s in rows], dtype=torch.float64)

    return Grid(fit, encode, decode)


def mxfp4_grid(rule: ExponentRule = "floor") -> Grid:
    """Wrap MXFP4 for the solvers; the scales are powers of two, not E8M0 codes."""
    return _fp4_grid(lambda row: decode_e8m0(encode_mxfp4(row, rule)[0]))


def nvfp4_grid(global_scale: float) -> Grid:
    """Wrap NVFP4 for the solvers; the scales are ``global_scale * s``, decoded."""
    return _fp4_grid(lambda row: global_scale * decode_e4m3(encode_nvfp4(row, global_scale)[0]))
