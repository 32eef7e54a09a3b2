from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from qtool.builtin.formats.fp4 import E2M1, MXFP4, NVFP4
from qtool.builtin.formats.fp8 import E4M3
from qtool.builtin.formats.integer import Int2, Int3, Int4, Int8
from qtool.numerics.levels import level_codes, level_index, levels, second_nearest
from qtool.scheme import Format, GroupParameters, TensorScheme

FORMATS: list[Format] = [Int2(), Int3(), Int4(), Int8(), E2M1(), MXFP4(), NVFP4(), E4M3()]


def test_levels_of_known_formats() -> None:
    assert levels(Int2()).tolist() == [-2.0, -1.0, 0.0, 1.0]
    assert level_codes(Int2()).tolist() == [0, 1, 2, 3]
    positive = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert levels(NVFP4()).tolist() == [*(-value for value in reversed(positive)), 0.0, *positive]
    assert level_codes(NVFP4()).tolist() == [15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7]
    assert len(levels(E4M3())) == 253
    assert float(levels(E4M3()).max()) == 448.0


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_every_code_has_a_level_and_levels_rise(fmt: Format) -> None:
    found = levels(fmt)
    assert all(low < high for low, high in pairwise(found.tolist()))
    every = torch.arange(2**fmt.bits, dtype=torch.uint8).unsqueeze(0)
    values = fmt.decode(every, GroupParameters(torch.ones(1)))[0]
    assert set(found.tolist()) == set(values[torch.isfinite(values)].tolist())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("fmt", [Int2(), Int4(), E2M1(), NVFP4(), E4M3()], ids=lambda fmt: fmt.name)
def test_the_two_nearest_are_those_of_all_values(fmt: Format, symmetric: bool) -> None:
    asymmetric = fmt.name in ("int2", "int4", "fp4") and not symmetric
    scheme = TensorScheme(fmt.name, symmetric=False) if asymmetric else fmt.defaults
    generator = torch.Generator().manual_seed(0)
    multiplier = torch.tensor(1 / 512) if fmt.name == "nvfp4" else None
    groups = torch.randn(6, 16, generator=generator)
    parameters = fmt.fit(groups, scheme, global_scale=multiplier, clip=0.6)
    table = fmt.decode(level_codes(fmt).expand(6, -1), parameters)
    values = 1.5 * torch.randn(6, 200, generator=generator)
    found = second_nearest(table, values, fmt.round(values, parameters))
    for row in range(6):
        for value, second in zip(values[row].tolist(), found[row].tolist(), strict=True):
            first, expected = sorted(table[row].tolist(), key=lambda level: abs(level - value))[:2]
            assert second == expected
            assert first != second


def test_the_index_is_the_level_and_the_part_of_the_way_to_the_next() -> None:
    table = levels(NVFP4())
    assert level_index(table, table).tolist() == [float(k) for k in range(15)]
    at = level_index(table, torch.tensor([-9.0, -5.0, 0.125, 4.5, 6.0, 7.0]))
    assert at.tolist() == [0.0, 0.5, 7.25, 13.25, 14.0, 14.0]
    rows = torch.stack([table, 2 * table])
    assert level_index(rows, torch.tensor([[5.0], [5.0]])).tolist() == [[13.5], [11.5]]
