from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from qtool.builtin.formats.fp4 import NVFP4
from qtool.builtin.formats.integer import Int2, Int4, Int8
from qtool.builtin.mitigators.cd import CD, CDConfig
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.ldlq import LDLQ, LDLQConfig
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem, SiblingMitigator
from qtool.errors import UsageError
from qtool.model.plan import Segment
from qtool.numerics.losses import relative_loss
from qtool.scheme import Format, TensorScheme, parse_tensor_scheme
from qtool.testing import check_mitigator
from qtool.testing.mitigators import correlated_problem
from tests.oracles.gptq import Order, dampen, visiting_order
from tests.oracles.ldlq import ldlq_oracle, unit_upper_ldl
from tests.oracles.rounding import int_grid

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (Int2(), Int4(), Int8(), NVFP4())}
PLAIN: dict[str, Any] = {"clip": "none", "parameters": "static"}


def scheme_of(text: str) -> TensorScheme:
    return parse_tensor_scheme(text, FORMATS.__getitem__)


def problem(text: str, **options: Any) -> LayerProblem:  # noqa: ANN401 - of `correlated_problem`
    scheme = scheme_of(text)
    return correlated_problem(FORMATS[scheme.format], scheme, **options)


@pytest.mark.parametrize(("text", "passes"), [("int2", 3), ("int4-g16-sfp32", 0), ("nvfp4", 3), ("int4-tensor", 0)])
def test_keeps_the_promises_of_a_mitigator(text: str, passes: int) -> None:
    scheme = scheme_of(text)
    check_mitigator(LDLQ(), FORMATS[scheme.format], LDLQConfig(greedy_passes=passes), scheme=scheme)


@pytest.mark.parametrize("order", ["natural", "activation", "groups"])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize(("text", "bits"), [("int4-g16-sfp32", 4), ("int2-g32-sfp32-full", 2)])
def test_equals_the_oracle_of_the_ldl_factors_incl_clipping(text: str, bits: int, dead: bool, order: Order) -> None:
    of = problem(text, n_out=3)
    hessian = of.need_hessian().double()
    if dead:
        hessian[[3, 40]] = 0
        hessian[:, [3, 40]] = 0
    live = hessian.diagonal()[hessian.diagonal() > 0].mean()
    hessian *= 2.0 ** -torch.frexp(live).exponent
    of = replace(of, weight=of.weight.double(), hessian=hessian)
    result = LDLQ().quantize(of, LDLQConfig(order=order, **PLAIN))
    grid = int_grid(bits, "full" if bits == 2 else "tight")._asdict()
    size = of.grid.parts[0].scheme.group_size or 64
    _, values, *_ = ldlq_oracle(of.weight, hessian, **grid, group_size=size, order=order)
    torch.testing.assert_close(result.weight(of.grid).double(), values, rtol=1e-6, atol=1e-9)
    assert result.counters["dead_columns"] == (2 if dead else 0)
    _, damped = dampen(of.weight, hessian, 0.01)
    visits = visiting_order(damped, order, size)
    _, pivots = unit_upper_ldl(damped[visits][:, visits])
    assert result.report["ldl_trace_fraction"] == pytest.approx(float(pivots.sum() / damped.trace()), rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"parameters": "fresh", "order": "groups"}, PLAIN])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("text", ["int2", "int4-g16-sfp32", "nvfp4", "int4-tensor"])
