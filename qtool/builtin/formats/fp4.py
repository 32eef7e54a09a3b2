"""4-bit floats E2M1: plain, and as the block formats MXFP4 (OCP MX v1.0) and NVFP4 (NVIDIA 2025, arXiv:2509.25149).

The other two that LLM-FP4 compares with it (Liu et al. 2023, arXiv:2310.16836), E1M2 and E3M0, are plain.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from qtool.builtin.formats.floats import Block, Floats, block_of_32
from qtool.numerics import minifloats
from qtool.numerics.scales import LARGEST_SHORT, fp4_global_scale
from qtool.scheme import RangeRule, TensorScheme

_SIX_OF_SIX = 256.0
"""Where the largest value may be at 4 instead of 6, the largest E4M3 scale is 1.5 times this, which is below 448."""


class E2M1(Floats):
    """E2M1 with any scale; short ones (E4M3, UE5M3, E2M1, INT4) have a multiplier above them, all others do not.

    Codes are ``sign << 3 | index``.
    """

    name: str = "fp4"
    bits: int = 4
    defaults: TensorScheme = TensorScheme(format="fp4")
    element = minifloats.E2M1
    scales = ("fp32", "fp16", "bf16", "e4m3", "ue5m3", "e2m1", "int4", "e8m0")
    zero_points: bool = True
    range_rules: tuple[RangeRule, ...] = ("four_over_six",)

    def global_scale(self, amax: Float[Tensor, ""], scheme: TensorScheme) -> Float[Tensor, ""] | None:
        """Return ``amax / (6 * 448)`` for E4M3 scales, likewise for the others that are short, otherwise None."""
        if scheme.scale not in LARGEST_SHORT:
            return None
        largest = _SIX_OF_SIX if scheme.range_rule == "four_over_six" else None
        return fp4_global_scale(amax, scheme.scale, largest=largest)


class E1M2(Floats):
    """E1M2: 0 to 3.5 in steps of 0.5, which is INT4 without its code -8."""

    name = "fp4_e1m2"
    bits = 4
    defaults = TensorScheme(format="fp4_e1m2")
    element = minifloats.E1M2


class E3M0(Floats):
    """E3M0: 0 and the powers of two from 0.25 to 16."""

    name = "fp4_e3m0"
    bits = 4
    defaults = TensorScheme(format="fp4_e3m0")
    element = minifloats.E3M0


class MXFP4(Block, E2M1):
    """OCP MXFP4: 32 values share a power of two."""

    name = "mxfp4"
    defaults = block_of_32("mxfp4")
    plain = "fp4"


class NVFP4(Block, E2M1):
    """NVFP4: 16 values share an E4M3 scale, and a tensor a float32 multiplier."""

    name = "nvfp4"
    defaults = TensorScheme(format="nvfp4", strategy="group", group_size=16, scale="e4m3")
    plain = "fp4"
