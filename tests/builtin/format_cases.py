"""Formats, written schemes and values that the tests of the formats share."""

from __future__ import annotations

import torch

from qtool.builtin.formats.amxfp4 import AMXFP4
from qtool.builtin.formats.floats import Floats
from qtool.builtin.formats.fp4 import E1M2, E2M1, E3M0, MXFP4, NVFP4
from qtool.builtin.formats.fp6 import E2M3, E3M2, MXFP6E2M3, MXFP6E3M2
from qtool.builtin.formats.fp8 import E4M3, E5M2, MXFP8
from qtool.builtin.formats.integer import Int2, Int3, Int4, Int5, Int6, Int7, Int8, Integer
from qtool.builtin.formats.nf4 import NF4
from qtool.numerics.groups import to_groups
from qtool.scheme import GroupParameters, TensorScheme, parse_tensor_scheme

CLASSES = (Int2, Int3, Int4, Int5, Int6, Int7, Int8, E2M1, MXFP4, NVFP4, E4M3)
CLASSES += (E5M2, MXFP8, E2M3, E3M2, MXFP6E2M3, MXFP6E3M2, NF4, AMXFP4, E1M2, E3M0)
FORMATS = {cls.name: cls() for cls in CLASSES}
WRITTEN = [
    *(f"int{b}-{rest}" for b in range(2, 9) for rest in ("sym-g32", "sym-full", "asym-g16-sfp16", "asym-token-sfp32")),
    "int4-asym-g16-offset-sfp16",
    "int8-asym-token-offset-sfp32",
    "int4-g32-se8m0",
    "int8-g32-se8m0-rceil",
    "fp4",
    "fp4-tensor-sbf16",
    "fp4-asym-token",
    "fp4-asym-g16-sfp16",
    "fp4-g16-se4m3",
    "fp4-g64-se8m0-floor",
    "mxfp4",
    "mxfp4-floor",
    "mxfp4-rceil",
    "nvfp4",
    "fp8-tensor",
    "fp8-token-sbf16",
    "fp8-g32-se8m0",
    "fp8_e5m2-token",
    "mxfp8",
    "fp6_e2m3-g32-sfp16",
    "fp6_e3m2-tensor",
    "mxfp6_e2m3",
    "mxfp6_e3m2-rceil",
    "fp4-g16-sue5m3",
    "fp4-g16-se2m1",
    "fp4-g32-sint4",
    "int4-g32-narrow",
    "int8-narrow",
    "mxfp4-search",
    "nf4",
    "nf4-g32-se8m0-search",
    "int4-g32-se8m0-search",
    "nvfp4-four_over_six",
    "amxfp4",
    "amxfp4-g16-sfp32",
    "amxfp4-se8m0",
    "amxfp4-se8m0-search",
    "fp4_e1m2-tensor",
    "fp4_e1m2-g32-sfp16",
    "fp4_e3m0-token",
    "fp4_e3m0-g16-se8m0-search",
]


def read(text: str) -> tuple[Integer | Floats | NF4, TensorScheme]:
    scheme = parse_tensor_scheme(text, FORMATS.__getitem__)
    form = FORMATS[scheme.format]
    return form.under(scheme) if isinstance(form, Integer) else form, scheme


def values_of(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return values with heavy tails, shifted channels, and a scale that varies from row to row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) ** 3 + 0.2 * torch.randn(shape[-1], generator=generator)
    return x * torch.logspace(-2, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))


def fit(text: str, x: torch.Tensor, clip: float = 1.0) -> tuple[Integer | Floats | NF4, torch.Tensor, GroupParameters]:
    form, scheme = read(text)
    groups = to_groups(x, scheme.strategy, scheme.group_size)
    global_scale = form.global_scale(x.abs().max().float(), scheme)
    return form, groups, form.fit(groups, scheme, global_scale=global_scale, clip=clip)


def error_of(text: str, x: torch.Tensor) -> float:
    form, groups, parameters = fit(text, x)
    return float((form.round(groups, parameters) - groups).norm() / groups.norm())
