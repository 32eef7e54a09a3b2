from __future__ import annotations

from functools import partial

import pytest
import torch

from qtool.numerics.groups import combine_parameters, repeat_rows
from qtool.numerics.second_level import decode_second_level, fit_second_level
from qtool.scheme import GroupParameters, ScaleFormat
from tests.oracles.spqr import second_level


def values(rows: int, groups: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, groups, generator=torch.Generator().manual_seed(seed)) + 0.25


@pytest.mark.parametrize("rows", [32, 37, 5])
@pytest.mark.parametrize(("bits", "block"), [(3, 16), (1, 4), (8, 7)])
def test_equals_the_formula_block_by_block(rows: int, bits: int, block: int) -> None:
    given = values(rows)
    found = fit_second_level(given, num_bits=bits, block=block)
    assert int(found.codes.max()) < 2**bits
    assert torch.equal(repeat_rows(found.low[::block], block, rows), found.low)
    assert torch.equal(repeat_rows(found.step[::block], block, rows), found.step)
    assert torch.equal(found.low.half().float(), found.low)
    assert torch.equal(found.step.half().float(), found.step)
    expected = torch.tensor([second_level(column, bits, block) for column in given.double().T.tolist()]).T
    torch.testing.assert_close(decode_second_level(found), expected.float(), rtol=1e-6, atol=1e-7)


def test_is_off_by_half_a_step_and_what_float16_rounds() -> None:
    given = values(64)
    found = fit_second_level(given, num_bits=3, block=16)
    spread = given.reshape(4, 16, 3).amax(1) - given.reshape(4, 16, 3).amin(1)
    worst = (spread / 14 + 2.0**-9).repeat_interleave(16, 0)
    assert ((decode_second_level(found) - given).abs() <= worst).all()
    assert int(found.codes.max()) == 7
    assert int(found.codes.min()) == 0


def test_equal_values_need_no_step_and_scales_stay_above_0() -> None:
    same = fit_second_level(torch.full((16, 2), 0.375), num_bits=3, block=16)
    assert torch.equal(decode_second_level(same), torch.full((16, 2), 0.375))
    tiny = torch.tensor([[0.0], [1e-12], [0.5], [0.25]])
    assert (decode_second_level(fit_second_level(tiny, num_bits=2, block=2, positive=True)) > 0).all()
    assert (decode_second_level(fit_second_level(tiny, num_bits=2, block=2)) == 0).any()


def test_what_float16_cannot_hold_stays_finite() -> None:
    far = torch.tensor([[-1e9], [0.0], [1e9], [5.0]])
    assert torch.isfinite(decode_second_level(fit_second_level(far, num_bits=3, block=4))).all()


def test_groups_side_by_side_are_those_of_each() -> None:
    given = values(20)
    whole = fit_second_level(given, num_bits=3, block=16)
    each = [fit_second_level(given[:, [i]], num_bits=3, block=16) for i in range(3)]
    parameters = [GroupParameters(decode_second_level(one), scale_codes=one) for one in each]
    joined = combine_parameters(parameters, partial(torch.cat, dim=1)).scale_codes
    assert joined is not None
    assert torch.equal(joined.codes, whole.codes)
    assert torch.equal(decode_second_level(joined), decode_second_level(whole))


@pytest.mark.parametrize(("scale_format", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_ranges_are_stored_as_the_scheme_says(scale_format: ScaleFormat, dtype: torch.dtype) -> None:
    found = fit_second_level(values(32), num_bits=3, block=16, scale_format=scale_format)
    assert torch.equal(found.low[0], values(32)[:16].amin(0).to(dtype).float())
    step = (values(32)[:16].amax(0) - found.low[0]) / 7
    assert torch.equal(found.step[0], step.to(dtype).float())
