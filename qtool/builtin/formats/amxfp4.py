"""AMXFP4: blocks of E2M1 with one scale for what is above 0 and one for what is below.

Lee et al. 2024, arXiv:2411.09909. ``s⁺ = max(x) / 6`` and ``s⁻ = max(-x) / 6``, each rounded to its storage format, and
a value is divided by the scale of its own sign. The sign of a code says which scale decodes it, so that nothing else is
stored: 4.5 bits with two scales of 8 bits to 32 values. A side without values has the scale 1. The paper's scales are
E5M2 (``se5m2``); with ``se8m0`` they are powers of two, its AMX-PoT.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qtool.builtin.formats.floats import Floats
from qtool.numerics import minifloats
from qtool.scheme import GroupParameters, TensorScheme


class AMXFP4(Floats):
    """E2M1 with a scale of its own for each sign."""

    name = "amxfp4"
    bits = 4
    defaults = TensorScheme(format="amxfp4", strategy="group", group_size=32, scale="e5m2")
    element = minifloats.E2M1
    scales = ("e5m2", "fp32", "fp16", "bf16", "e8m0")

    def _nearest(self, scheme: TensorScheme) -> tuple[TensorScheme, list[str]]:
        """Send static scales, of which there is one, to the format that has one."""
        if not scheme.static:
            return super()._nearest(scheme)
        nearest, _ = super()._nearest(replace(scheme, scale="fp32"))
        return replace(nearest, format="fp4"), [f"`{self.name}` has two scales, and of static ones there is one"]

    def fit(
        self,
        groups: Float[Tensor, "*rows group"],
        scheme: TensorScheme,
        *,
        global_scale: Float[Tensor, ""] | None = None,
        clip: float = 1.0,
    ) -> GroupParameters:
        """Fit the scale of either sign to the values that have it."""
        above, below = (
            super(AMXFP4, self).fit(side.clamp(min=0.0), scheme, clip=clip).scale for side in (groups, -groups)
        )
        return GroupParameters(above, negative=below)

    def encode(self, groups: Float[Tensor, "*rows group"], parameters: GroupParameters) -> UInt8[Tensor, "*rows group"]:
        """Round values to codes by the scale of their sign, ties to the even code."""
        return self.element.encode(groups.float() / _step_of(groups.signbit(), parameters))

    def decode(self, codes: UInt8[Tensor, "*rows group"], parameters: GroupParameters) -> Float[Tensor, "*rows group"]:
        """Return the float32 values that codes stand for."""
        return self.element.decode(codes) * _step_of(codes >= 2 ** (self.bits - 1), parameters)

    def round(self, groups: Float[Tensor, "*rows group"], parameters: GroupParameters) -> Float[Tensor, "*rows group"]:
        """Return the decoded values of the codes of ``groups``, in their dtype."""
        step = _step_of(groups.signbit(), parameters)
        return self.element.round(groups.float() / step).mul_(step).to(groups.dtype)


def _step_of(below: Tensor, parameters: GroupParameters) -> Tensor:
    """Return the step of each value, given which are negative; parameters with one scale have it for both."""
    if parameters.negative is None:
        return parameters.scale.unsqueeze(-1)
    return torch.where(below, parameters.negative.unsqueeze(-1), parameters.scale.unsqueeze(-1))
