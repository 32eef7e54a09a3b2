"""8-bit floats E4M3fn and E5M2, Micikevicius et al. 2022, arXiv:2209.05433; E4M3fn in blocks is MXFP8 (OCP MX v1.0).

Weights can have a scale for each square of 128 rows and columns, beside inputs with one for 128 channels of a token
(DeepSeek-AI 2024, DeepSeek-V3, arXiv:2412.19437, section 3.3.2): ``fp8-b128`` and ``fp8-g128``. Inputs of one scale a
tensor can have a calibrated one: ``fp8-tensor-static``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.builtin.formats.floats import Block, Floats, block_of_32
from qtool.numerics import minifloats
from qtool.scheme import GroupParameters, TensorScheme

_LEAST = 2.0**-100  # keeps a calibrated scale a normal float32


class E4M3(Floats):
    """E4M3fn bytes, 448 at most.

    A calibrated scale is the tensor-level multiplier, below which all scales are 1.

    Attributes:
        calibrated: Whether the format has such.
    """

    name: str = "fp8"
    bits: int = 8
    defaults: TensorScheme = TensorScheme(format="fp8")
    element = minifloats.E4M3
    blocks = True
    calibrated: bool = True

    def _nearest(self, scheme: TensorScheme) -> tuple[TensorScheme, list[str]]:
        """Take calibrated scales where a tensor has one, in float32."""
        if not (scheme.static and self.calibrated):
            return super()._nearest(scheme)
        nearest, reasons = super()._nearest(replace(scheme, static=False))
        whole = replace(nearest, strategy="tensor", group_size=None, scale="fp32", outlier_threshold=None)
        if whole != nearest:
            reasons.append("a calibrated scale of inputs is one float32 for all of them")
        return replace(whole, static=True), reasons

    def global_scale(self, amax: Float[Tensor, ""], scheme: TensorScheme) -> Float[Tensor, ""] | None:
        """Return ``amax / 448`` if the scheme has calibrated scales; 1 for a tensor of zeros."""
        if not scheme.static:
            return None
        reach = amax.float() * scheme.clip
        return (reach / self.element.max_value).clamp(min=_LEAST).masked_fill(reach == 0, 1.0)

    def fit(
        self,
        groups: Float[Tensor, "*rows group"],
        scheme: TensorScheme,
        *,
        global_scale: Float[Tensor, ""] | None = None,
        clip: float = 1.0,
    ) -> GroupParameters:
        """Fit scales; beneath a calibrated one there is nothing to fit."""
        if scheme.static:
            return GroupParameters(groups.new_ones(groups.shape[:-1], dtype=torch.float32), None, global_scale)
        return super().fit(groups, scheme, global_scale=global_scale, clip=clip)


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
    calibrated = False
