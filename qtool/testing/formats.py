"""The check of number formats."""

from __future__ import annotations

import torch

from qtool.scheme import Format, GroupParameters, TensorScheme
from qtool.testing.promise import CheckError


def check_format(fmt: Format, *, scheme: TensorScheme | None = None) -> None:
    """Check a format: every code decodes and encodes to itself; rounding is idempotent, to the nearest, ties to even.

    Raises:
        CheckError: A promise is broken.
    """
    chosen = scheme or fmt.defaults
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(16, 32, generator=generator)
    scale = fmt.global_scale(values.abs().amax(), chosen)
    parameters = fmt.fit(values, chosen, global_scale=scale)
    rounded = fmt.round(values, parameters)
    decoded = fmt.decode(fmt.encode(values, parameters), parameters)
    if not torch.equal(rounded, decoded):
        raise CheckError(f"`{fmt.name}`: round is not decode after encode")
    if not torch.equal(fmt.round(rounded, parameters), rounded):
        raise CheckError(f"`{fmt.name}`: rounding a rounded value changes it")
    codes = torch.arange(2**fmt.bits, dtype=torch.int64).to(torch.uint8).expand(16, -1)
    levels = fmt.decode(codes, parameters)
    finite = torch.isfinite(levels)
    back = fmt.decode(fmt.encode(torch.where(finite, levels, 0.0), parameters), parameters)
    if not torch.equal(back[finite], levels[finite]):
        raise CheckError(f"`{fmt.name}`: a code does not survive decoding and encoding")
    distance = (values.unsqueeze(-1) - torch.where(finite, levels, torch.inf).unsqueeze(1)).abs().amin(-1)
    if ((values - rounded).abs() > distance * (1 + 1e-5) + 1e-7).any():
        raise CheckError(f"`{fmt.name}`: a value is not rounded to the nearest level")
    if parameters.zero_point is None or not parameters.zero_point.frac().any():
        _check_ties(fmt, parameters)


def _check_ties(fmt: Format, parameters: GroupParameters) -> None:
    """Check that values halfway between neighbouring levels go up and down in turn, on a grid with steps of 1.

    Around a level that has the same ratio to both its neighbours, as powers of two have, both may go away from 0.
    """
    zero_point, multiplier, offset = parameters.zero_point, parameters.global_scale, parameters.offset
    unit = GroupParameters(
        torch.ones(1),
        None if zero_point is None else zero_point[:1],
        None if multiplier is None else torch.ones_like(multiplier),
        offset=None if offset is None else torch.zeros(1),
    )
    levels = fmt.decode(torch.arange(2**fmt.bits).to(torch.uint8)[None], unit)
    levels = torch.tensor(sorted(set(levels[torch.isfinite(levels)].tolist())))
    ties = (levels[1:] + levels[:-1]) / 2
    up = fmt.round(ties[None], unit)[0] > ties
    exact = ties.double() == (levels[1:].double() + levels[:-1].double()) / 2  # others are nearer to one of the two
    away = (up == (ties > 0))[1:] & (up == (ties > 0))[:-1] & (levels[1:-1] != 0)
    geometric = away & (levels[2:].double() * levels[:-2].double() == levels[1:-1].double().square())
    if ((up[1:] == up[:-1]) & exact[1:] & exact[:-1] & ~geometric).any():
        raise CheckError(f"`{fmt.name}`: a value between two levels does not go to the even one")
