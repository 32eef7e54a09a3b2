"""GuidedQuant is GPTQ on groups of rows, each with the Hessian of its own saliency."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.builtin.formats.fp4 import MXFP4, NVFP4
from qtool.builtin.formats.fp8 import E4M3
from qtool.builtin.formats.integer import Int2, Int3, Int4, Int8
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.guidedquant import GUIDED, GuidedQuant
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.builtin.statistics.guided import GuidedHessians
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import NumericalError, SchemeError, ShapeError, UsageError
from qtool.model.plan import Segment
from qtool.numerics.losses import relative_loss
from qtool.scheme import Format, TensorScheme, parse_tensor_scheme
from qtool.testing import check_mitigator
from qtool.testing.mitigators import correlated_problem
from tests.oracles.gptq import gptq_oracle
from tests.oracles.guidedquant import guided_hessians_oracle
from tests.oracles.rounding import int_grid

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (Int2(), Int3(), Int4(), Int8(), MXFP4(), NVFP4(), E4M3())}
SCHEMES = ["int2", "int3-g16", "int4-asym-g16", "mxfp4", "nvfp4", "fp8"]
DEFAULTS = GPTQConfig()


def scheme_of(text: str) -> TensorScheme:
    return parse_tensor_scheme(text, FORMATS.__getitem__)


def plain(text: str, **options: Any) -> LayerProblem:  # noqa: ANN401 - of `correlated_problem`
    scheme = scheme_of(text)
    return correlated_problem(FORMATS[scheme.format], scheme, **{"n_in": 32, "n_out": 10, **options})


def saliency(tokens: int, groups: int = 4) -> Tensor:
    """A few tokens weigh much more than the others, and others in each group."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(tokens, groups, generator=generator).mul(2).exp()


def gathered(x: Tensor, rows: Tensor, *, batch: int = 100) -> Tensor:
    accumulator = GuidedHessians().start_guided(x.shape[1], rows)
    for part in torch.split(x, batch):
        accumulator.update(part)
    return accumulator.result()


def guided(of: LayerProblem, hessians: Tensor) -> LayerProblem:
    return replace(of, entries={**of.entries, GUIDED: hessians})


def solved(text: str, **options: Any) -> LayerProblem:  # noqa: ANN401 - as above
    of = plain(text, **options)
    return guided(of, gathered(of.entries["sample"], saliency(512)))


class Constant:
    """``guidedquant`` where every token costs the same, as the check of mitigators takes it."""

    version, needs, Config = 1, ("hessian",), GPTQConfig

    def quantize(self, problem: LayerProblem, config: GPTQConfig) -> QuantizedLinear:
        return GuidedQuant().quantize(guided(problem, problem.need_hessian().expand(4, -1, -1)), config)


@pytest.mark.parametrize("text", ["int3-g16", "nvfp4"])
def test_keeps_the_promises_of_a_mitigator(text: str) -> None:
    scheme = scheme_of(text)
    check_mitigator(Constant(), FORMATS[scheme.format], scheme=scheme)


