"""NF4: 16 values, of which each is as likely as the others for normal weights."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qtool.builtin.formats.candidates import closest, range_factors
from qtool.builtin.formats.checks import nearest_scheme, refuse_unless_empty
from qtool.numerics.groups import largest_magnitude
from qtool.numerics.minifloats import look_up
from qtool.numerics.scales import fit_scale
from qtool.scheme import GroupParameters, TensorScheme

VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""What the codes stand for at scale 1, as bitsandbytes has them."""


class NF4:
    """``scale * value(code)`` with ``scale = amax``, 64 values to a scale if nothing else is said.

    References:
        Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3.
    """

    name: str = "nf4"
    bits: int = 4
    defaults: TensorScheme = TensorScheme(format="nf4", strategy="group", group_size=64)
    version: int = 1

    def check(self, scheme: TensorScheme) -> None:
        """Refuse zero points, and scales and rules that the format does not have."""
        scales = ("fp32", "fp16", "bf16", "e8m0")
        nearest, reasons = nearest_scheme(scheme, self.defaults, scales=scales, zero_points=False, range_rules=())
        refuse_unless_empty(scheme, reasons, nearest)

    def global_scale(self, amax: Float[Tensor, ""], scheme: TensorScheme) -> None:
        """Return None: there is one level of scales."""

    def fit(
        self,
        groups: Float[Tensor, "*rows group"],
        scheme: TensorScheme,
        *,
        global_scale: Float[Tensor, ""] | None = None,
        clip: float = 1.0,
    ) -> GroupParameters:
        """Fit scales; ``global_scale`` has no meaning here."""
        amax, rule = largest_magnitude(groups) * clip, scheme.exponent_rule
        scales = [
            fit_scale(amax * factor, max_value=1.0, scale_format=scheme.scale, exponent_rule=rule)
            for factor in range_factors(scheme)
        ]
        return closest(groups, [GroupParameters(scale) for scale in scales], self.round)

    def encode(self, groups: Float[Tensor, "*rows group"], parameters: GroupParameters) -> UInt8[Tensor, "*rows group"]:
        """Return the codes of the nearest values; halfway between two, the even code."""
        scaled = groups.float() / parameters.step().unsqueeze(-1)
        return torch.bucketize(scaled, _boundaries(scaled.device)).to(torch.uint8)

    def decode(self, codes: UInt8[Tensor, "*rows group"], parameters: GroupParameters) -> Float[Tensor, "*rows group"]:
        """Return the float32 values that codes stand for."""
        return look_up(VALUES, codes).mul_(parameters.step().unsqueeze(-1))

    def round(self, groups: Float[Tensor, "*rows group"], parameters: GroupParameters) -> Float[Tensor, "*rows group"]:
        """Return the decoded values of the codes of ``groups``, in their dtype."""
        return self.decode(self.encode(groups, parameters), parameters).to(groups.dtype)


@cache
def _boundaries(device: torch.device) -> Float[Tensor, 15]:
    """Return the largest float32 that each code but the last is for; on a device once, as in ``look_up``."""
    values = torch.tensor(VALUES, dtype=torch.float64)
    middles = (values[1:] + values[:-1]) / 2
    nearest = middles.float()
    # Above an odd code the middle itself belongs to the even code that follows.
    odd = torch.arange(len(middles)) % 2 == 1
    beyond = (nearest.double() > middles) | odd & (nearest.double() == middles)
    return torch.where(beyond, torch.nextafter(nearest, torch.tensor(-torch.inf)), nearest).to(device)
