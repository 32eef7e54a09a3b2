"""How quantized linears lie in an artifact: dense codes, scales in their storage format, adapters.

Names are ``<linear>.codes``, ``.scale``, ``.zero_point``, ``.global_scale``, ``.adapter.down``, ``.adapter.up``, and
``<site>.input_global_scale``. Codes are a dense bit stream along the input axis, so the bytes stored are the bytes
that bits per weight counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.engine.problem import Adapter, QuantizedLinear
from qtool.numerics.packing import pack_codes, unpack_codes
from qtool.numerics.scales import decode_scale, encode_scale
from qtool.scheme import Format, GroupParameters, TensorScheme

INPUT_GLOBAL_SCALE = ".input_global_scale"


def linear_tensors(name: str, linear: QuantizedLinear, scheme: TensorScheme, fmt: Format) -> dict[str, Tensor]:
    """Return a quantized linear as the tensors that are stored."""
    parameters = linear.parameters
    tensors = {
        f"{name}.codes": pack_codes(linear.codes, fmt.bits),
        f"{name}.scale": encode_scale(parameters.scale, scheme.scale),
    }
    if parameters.zero_point is not None:
        zero_point = parameters.zero_point
        are_codes = bool(((zero_point >= 0) & (zero_point < 2**fmt.bits) & (zero_point.frac() == 0)).all())
        packed = pack_codes(zero_point.to(torch.uint8), fmt.bits) if are_codes else zero_point.float()
        tensors[f"{name}.zero_point"] = packed
    if parameters.global_scale is not None:
        tensors[f"{name}.global_scale"] = parameters.global_scale.float()
    if linear.adapter is not None:
        tensors |= {f"{name}.adapter.down": linear.adapter.down, f"{name}.adapter.up": linear.adapter.up}
    return tensors


def read_linear(
    name: str, n_in: int, tensors: Mapping[str, Tensor], scheme: TensorScheme, fmt: Format
) -> QuantizedLinear:
    """Read what ``linear_tensors`` made.

    Args:
        name: Module name of the linear.
        n_in: Its number of inputs.
        tensors: Its stored tensors by full name.
        scheme: Scheme of the weights.
        fmt: Its format.

    Returns:
        The quantized linear, without its report.
    """
    scale = decode_scale(tensors[f"{name}.scale"], scheme.scale)
    zero_point = tensors.get(f"{name}.zero_point")
    if zero_point is not None and zero_point.dtype == torch.uint8:
        zero_point = unpack_codes(zero_point, fmt.bits, scale.shape[-1])
    parameters = GroupParameters(
        scale=scale,
        zero_point=None if zero_point is None else zero_point.float(),
        global_scale=tensors.get(f"{name}.global_scale"),
    )
    down, up = tensors.get(f"{name}.adapter.down"), tensors.get(f"{name}.adapter.up")
    adapter = None if down is None or up is None else Adapter(down, up)
    return QuantizedLinear(unpack_codes(tensors[f"{name}.codes"], fmt.bits, n_in), parameters, adapter)
