"""8-bit floats E4M3fn and E5M2, Micikevicius et al. 2022, arXiv:2209.05433; E4M3fn in blocks is MXFP8 (OCP MX v1.0).

Weights can have a scale for each square of 128 rows and columns, beside inputs with one for 128 channels of a token
(DeepSeek-AI 2024, DeepSeek-V3, arXiv:2412.19437, section 3.3.2): ``fp8-b128`` and ``fp8-g128``. Inputs of one scale a
tensor can have a calibrated one: ``fp8-tensor-static``.
"""

from __future__ import annotations

from qtool.builtin.formats.floats import Block, Floats, block_of_32
from qtool.numerics import minifloats
from qtool.scheme import TensorScheme


class E4M3(Floats):
    """E4M3fn bytes, 448 at most."""

    name: str = "fp8"
    bits: int = 8
    defaults: TensorScheme = TensorScheme(format="fp8")
    element = minifloats.E4M3
    blocks = True


class E5M2(Floats):
    """E5M2 bytes, 57344 at most."""

    name: str = "fp8_e5m2"
    bits: int = 8
    defaults: TensorScheme = TensorScheme(format="fp8_e5m2")
    element = minifloats.E5M2
    blocks = True


class MXFP8(Block, E4M3):
    """OCP MXFP8: 32 values share a power of two."""

    name = "mxfp8"
    defaults = block_of_32("mxfp8")
    plain = "fp8"
