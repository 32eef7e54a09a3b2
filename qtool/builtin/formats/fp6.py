"""6-bit floats E2M3 and E3M2: plain, and in blocks as MXFP6.

References:
    Rouhani et al. 2023, OCP Microscaling Formats (MX) v1.0.
"""

from __future__ import annotations

from qtool.builtin.formats.floats import Block, Floats, block_of_32
from qtool.numerics import minifloats
from qtool.scheme import TensorScheme


class E2M3(Floats):
    """E2M3, 7.5 at most: the finer one."""

    name: str = "fp6_e2m3"
    bits: int = 6
    defaults: TensorScheme = TensorScheme(format="fp6_e2m3")
    element = minifloats.E2M3


class E3M2(Floats):
    """E3M2, 28 at most: the wider one."""

    name: str = "fp6_e3m2"
    bits: int = 6
    defaults: TensorScheme = TensorScheme(format="fp6_e3m2")
    element = minifloats.E3M2


class MXFP6E2M3(Block, E2M3):
    """OCP MXFP6 with elements E2M3."""

    name = "mxfp6_e2m3"
    defaults = block_of_32("mxfp6_e2m3")
    plain = "fp6_e2m3"


class MXFP6E3M2(Block, E3M2):
    """OCP MXFP6 with elements E3M2."""

    name = "mxfp6_e3m2"
    defaults = block_of_32("mxfp6_e3m2")
    plain = "fp6_e3m2"
