from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from qtool.builtin.formats.fp4 import NVFP4
from qtool.builtin.formats.integer import Int2, Int4, Int8
from qtool.builtin.mitigators.cd import CD, CDConfig
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.obq import OBQ, OBQConfig
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem
from qtool.errors import UsageError
from qtool.model.plan import Segment
from qtool.scheme import Format, TensorScheme, parse_tensor_scheme
from qtool.testing import check_mitigator
from qtool.testing.mitigators import correlated_problem
from tests.oracles.gptq import dampen
from tests.oracles.obq import obq_oracle

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (Int2(), Int4(), Int8(), NVFP4())}
TEXTS = ["int2", "int4-asym-g16-sfp32", "nvfp4", "int4-tensor"]


def scheme_of(text: str) -> TensorScheme:
    return parse_tensor_scheme(text, FORMATS.__getitem__)


def problem(text: str, *, apart: bool = False, **options: Any) -> LayerProblem:  # noqa: ANN401 - of `correlated_problem`
    scheme = scheme_of(text)
    of = correlated_problem(FORMATS[scheme.format], scheme, **options)
    if not apart:
        return of
    grid = Grid.segmented(scheme, [Segment(16, "int8")], FORMATS.__getitem__)
    return replace(of, grid=grid, global_scales=grid.global_scales(of.weight.abs().amax(0)))


@pytest.mark.parametrize("text", TEXTS)
def test_keeps_the_promises_of_a_mitigator(text: str) -> None:
    scheme = scheme_of(text)
    check_mitigator(OBQ(), FORMATS[scheme.format], scheme=scheme)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("text", TEXTS)
def test_in_a_fixed_order_it_is_gptq(text: str, order: Any, apart: bool, dead: bool) -> None:  # noqa: ANN401
    of = problem(text, apart=apart, n_out=8, n_in=32)
    hessian = of.need_hessian().double()
    if dead:
        hessian[[3, 20]] = 0
        hessian[:, [3, 20]] = 0
    of = replace(of, weight=of.weight.double(), hessian=hessian)
    ours = OBQ().quantize(of, OBQConfig(order=order))
    theirs = GPTQ().quantize(of, GPTQConfig(order=order))
    torch.testing.assert_close(ours.weight(of.grid), theirs.weight(of.grid), rtol=0, atol=0)
    assert ours.report == pytest.approx(theirs.report)
    assert ours.counters == theirs.counters


@pytest.mark.parametrize("text", ["int2", "nvfp4"])
def test_the_greedy_order_equals_the_oracle(text: str) -> None:
    of = problem(text, n_out=3, n_in=32)
    of = replace(of, weight=of.weight.double(), hessian=of.need_hessian().double())
    result = OBQ().quantize(of, OBQConfig())
    (own,), part = result.parameters, of.grid.parts[0]
    codes = torch.arange(2**part.format.bits, dtype=torch.uint8).expand(*own.scale.shape, -1)
    decoded, size = part.format.decode(codes, own).double(), part.scheme.group_size or 32
    weight, damped = dampen(of.weight, of.need_hessian(), 0.01)
    values, _ = obq_oracle(weight, damped, levels=[decoded[:, col // size] for col in range(32)])
    torch.testing.assert_close(result.weight(of.grid).double(), values, rtol=1e-6, atol=1e-9)
    assert not torch.equal(result.codes, OBQ().quantize(of, OBQConfig(order="natural")).codes)


def test_a_diagonal_hessian_makes_it_nearest_rounding() -> None:
    of = problem("int4-asym-g16-sfp32")
    of = replace(of, hessian=torch.diag(of.need_hessian().diagonal()))
    result, nearest = OBQ().quantize(of, OBQConfig(clip="none")), RTN().quantize(of, ClipOptions())
    assert torch.equal(result.codes, nearest.codes)
    assert result.report["loss"] == pytest.approx(nearest.report["loss"])


def test_coordinate_descent_improves_it() -> None:
    of = problem("int4-asym-g16-sfp32")
    start = OBQ().quantize(of, OBQConfig())
    assert CD().quantize(of.after(start), CDConfig()).report["loss"] < start.report["loss"] < start.report["loss_rtn"]


def test_falls_back_as_gptq_does() -> None:
    of = replace(problem("int4"), hessian=torch.zeros(64, 64))
    result = OBQ().quantize(of, OBQConfig(clip="none"))
    assert result.counters["fallback_rtn"] == 1
    assert torch.equal(result.codes, RTN().quantize(of, ClipOptions()).codes)


def test_refuses_what_it_cannot_do() -> None:
    of = problem("int4")
    with pytest.raises(UsageError, match="`obq` starts from the weight, so it has to come first"):
        OBQ().quantize(of.after(RTN().quantize(of, ClipOptions())), OBQConfig())
    wide = problem("int4", n_out=2, n_in=576)
    with pytest.raises(UsageError, match=r"`obq` is for layers of up to 512 inputs, which `layer` has more of\n.*\n"):
        OBQ().quantize(wide, OBQConfig())
    with pytest.raises(UsageError, match="no Hessian was gathered"):
        OBQ().quantize(replace(of, hessian=None), OBQConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "natural", "dampening_frac": -1.0}, "`dampening_frac` is from 0 to 10, not -1.0"),
        ({"clip_norm": 0.0}, "`clip_norm` is above 0"),
        ({"clip_metric": "output", "clip_norm": 3.0}, "`clip_norm` has no effect on the metric `output`"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OBQConfig(**options)
