from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from qtool.builtin.formats.fp4 import E2M1, MXFP4, NVFP4
from qtool.builtin.formats.fp8 import E4M3
from qtool.builtin.formats.integer import Int2, Int3, Int4, Int8
from qtool.builtin.mitigators.cd import CD, CDConfig, damped, frozen_columns
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.lorc import LoRC, LoRCConfig
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import NumericalError, UsageError
from qtool.model.plan import Segment
from qtool.numerics.losses import relative_loss
from qtool.scheme import Format, TensorScheme, parse_tensor_scheme
from qtool.testing import check_mitigator
from qtool.testing.mitigators import correlated_problem
from tests.oracles.coordinate_descent import coordinate_descent_oracle

FORMATS: dict[str, Format] = {
    fmt.name: fmt for fmt in (Int2(), Int3(), Int4(), Int8(), E2M1(), MXFP4(), NVFP4(), E4M3())
}
SCHEMES = ["int2", "int3-g16", "int4-asym-g16", "int4-tensor", "int8", "fp4-asym-g16", "mxfp4", "nvfp4", "fp8"]
SCHEMES += ["int3-asym-g16-offset"]
MIXED = [("int3-g16", "int8"), ("nvfp4", "int4"), ("int4-asym-g16", "fp8"), ("int4-tensor", "int8")]


def scheme_of(text: str) -> TensorScheme:
    return parse_tensor_scheme(text, FORMATS.__getitem__)


def problem(text: str, apart: str = "", **options: Any) -> LayerProblem:  # noqa: ANN401 - of `correlated_problem`
    """A correlated layer, with its last 16 channels in the format `apart` if there is one."""
    scheme = scheme_of(text)
    of = correlated_problem(FORMATS[scheme.format], scheme, **{"n_in": 32, **options})
    if not apart:
        return of
    grid = Grid.segmented(scheme, [Segment(16, apart)], FORMATS.__getitem__)
    return replace(of, grid=grid, global_scales=grid.global_scales(of.weight.abs().amax(0)))


def rtn(of: LayerProblem) -> QuantizedLinear:
    return RTN().quantize(of, ClipOptions())


def gptq(of: LayerProblem) -> QuantizedLinear:
    return GPTQ().quantize(of, GPTQConfig())


def stands(result: QuantizedLinear, of: LayerProblem) -> torch.Tensor:
    """What stands for the weight, low-rank correction included."""
    if result.adapter is None:
        return result.weight(of.grid)
    return result.weight(of.grid) + result.adapter.up.float() @ result.adapter.down.float()


class Behind:
    """``rtn+cd`` or ``gptq+cd``, as the check of mitigators takes it."""

    version, needs, Config = 1, ("hessian",), CDConfig

    def __init__(self, first: Callable[[LayerProblem], QuantizedLinear]) -> None:
        self.first = first

    def quantize(self, problem: LayerProblem, config: CDConfig) -> QuantizedLinear:
        return CD().quantize(problem.after(self.first(problem)), config)


@pytest.mark.parametrize(
    ("text", "first"),
    [("int2", rtn), ("int4-tensor", gptq), ("nvfp4", gptq), ("fp8", rtn)],
)
def test_keeps_the_promises_of_a_mitigator(text: str, first: Callable[[LayerProblem], QuantizedLinear]) -> None:
    scheme = scheme_of(text)
    check_mitigator(Behind(first), FORMATS[scheme.format], scheme=scheme)


