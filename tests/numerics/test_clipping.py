from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtool.builtin.formats.fp4 import NVFP4
from qtool.builtin.formats.integer import Int4
from qtool.numerics import clipping
from qtool.numerics.clipping import ClippedFit, clip_grid, search_clip
from qtool.scheme import Format, GroupParameters, ScaleFormat, TensorScheme
from tests.oracles.rounding import ScaleDtype, decode_int, encode_int, int_limits, store_scale

INT4 = TensorScheme("int4", strategy="group", group_size=32)
ASYM = TensorScheme("int4", symmetric=False, strategy="group", group_size=32)
RATIOS = clip_grid(80)
FitRound = Callable[[Tensor, float], tuple[GroupParameters, Tensor]]


def heavy_tails(rows: int, group: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, group, generator=generator) ** 3 * 0.01


def fitter(fmt: Format, scheme: TensorScheme, global_scale: Tensor | None = None) -> FitRound:
    def fit_round(groups: Tensor, clip: float) -> tuple[GroupParameters, Tensor]:
        parameters = fmt.fit(groups, scheme, global_scale=global_scale, clip=clip)
        return parameters, fmt.round(groups, parameters)

    return fit_round


def errors(fmt: Format, groups: Tensor, found: ClippedFit, norm: float, weights: Tensor | None = None) -> Tensor:
    powers = (fmt.round(groups, found.parameters) - groups).double().abs() ** norm
    return (powers if weights is None else powers * weights).sum(-1)


def best_error_by_hand(block: list[float], weights: list[float], norm: float, stored: ScaleDtype) -> float:
    """Try each ratio on one symmetric block, one value at a time."""
    widest, limits = max(max(block) / 7, min(block) / -8), int_limits(4, "tight")
    tried = []
    for ratio in RATIOS:
        scale = store_scale(widest * ratio, stored)
        rounded = [decode_int(encode_int(value, scale, 0, limits), scale, 0) for value in block]
        tried.append(sum(w * abs(r - value) ** norm for w, r, value in zip(weights, rounded, block, strict=True)))
    return float(min(tried))