def test_has_the_codes_of_gptq(text: str, apart: bool, options: dict[str, Any]) -> None:
    of = problem(text)
    if apart:
        grid = Grid.segmented(of.grid.parts[0].scheme, [Segment(16, "int8")], FORMATS.__getitem__)
        of = replace(of, grid=grid, global_scales=grid.global_scales(of.weight.abs().amax(0)))
    ours, theirs = LDLQ().quantize(of, LDLQConfig(**options)), GPTQ().quantize(of, GPTQConfig(**options))
    assert torch.equal(ours.codes, theirs.codes)
    for one, other in zip(ours.parameters, theirs.parameters, strict=True):
        assert torch.equal(one.scale, other.scale)
    assert ours.counters == theirs.counters
    assert {**ours.report, **theirs.report} == ours.report
    assert set(ours.report) - set(theirs.report) == {"ldl_trace_fraction"}
    assert 0 < ours.report["ldl_trace_fraction"] < 1


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("text", ["int2", "nvfp4"])
def test_greedy_passes_are_coordinate_descent_in_the_same_order(text: str, order: Order) -> None:
    of = problem(text)
    plain = LDLQ().quantize(of, LDLQConfig(order=order, dampening_frac=0.02))
    greedy = LDLQ().quantize(of, LDLQConfig(order=order, dampening_frac=0.02, greedy_passes=9))
    swept = CD().quantize(of.after(plain), CDConfig(sweeps=9, visits=order, dampening_frac=0.02))
    assert torch.equal(greedy.codes, swept.codes)
    assert greedy.report == swept.report
    assert greedy.report["loss"] < plain.report["loss"]
    assert greedy.report["loss"] == pytest.approx(
        relative_loss(of.weight, greedy.weight(of.grid), of.hessian), rel=1e-3
    )
    turned: Order = "natural" if order == "activation" else "activation"
    other = CD().quantize(of.after(plain), CDConfig(sweeps=9, visits=turned, dampening_frac=0.02))
    assert not torch.equal(other.codes, greedy.codes)
    once = LDLQ().quantize(of, LDLQConfig(order=order, dampening_frac=0.02, greedy_passes=1))
    assert once.report["sweeps"] == 1 < greedy.report["sweeps"] <= 9


def test_the_block_size_does_not_matter() -> None:
    of = problem("int4-g16-sfp32")
    of = replace(of, weight=of.weight.double(), hessian=of.need_hessian().double())
    codes = [LDLQ().quantize(of, LDLQConfig(block_size=size, greedy_passes=2)).codes for size in (1, 24, 128)]
    assert all(torch.equal(codes[0], other) for other in codes[1:])


def test_siblings_get_what_each_gets_alone() -> None:
    one = problem("int4-g16-sfp32")
    siblings = [replace(one, name=str(n), weight=n * one.weight[n : 4 * n], memory={}) for n in (1, 5)]
    method, config = LDLQ(), LDLQConfig(greedy_passes=2)
    assert isinstance(method, SiblingMitigator)
    shared = [replace(sibling, memory=siblings[0].memory) for sibling in siblings]
    for sibling, result in zip(siblings, method.quantize_siblings(shared, config), strict=True):
        alone = method.quantize(replace(sibling, memory={}), config)
        assert torch.equal(result.codes, alone.codes)
        assert result.report == pytest.approx(alone.report, rel=1e-5)


def test_falls_back_to_nearest_rounding_and_counts_it() -> None:
    of = replace(problem("int4-g16-sfp32"), hessian=torch.zeros(64, 64))
    result = LDLQ().quantize(of, LDLQConfig(greedy_passes=3, clip="none"))
    assert torch.equal(result.codes, RTN().quantize(of, ClipOptions()).codes)
    assert result.counters["fallback_rtn"] == 1
    assert "ldl_trace_fraction" not in result.report


def test_refuses_what_it_cannot_do() -> None:
    of = problem("int4")
    with pytest.raises(UsageError, match=r"`ldlq` starts from the weight.*\nhint: --method ldlq\+…"):
        LDLQ().quantize(of.after(RTN().quantize(of, ClipOptions())), LDLQConfig())
    with pytest.raises(UsageError, match=r"`greedy_passes` is from 0 to 1000, not -1\nhint: --set greedy-passes=9"):
        LDLQConfig(greedy_passes=-1)
    with pytest.raises(UsageError, match="`dampening_frac` is from 0 to 10"):
        LDLQConfig(dampening_frac=-1.0)