@pytest.mark.parametrize(
    ("text", "apart", "first"),
    [*((text, "", gptq) for text in SCHEMES), *((*mixed, gptq) for mixed in MIXED), ("int3-g16", "int8", rtn)],
)
def test_is_never_worse_than_its_start_and_better_with_each_sweep(
    text: str, apart: str, first: Callable[[LayerProblem], QuantizedLinear]
) -> None:
    of = problem(text, apart)
    start = first(of)
    results = [CD().quantize(of.after(start), CDConfig(sweeps=k, dampening_frac=0.0)) for k in (1, 2, 4, 60)]
    losses = [start.report["loss"], *(result.report["loss"] for result in results)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    for result in results:
        assert result.report["loss"] == pytest.approx(
            relative_loss(of.weight, result.weight(of.grid), of.hessian), rel=1e-3
        )
        assert result.report["loss_rtn"] == start.report["loss_rtn"]
        assert result.report["loss_before"] == start.report["loss"]
        assert result.parameters is start.parameters
        assert result.counters == start.counters
        changed = float((result.codes != start.codes).double().mean())
        assert result.report["changed_fraction"] == pytest.approx(changed)
        kept = result.weight(of.grid) == start.weight(of.grid)
        assert torch.equal(result.codes[kept], start.codes[kept])
    assert results[-1].report["sweeps"] < 60
    again = CD().quantize(of.after(results[-1]), CDConfig(dampening_frac=0.0))
    assert torch.equal(again.codes, results[-1].codes)
    assert again.report["sweeps"] == 1.0


@pytest.mark.parametrize("way", [{"visits": "greedy"}, {"relax_every": 2}], ids=str)
@pytest.mark.parametrize(("text", "apart"), [(text, "") for text in SCHEMES if text != "int8"] + MIXED)
def test_other_ways_are_never_worse_than_their_start_and_find_other_codes(
    text: str, apart: str, way: dict[str, Any]
) -> None:
    of = problem(text, apart)
    start = gptq(of)
    found, cyclic = (CD().quantize(of.after(start), CDConfig(sweeps=9, dampening_frac=0.0, **one)) for one in (way, {}))
    assert found.report["loss"] < start.report["loss"]
    assert found.report["loss"] == pytest.approx(relative_loss(of.weight, found.weight(of.grid), of.hessian), rel=1e-3)
    assert not torch.equal(found.codes, cyclic.codes)
    kept = found.weight(of.grid) == start.weight(of.grid)
    assert torch.equal(found.codes[kept], start.codes[kept])
    assert found.parameters is start.parameters
    assert found.report["sweeps"] == 9 if "relax_every" in way else found.report["sweeps"] < 9


@pytest.mark.parametrize("text", ["int2", "int4-asym-g16", "nvfp4", "int4-tensor"])
def test_equals_trying_every_value_under_the_damped_hessian(text: str) -> None:
    of = problem(text, n_out=3)
    start, hessian = gptq(of), of.need_hessian().double()
    part, own = of.grid.parts[0], start.parameters[0]
    size = part.scheme.group_size or 32
    levels = []
    for col in range(32):
        group = torch.arange(2**part.format.bits, dtype=torch.uint8)
        if part.scheme.strategy == "tensor":
            levels.append(part.format.decode(group.unsqueeze(0), own).expand(3, -1))
        else:
            codes = group.expand(*own.scale.shape, -1)
            levels.append(part.format.decode(codes, own)[:, col // size])
    expected = coordinate_descent_oracle(
        of.weight,
        hessian + 0.05 * hessian.diagonal().mean() * torch.eye(32),
        start.weight(of.grid),
        levels=levels,
        order=torch.argsort(hessian.diagonal(), descending=True).tolist(),
        sweeps=2,
    )[-1]
    found = CD().quantize(of.after(start), CDConfig(sweeps=2, dampening_frac=0.05))
    torch.testing.assert_close(found.weight(of.grid).double(), expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(found.codes, start.codes)


@pytest.mark.parametrize(("text", "apart"), [*((text, "") for text in SCHEMES), *MIXED])
def test_a_diagonal_hessian_leaves_nearest_rounding_as_it_is(text: str, apart: str) -> None:
    of = problem(text, apart)
    of = replace(of, hessian=torch.diag(of.need_hessian().diagonal()))
    start = rtn(of)
    result = CD().quantize(of.after(start), CDConfig())
    assert torch.equal(result.codes, start.codes)
    assert result.report["loss"] == start.report["loss"]
    assert result.report["changed_fraction"] == 0.0


@pytest.mark.parametrize(("text", "apart"), [("int3-g16", ""), ("nvfp4", ""), ("int4-asym-g16", "fp8")])
def test_the_block_size_does_not_matter_and_the_order_does(text: str, apart: str) -> None:
    of = problem(text, apart)
    of = replace(of, weight=of.weight.double(), hessian=of.need_hessian().double())
    start = of.after(gptq(of))
    codes = [CD().quantize(start, CDConfig(block_size=size)).codes for size in (1, 24, 64, 128)]
    assert all(torch.equal(codes[0], other) for other in codes[1:])
    assert not torch.equal(codes[0], CD().quantize(start, CDConfig(visits="natural")).codes)


def test_the_unit_of_the_inputs_and_dead_ones_do_not_matter() -> None:
    of = problem("int4-g16")
    hessian = of.need_hessian().clone()
    hessian[[5, 9]] = 0
    hessian[:, [5, 9]] = 0
    start = gptq(replace(of, hessian=hessian))
    one, other = (CD().quantize(replace(of, hessian=hessian * u).after(start), CDConfig()) for u in (1.0, 2.0**-30))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.codes[:, [5, 9]], start.codes[:, [5, 9]])
    assert one.counters["dead_columns"] == 2
    nothing = CD().quantize(replace(of, hessian=torch.zeros(32, 32)).after(start), CDConfig())
    assert torch.equal(nothing.codes, start.codes)
    # Dead inputs neither get damping nor take part in the mean that it is a fraction of.
    live = hessian.diagonal() > 0
    added = damped(hessian, 0.5) - hessian
    expected = torch.where(live, 0.5 * hessian.diagonal()[live].double().mean(), 0.0).float()
    torch.testing.assert_close(added, expected.diag(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("way", [{}, {"visits": "greedy"}, {"relax_every": 2, "sweeps": 7}], ids=str)
def test_composes_with_low_rank_corrections_on_either_side(way: dict[str, Any]) -> None:
    of = problem("int3-g16")
    start = gptq(of)
    improved = CD().quantize(of.after(start), CDConfig(**way))
    behind = LoRC().quantize(of.after(improved), LoRCConfig(rank=4))
    plain = LoRC().quantize(of.after(start), LoRCConfig(rank=4))
    assert behind.codes is improved.codes
    assert improved.report["loss"] < start.report["loss"]
    assert behind.report["loss"] < improved.report["loss"]
    around = CD().quantize(of.after(plain), CDConfig(dampening_frac=0.0, **way))
    assert around.adapter is plain.adapter
    assert plain.adapter is not None
    rest = replace(of, weight=of.weight - plain.adapter.up.float() @ plain.adapter.down.float())
    assert torch.equal(around.codes, CD().quantize(rest.after(start), CDConfig(dampening_frac=0.0, **way)).codes)
    assert not torch.equal(around.codes, improved.codes)
    assert around.report["loss"] < plain.report["loss"]
    for result in (behind, around):
        measured = relative_loss(of.weight, stands(result, of), of.hessian)
        assert result.report["loss"] == pytest.approx(measured, rel=1e-3)
    assert around.report["rank"] == 4.0


def test_what_nearest_rounding_loses_is_measured_where_the_start_does_not_say() -> None:
    of = problem("int3-g16")
    bare = replace(gptq(of), report={})
    assert CD().quantize(of.after(bare), CDConfig()).report["loss_rtn"] == rtn(of).report["loss"]


def test_frozen_columns_have_the_scale_of_their_group() -> None:
    of = problem("int4-asym-g16", "int8", n_in=64)
    start = gptq(of)
    first, second = frozen_columns(of, start.parameters)
    assert (first.columns, first.group_size, second.columns, second.group_size) == (48, 16, 16, 16)
    assert torch.equal(first.parameters.scale, start.parameters[0].scale)
    assert first.parameters.zero_point is not None
    assert second.parameters.zero_point is not None


def test_cannot_come_first() -> None:
    with pytest.raises(UsageError, match=r"`cd` improves codes that another method made.*\nhint: --method gptq\+cd"):
        CD().quantize(problem("int4"), CDConfig())


def test_refuses_what_it_cannot_do() -> None:
    of = problem("int4")
    start = rtn(of)
    with pytest.raises(UsageError, match="no Hessian was gathered for `layer`"):
        CD().quantize(replace(of, hessian=None).after(start), CDConfig())
    with pytest.raises(NumericalError, match="the Hessian of `layer` holds NaN or Inf"):
        CD().quantize(replace(of, hessian=of.need_hessian() * torch.nan).after(start), CDConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sweeps": 0}, "`sweeps` is from 1 to 1000, not 0\nhint: --set sweeps=3"),
        ({"dampening_frac": float("nan")}, "`dampening_frac` is from 0 to 10, not nan"),
        ({"relax_every": 1}, "`relax_every` is 0 or at least 2, not 1\nhint: --set relax_every=3"),
        ({"relax_every": 3, "visits": "greedy"}, "hint: --set relax_every=3 --set visits=activation"),
        ({"block_size": 0}, "`block_size` is a number of columns, not 0"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        CDConfig(**options)
    assert message in str(raised.value)