def test_the_grid_goes_down_in_hundredths() -> None:
    assert pytest.approx([1 - i / 100 for i in range(80)]) == RATIOS
    assert clip_grid(2) == pytest.approx((1.0, 0.21))
    assert clip_grid(1) == (1.0,)
    assert clip_grid(4, 0.5, 2.0) == pytest.approx((2.0, 1.5, 1.0, 0.5))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize(("scale", "stored"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_finds_the_least_error_of_the_stored_scales(
    scale: ScaleFormat, stored: ScaleDtype, norm: float, weighted: bool
) -> None:
    groups = heavy_tails(5, 32)
    weights = torch.rand(groups.shape, generator=torch.Generator().manual_seed(1)) if weighted else None
    scheme = TensorScheme("int4", strategy="group", group_size=32, scale=scale)
    found = search_clip(groups, fitter(Int4(), scheme), ratios=RATIOS, norm=norm, weights=weights)
    ours = errors(Int4(), groups, found, norm, weights)
    by_hand = [
        [
            best_error_by_hand(block.tolist(), importance.tolist(), norm, stored)
            for block, importance in zip(row, more, strict=True)
        ]
        for row, more in zip(groups, torch.ones_like(groups) if weights is None else weights, strict=True)
    ]
    torch.testing.assert_close(ours, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-4, atol=0)
    expected = store_scale(float(groups[2, 1].abs().max()) * float(found.ratio[2, 1]) / 7, stored)
    assert float(found.parameters.scale[2, 1]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("scheme", [INT4, ASYM], ids=["sym", "asym"])
def test_no_group_gets_worse_and_heavy_tails_get_better(scheme: TensorScheme, norm: float) -> None:
    groups = heavy_tails(40, 32)
    whole = search_clip(groups, fitter(Int4(), scheme), ratios=(), norm=norm)
    found = search_clip(groups, fitter(Int4(), scheme), ratios=RATIOS, norm=norm)
    assert bool((whole.ratio == 1).all())
    before, after = errors(Int4(), groups, whole, norm), errors(Int4(), groups, found, norm)
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float((after / before).mean()) < 0.97
    assert float((found.ratio < 1).float().mean()) > 0.5


def test_values_on_the_grid_keep_their_range() -> None:
    groups = torch.tensor([[-7.0, -3.0, 0.0, 1.0, 5.0, 7.0], [0.0] * 6])
    found = search_clip(groups, fitter(Int4(), INT4), ratios=RATIOS)
    assert found.ratio.tolist() == [1.0, 1.0]
    assert found.parameters.scale[0] == 1.0


def test_one_is_a_candidate_whatever_the_ratios() -> None:
    groups = torch.tensor([[-7.0, -3.0, 0.0, 1.0, 5.0, 7.0]])
    assert search_clip(groups, fitter(Int4(), INT4), ratios=(0.3, 0.2)).ratio.tolist() == [1.0]


def test_importance_decides_what_is_clipped() -> None:
    groups = torch.linspace(-1, 1, 32).repeat(2, 1)
    groups[:, 5] = 4.0
    weights = torch.ones(2, 32)
    weights[0, 5], weights[1, 5] = 0.0, 1000.0
    ratio = search_clip(groups, fitter(Int4(), INT4), ratios=RATIOS, norm=2.0, weights=weights).ratio
    assert float(ratio[0]) < 0.35
    assert float(ratio[1]) > 0.95


@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("exponent", [-60, 40])
def test_a_power_of_two_scales_through_bit_for_bit(norm: float, exponent: int) -> None:
    groups = heavy_tails(20, 32)
    plain = search_clip(groups, fitter(Int4(), INT4), ratios=RATIOS, norm=norm)
    scaled = search_clip(groups * 2.0**exponent, fitter(Int4(), INT4), ratios=RATIOS, norm=norm)
    assert torch.equal(scaled.ratio, plain.ratio)
    assert torch.equal(scaled.parameters.scale, plain.parameters.scale * 2.0**exponent)


@pytest.mark.parametrize("piece", [1, 200, 1 << 20])
def test_pieces_do_not_show(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = heavy_tails(10, 32)
    weights = torch.rand(groups.shape, generator=torch.Generator().manual_seed(1))
    whole = search_clip(groups, fitter(Int4(), ASYM), ratios=RATIOS, weights=weights)
    monkeypatch.setattr(clipping, "_PIECE", piece)
    found = search_clip(groups, fitter(Int4(), ASYM), ratios=RATIOS, weights=weights)
    assert torch.equal(found.ratio, whole.ratio)
    assert torch.equal(found.parameters.scale, whole.parameters.scale)
    assert found.parameters.zero_point is not None
    assert whole.parameters.zero_point is not None
    assert torch.equal(found.parameters.zero_point, whole.parameters.zero_point)


def test_scale_and_zero_point_stay_together() -> None:
    groups = heavy_tails(10, 32) + 0.02
    found = search_clip(groups, fitter(Int4(), ASYM), ratios=RATIOS)
    assert found.parameters.zero_point is not None
    for row, ratio in ((0, found.ratio[0, 0]), (7, found.ratio[7, 0])):
        alone = Int4().fit(groups[row, 0], ASYM, clip=float(ratio))
        assert alone.scale == found.parameters.scale[row, 0]
        assert alone.zero_point == found.parameters.zero_point[row, 0]


def test_a_group_takes_the_zero_point_of_its_own_ratio() -> None:
    best = torch.tensor([[0.5], [0.25], [1.0]])

    def fit_round(groups: Tensor, clip: float) -> tuple[GroupParameters, Tensor]:
        told = torch.full_like(best[:, 0], clip)
        return GroupParameters(told, told * 100), groups + (best - clip)

    found = search_clip(torch.ones(3, 4), fit_round, ratios=(0.5, 0.25, 0.125))
    assert found.ratio.tolist() == [0.5, 0.25, 1.0]
    assert found.parameters.scale.tolist() == [0.5, 0.25, 1.0]
    assert found.parameters.zero_point is not None
    assert found.parameters.zero_point.tolist() == [50.0, 25.0, 100.0]


def test_the_global_scale_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "_PIECE", 64)
    groups, global_scale = heavy_tails(6, 16), torch.tensor(2.0**-12)
    found = search_clip(groups, fitter(NVFP4(), NVFP4.defaults, global_scale), ratios=RATIOS)
    assert found.parameters.global_scale == global_scale
    assert torch.equal(found.parameters.scale, found.parameters.scale.to(torch.float8_e4m3fn).float())


def test_leaves_its_arguments_alone() -> None:
    groups = heavy_tails(4, 32)
    weights = torch.rand(groups.shape)
    before = groups.clone(), weights.clone()
    search_clip(groups, fitter(Int4(), INT4), ratios=RATIOS, weights=weights)
    assert torch.equal(groups, before[0])
    assert torch.equal(weights, before[1])


def second_moments(n: int, blocks: int, seed: int = 3) -> Tensor:
    x = torch.randn(blocks, 2 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x += x.roll(1, dims=-1) * 2  # channels that go together
    return x.mT @ x / (2 * n)


@pytest.mark.parametrize("shape", [(5, 3, 8), (5, 24), (1, 120)], ids=["groups", "rows", "whole"])
def test_the_energy_of_errors_is_that_of_their_outputs(shape: tuple[int, ...]) -> None:
    errors = torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    n, blocks = (8, 3) if len(shape) == 3 else (24, 1)
    moments = second_moments(n, blocks)
    found = clipping.quadratic_energy(errors, moments)
    assert found.shape == shape[:-1]
    for place in range(found.numel()):
        own = errors.reshape(-1, shape[-1])[place].reshape(-1, n)
        by_hand = sum(float(one @ moments[place % blocks] @ one) for one in own)
        assert float(found.flatten()[place]) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("piece", [1, 1 << 22])
def test_the_output_decides_where_moments_are_given(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "_PRODUCT_PIECE", piece)
    groups, moments = heavy_tails(6, 32), second_moments(32, 3).float()
    ratios = clip_grid(20, 0.5)
    assert ratios[-1] == 0.5
    found = search_clip(groups, fitter(Int4(), INT4), ratios=ratios, moments=moments)
    tried = {ratio: Int4().round(groups, Int4().fit(groups, INT4, clip=ratio)) - groups for ratio in ratios}
    chosen = Int4().round(groups, found.parameters) - groups
    for row in range(6):
        for block in range(3):

            def energy(errors: Tensor, row: int = row, block: int = block) -> float:
                e = errors[row, block].double()
                return float(e @ moments[block].double() @ e)

            assert energy(chosen) == pytest.approx(min(energy(errors) for errors in tried.values()), rel=1e-5)
    by_diagonal = search_clip(
        groups,
        fitter(Int4(), INT4),
        ratios=ratios,
        norm=2.0,
        weights=moments.diagonal(dim1=-2, dim2=-1).expand_as(groups),
    )
    assert not torch.equal(by_diagonal.ratio, found.ratio)