def test_hessians_are_those_of_the_paper() -> None:
    x = plain("int4").entries["sample"]
    rows = saliency(len(x), 3)
    expected = guided_hessians_oracle(x, rows).float()
    for batch in (512, 100, 7):
        torch.testing.assert_close(gathered(x, rows, batch=batch), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(gathered(x, rows), gathered(x, rows).mT)
    assert not bool(gathered(x, torch.zeros(512, 1)).any())
    with pytest.raises(RuntimeError):  # other tokens than those that were calibrated
        gathered(x, rows[:500])


@pytest.mark.parametrize(("text", "asymmetric"), [("int3-g16", False), ("int4-asym-g16", True), ("int4", False)])
@pytest.mark.parametrize("options", [{"order": "activation"}, {"order": "natural", "parameters": "fresh"}])
def test_equals_the_oracle_on_each_group_of_rows(text: str, asymmetric: bool, options: dict[str, Any]) -> None:
    of = plain(text)
    rows = saliency(512, 3)
    hessians = guided_hessians_oracle(of.entries["sample"], rows)
    config = GPTQConfig(clip="none", **options)
    wide = replace(of, weight=of.weight.double(), hessian=of.need_hessian().double())
    result = GuidedQuant().quantize(guided(wide, hessians), config)
    stored: Any = "bfloat16" if of.grid.parts[0].scheme.scale == "bf16" else "float32"
    bits = FORMATS[of.grid.parts[0].scheme.format].bits
    values = []
    for hessian, (start, stop) in zip(hessians, [(0, 3), (3, 6), (6, 10)], strict=True):
        _, found, *_ = gptq_oracle(
            of.weight[start:stop],
            hessian,
            **int_grid(bits, "asym" if asymmetric else "tight", stored)._asdict(),
            group_size=of.grid.parts[0].scheme.group_size or 32,
            params="static" if config.order == "activation" else "fresh",
            order=config.order,
        )
        values.append(found)
    torch.testing.assert_close(result.weight(of.grid).double(), torch.cat(values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", SCHEMES)
def test_constant_saliency_gives_the_codes_of_gptq(text: str) -> None:
    of = plain(text)
    one = guided(of, of.need_hessian().expand(4, -1, -1))
    result, expected = GuidedQuant().quantize(one, DEFAULTS), GPTQ().quantize(of, DEFAULTS)
    same(result, expected)
    assert result.report["loss"] == pytest.approx(expected.report["loss"], rel=1e-6)
    assert result.report["loss_guided"] == pytest.approx(expected.report["loss"], rel=1e-5)
    assert result.report["loss_rtn"] == expected.report["loss_rtn"]
    for name in ("clipped_fraction", "mean_clip", "dampening_frac"):
        assert result.report[name] == pytest.approx(expected.report[name])
    assert result.counters == expected.counters


@pytest.mark.parametrize("text", SCHEMES)
def test_is_its_groups_of_rows_one_under_the_other(text: str) -> None:
    of = solved(text)
    result = GuidedQuant().quantize(of, DEFAULTS)
    start = 0
    for hessian, rows in zip(of.entries[GUIDED], (2, 3, 2, 3), strict=True):
        part = replace(of, weight=of.weight[start : start + rows], hessian=hessian, memory={})
        part = replace(part, entries={GUIDED: hessian[None]})
        alone = GuidedQuant().quantize(part, DEFAULTS)
        assert torch.equal(result.codes[start : start + rows], alone.codes)
        for whole, own in zip(result.parameters, alone.parameters, strict=True):
            assert torch.equal(whole.scale[start : start + rows], own.scale)
        start += rows
    assert start == len(of.weight)


def test_another_group_does_not_matter() -> None:
    of = solved("int3-g16")
    hessians = of.entries[GUIDED].clone()
    hessians[1] = torch.eye(32)
    before, after = (GuidedQuant().quantize(one, DEFAULTS).codes for one in (of, guided(of, hessians)))
    changed = (before != after).any(1)
    assert not bool(changed[:2].any())
    assert bool(changed[2:5].any())
    assert not bool(changed[5:].any())


def test_channels_set_apart() -> None:
    scheme = scheme_of("int3-g16")
    grid = Grid.segmented(scheme, [Segment(16, "int8")], FORMATS.__getitem__)
    of = replace(plain("int3-g16"), grid=grid, global_scales=())
    same(Constant().quantize(of, DEFAULTS), GPTQ().quantize(of, DEFAULTS))


@pytest.mark.parametrize("text", ["int2", "int3-g16", "nvfp4"])
def test_beats_gptq_where_it_counts(text: str) -> None:
    ours = theirs = plainly = others = 0.0
    for seed in range(4):
        of = solved(text, seed=seed, n_out=32)
        result, other = GuidedQuant().quantize(of, DEFAULTS), GPTQ().quantize(of, DEFAULTS)
        assert result.report["loss"] == pytest.approx(
            relative_loss(of.weight, result.weight(of.grid), of.need_hessian()), rel=1e-3
        )
        assert result.report["loss_guided"] == pytest.approx(costs(of, result), rel=1e-3)
        ours, theirs = ours + costs(of, result), theirs + costs(of, other)
        plainly, others = plainly + result.report["loss"], others + other.report["loss"]
    assert ours < 0.97 * theirs
    assert plainly > others


def test_a_group_whose_errors_cost_nothing_is_rounded_to_nearest() -> None:
    of = solved("int3-g16")
    hessians = of.entries[GUIDED].clone()
    hessians[2] = 0
    result = GuidedQuant().quantize(guided(of, hessians), GPTQConfig(clip="none"))
    assert result.counters["fallback_rtn"] == 1
    assert result.counters["dead_columns"] == 0
    part = replace(of, weight=of.weight[5:7], hessian=None, entries={}, global_scales=())
    nearest = RTN().quantize(part, ClipOptions())
    assert torch.equal(result.codes[5:7], nearest.codes)


def test_what_means_nothing_is_refused() -> None:
    of = solved("int4-g16")
    with pytest.raises(UsageError, match="no saliency was gathered"):
        GuidedQuant().quantize(plain("int4-g16"), DEFAULTS)
    with pytest.raises(UsageError, match="no Hessian was gathered"):
        GuidedQuant().quantize(replace(of, hessian=None), DEFAULTS)
    with pytest.raises(UsageError, match="has to come first"):
        GuidedQuant().quantize(of.after(GPTQ().quantize(of, DEFAULTS)), DEFAULTS)
    with pytest.raises(SchemeError, match="rows share a scale"):
        GuidedQuant().quantize(solved("int4-tensor"), DEFAULTS)
    with pytest.raises(ShapeError, match="do not fit its weight"):
        GuidedQuant().quantize(guided(of, torch.eye(31).expand(4, -1, -1)), DEFAULTS)
    with pytest.raises(ShapeError, match="do not fit its weight"):
        GuidedQuant().quantize(guided(of, torch.eye(32).expand(11, -1, -1)), DEFAULTS)
    with pytest.raises(NumericalError, match="holds NaN"):
        GuidedQuant().quantize(guided(of, torch.full((4, 32, 32), torch.nan)), DEFAULTS)


def same(result: QuantizedLinear, expected: QuantizedLinear) -> None:
    assert torch.equal(result.codes, expected.codes)
    for one, other in zip(result.parameters, expected.parameters, strict=True):
        assert torch.equal(one.scale, other.scale)
        assert (one.zero_point is None) == (other.zero_point is None)
        assert one.zero_point is None or torch.equal(one.zero_point, other.zero_point)
        assert one.global_scale == other.global_scale


def costs(of: LayerProblem, result: QuantizedLinear) -> float:
    """Σ_t s_t ‖e_t‖² over the rows of each group, as part of the same with the weight for the error."""
    error, rows, total, whole = of.weight - result.weight(of.grid), saliency(512), 0.0, 0.0
    edges = [len(error) * k // 4 for k in range(5)]
    for k, (start, stop) in enumerate(pairwise(edges)):
        weights = rows[:, k] / rows[:, k].sum()
        x = of.entries["sample"]
        total += float((weights[:, None] * (x @ error[start:stop].T).square()).sum())
        whole += float((weights[:, None] * (x @ of.weight[start:stop].T).square()).sum())
    return total / whole
