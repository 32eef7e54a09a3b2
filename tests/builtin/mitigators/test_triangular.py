"""GPTAQ, FOEM, Qronos and the beam search: what all of them share, and what their papers say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from qtool.builtin.formats.integer import Int3
from qtool.builtin.mitigators.beam import Beam, BeamConfig
from qtool.builtin.mitigators.foem import FOEM, FOEMConfig
from qtool.builtin.mitigators.gptaq import GPTAQ, GPTAQConfig
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.qronos import Qronos
from qtool.builtin.mitigators.rtn import RTN, ClipOptions, round_nearest
from qtool.engine.problem import QuantizedLinear, SiblingMitigator
from qtool.errors import NumericalError, ShapeError, UsageError
from qtool.numerics.losses import relative_loss
from qtool.scheme import TensorScheme
from qtool.testing import check_mitigator
from qtool.testing.mitigators import correlated_problem
from tests.builtin.mitigators.triangular_cases import FORMATS, cross_loss, one_stream, problem, rounded, scheme_of
from tests.oracles.gptq import Order, dampen, visiting_order
from tests.oracles.triangular import beam_oracle, foem_oracle, gptaq_oracle, qronos_oracle

METHODS: dict[str, Any] = {"gptaq": GPTAQ(), "foem": FOEM(), "qronos": Qronos(), "beam": Beam()}
STREAMS = ["gptaq", "qronos"]
GRIDS = [
    ("int3-g16", ""),
    ("int2", ""),
    ("nvfp4", ""),
    ("int4-tensor", ""),
    ("int3-asym-g8", "int8"),
    ("nvfp4", "int4"),
]


def config_of(method: str, **options: Any) -> Any:  # noqa: ANN401 - each method has its own
    return METHODS[method].Config(**options)


def assert_same(ours: QuantizedLinear, theirs: QuantizedLinear) -> None:
    assert torch.equal(ours.codes, theirs.codes)
    for one, other in zip(ours.parameters, theirs.parameters, strict=True):
        assert torch.equal(one.scale, other.scale)
    assert ours.counters == theirs.counters
    assert ours.report["loss"] == pytest.approx(theirs.report["loss"], rel=1e-6)


@pytest.mark.parametrize("text", ["int2", "int4-g16", "nvfp4", "int4-tensor", "fp8"])
@pytest.mark.parametrize("method", METHODS)
def test_keeps_the_promises_of_a_mitigator(method: str, text: str) -> None:
    scheme = scheme_of(text)
    check_mitigator(METHODS[method], FORMATS[scheme.format], scheme=scheme)


@pytest.mark.parametrize("options", [{}, {"parameters": "fresh", "order": "groups"}, {"order": "natural"}])
@pytest.mark.parametrize(("text", "apart"), GRIDS)
@pytest.mark.parametrize(
    ("method", "off"), [("gptaq", {"alpha": 0.0}), ("foem", {"beta": 0.0}), ("beam", {"beams": 1})]
)
def test_switched_off_it_is_gptq(
    method: str, off: dict[str, Any], text: str, apart: str, options: dict[str, Any]
) -> None:
    of = problem(text, apart, n_out=8, n_in=32)
    ours = METHODS[method].quantize(of, config_of(method, **off, **options))
    assert_same(ours, GPTQ().quantize(replace(of, memory={}), GPTQConfig(**options)))


@pytest.mark.parametrize("dampening_frac", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize(("text", "apart"), [("int3-g16", ""), ("nvfp4", "int4")])
@pytest.mark.parametrize("method", STREAMS)
def test_where_both_streams_are_the_same_it_is_gptq(
    method: str, text: str, apart: str, dead: bool, dampening_frac: float
) -> None:
    of = one_stream(problem(text, apart, dead=dead, n_out=8, n_in=32))
    ours = METHODS[method].quantize(of, config_of(method, dampening_frac=dampening_frac))
    assert_same(ours, GPTQ().quantize(replace(of, memory={}), GPTQConfig(dampening_frac=dampening_frac)))
    assert ours.report["loss_cross"] == pytest.approx(ours.report["loss"])
    other = METHODS[method].quantize(problem(text, apart, dead=dead, n_out=8, n_in=32), config_of(method))
    assert not torch.equal(other.codes, ours.codes)


@pytest.mark.parametrize("damping", [0.01, 0.5])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize(("text", "apart"), GRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_oracle_on_the_scales_that_it_chose(
    method: str, text: str, apart: str, order: Order, dead: bool, damping: float
) -> None:
    of = problem(text, apart, dead=dead, n_out=3, n_in=32)
    own = {"gptaq": {"alpha": 0.7}, "foem": {"beta": 0.6}, "qronos": {}, "beam": {"beams": 3}}[method]
    shared: dict[str, Any] = {"order": order, "block_size": 12, "dampening_frac": damping}
    result = METHODS[method].quantize(of, config_of(method, **shared, **own))
    weight, damped = dampen(of.weight, of.need_hessian(), damping)
    visits = visiting_order(damped, order)
    cross = of.entries["cross"]
    if method == "gptaq":
        expected = gptaq_oracle(
            weight, damped, cross - of.need_hessian(), rounded=rounded(of, result), order=visits, alpha=0.7
        )
    elif method == "foem":
        expected = foem_oracle(weight, damped, rounded=rounded(of, result), order=visits, beta=0.6)
    elif method == "qronos":
        # What inputs that are dead in one stream do in the other is reckoned with; their own weights become 0.
        gone = of.need_hessian().diagonal() == 0
        alive = of.need_hessian() + torch.diag(gone.double())
        nearest = rounded(of, result)
        expected = qronos_oracle(
            of.weight,
            alive,
            cross,
            damping=damping * float(alive.diagonal().mean()),
            rounded=lambda col, current: nearest(col, torch.zeros_like(current) if gone[col] else current),
            order=visits,
        )
    else:
        expected = result.weight(of.grid).double()
        levels = _levels(of, result)
        start = GPTQ().quantize(replace(of, memory={}), GPTQConfig(**shared))
        for row in range(3):
            searched, loss = beam_oracle(
                weight[row], damped, levels=[table[row] for table in levels], order=visits, beams=3
            )
            off = weight[row] - start.weight(of.grid)[row].double()
            if loss < float(off @ damped @ off) * (1 - 1e-9):
                expected[row] = searched
            else:
                expected[row] = start.weight(of.grid)[row].double()
    torch.testing.assert_close(result.weight(of.grid).double(), expected, rtol=1e-6, atol=1e-9)
    assert result.counters["dead_columns"] == (2 if dead else 0)


def _levels(of: Any, result: QuantizedLinear) -> list[torch.Tensor]:  # noqa: ANN401
    """All values of each column, by decoding every code."""
    found = []
    n_out = len(of.weight)
    for (columns, part), own in zip(of.grid.places(of.weight.shape[1]), result.parameters, strict=True):
        every = torch.arange(2**part.format.bits, dtype=torch.uint8)
        table = part.format.decode(every.expand(*own.scale.shape, -1), own).double()
        table = table.reshape(-1, own.scale.shape[-1], len(every)).expand(n_out, -1, -1)
        size = part.scheme.group_size or columns.stop - columns.start
        found += [table[:, col // size] for col in range(columns.stop - columns.start)]
    return found


@pytest.mark.parametrize("options", [{"parameters": "fresh", "order": "groups"}, {}])
@pytest.mark.parametrize("text", ["int3-g16", "nvfp4"])
@pytest.mark.parametrize("method", METHODS)
def test_the_block_size_does_not_matter(method: str, text: str, options: dict[str, Any]) -> None:
    of = problem(text, n_out=8)
    codes = [
        METHODS[method].quantize(of, config_of(method, block_size=size, **options)).codes for size in (1, 24, 40, 128)
    ]
    assert all(torch.equal(codes[0], other) for other in codes[1:])


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize(("text", "apart"), [("int4-g16", ""), ("int4-tensor", ""), ("nvfp4", "int8")])
@pytest.mark.parametrize("method", METHODS)
def test_siblings_get_what_each_gets_alone(method: str, text: str, apart: str, bad: bool) -> None:
    one = problem(text, apart, wide=True)
    shared = one.grid.global_scales(torch.full((64,), 5.0))
    memory: dict[Any, Any] = {}
    siblings = [
        replace(one, name=str(n), weight=size * one.weight[n : 3 * n], global_scales=shared, memory=memory)
        for n, size in ((3, 1.0), (7, 0.5))
    ]
    if bad:
        siblings = [replace(sibling, hessian=torch.zeros(64, 64).double()) for sibling in siblings]
    solver = METHODS[method]
    assert isinstance(solver, SiblingMitigator)
    together = solver.quantize_siblings(siblings, config_of(method))
    for sibling, result in zip(siblings, together, strict=True):
        alone = solver.quantize(replace(sibling, memory={}), config_of(method))
        assert_same(result, alone)
        assert result.report == pytest.approx(alone.report, rel=1e-5)
        assert result.counters["fallback_rtn"] == int(bad)
        for own, multiplier in zip(result.parameters, shared, strict=True):
            assert (own.global_scale is None) == (multiplier is None)
            assert multiplier is None or own.global_scale == multiplier
    again = solver.quantize_siblings(siblings, config_of(method))
    assert all(torch.equal(first.codes, second.codes) for first, second in zip(together, again, strict=True))


@pytest.mark.parametrize("text", ["int2", "int4-g16", "nvfp4"])
def test_what_looks_at_both_streams_is_nearer_to_full_precision(text: str) -> None:
    totals: dict[str, float] = {}
    for seed in range(5):
        of = problem(text, seed=seed)
        found = {
            "gptq": GPTQ().quantize(of, GPTQConfig()),
            "gptaq": GPTAQ().quantize(of, GPTAQConfig()),
            "qronos": Qronos().quantize(of, GPTQConfig()),
        }
        for name, result in found.items():
            measured = cross_loss(of, result.weight(of.grid))
            totals[name] = totals.get(name, 0.0) + measured
            if name != "gptq":
                assert result.report["loss_cross"] == pytest.approx(measured, rel=1e-3, abs=1e-6)
                nearest = cross_loss(of, round_nearest(of).weight(of.grid))
                assert result.report["loss_cross_rtn"] == pytest.approx(nearest, rel=1e-3, abs=1e-6)
                totals["rtn"] = totals.get("rtn", 0.0) + nearest / 2
    assert totals["qronos"] < totals["gptaq"] < totals["gptq"] < totals["rtn"]


@pytest.mark.parametrize("text", ["int2", "int4-g16", "nvfp4", "int4-tensor"])
def test_foem_and_the_search_beat_nearest_rounding_and_the_search_gptq(text: str) -> None:
    totals = dict.fromkeys(("rtn", "gptq", "foem", "beam"), 0.0)
    for seed in range(6):
        of = problem(text, seed=seed, wide=False)
        plain = GPTQ().quantize(of, GPTQConfig())
        searched, first_order = Beam().quantize(of, BeamConfig()), FOEM().quantize(of, FOEMConfig())
        for result in (searched, first_order):
            measured = relative_loss(of.weight, result.weight(of.grid), of.hessian)
            assert result.report["loss"] == pytest.approx(measured, rel=1e-3)
        for name, result in (("gptq", plain), ("foem", first_order), ("beam", searched)):
            totals[name] += result.report["loss"]
        totals["rtn"] += plain.report["loss_rtn"]
        _, damped = dampen(of.weight, of.need_hessian(), 0.01)
        before, after = (of.weight.double() - one.weight(of.grid).double() for one in (plain, searched))
        rows = [((off @ damped) * off).sum(1) for off in (before, after)]
        assert bool((rows[1] <= rows[0] * (1 + 1e-5)).all())
        changed = (plain.codes != searched.codes).any(1)
        assert searched.report["improved_rows"] == pytest.approx(float(changed.double().mean()))
    assert totals["beam"] < 0.95 * totals["gptq"]
    assert totals["foem"] < totals["rtn"]
    assert totals["foem"] != totals["gptq"]


@pytest.mark.parametrize("method", METHODS)
def test_falls_back_to_nearest_rounding_and_counts_it(method: str) -> None:
    of = replace(problem("int4-g16", wide=False), hessian=torch.zeros(64, 64))
    result = METHODS[method].quantize(of, config_of(method, clip="none"))
    assert torch.equal(result.codes, RTN().quantize(of, ClipOptions()).codes)
    assert result.counters["fallback_rtn"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_the_unit_of_the_inputs_does_not_matter(method: str) -> None:
    of = problem("int4-g16", dead=True, wide=False)
    small = {name: of.entries[name] * 2.0**-30 for name in ("hessian", "cross")}
    other = replace(of, hessian=small["hessian"], entries={**of.entries, **small}, memory={})
    one, two = (METHODS[method].quantize(each, config_of(method)) for each in (of, other))
    assert torch.equal(one.codes, two.codes)
    assert one.report == pytest.approx(two.report)


@pytest.mark.parametrize("method", STREAMS)
def test_without_a_good_cross_moment_it_refuses(method: str) -> None:
    of = problem("int4", wide=False)
    assert METHODS[method].needs == ("hessian", "cross")
    solve = METHODS[method].quantize
    without = {name: entry for name, entry in of.entries.items() if name != "cross"}
    with pytest.raises(UsageError, match=r"no `cross` was gathered for `layer`.*\nhint: --method gptq"):
        solve(replace(of, entries=without), config_of(method))
    with pytest.raises(NumericalError, match="`cross` of `layer` holds NaN or Inf"):
        solve(replace(of, entries={**without, "cross": torch.full((64, 64), torch.nan)}), config_of(method))
    with pytest.raises(ShapeError, match="`cross` of `layer` does not fit its Hessian"):
        solve(replace(of, entries={**without, "cross": torch.eye(63)}), config_of(method))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_made_before_is_thrown_away(method: str) -> None:
    of = problem("int4", wide=False)
    with pytest.raises(UsageError, match=rf"`{method}` starts from the weight.*\nhint: --method {method}\+…"):
        METHODS[method].quantize(of.after(round_nearest(of)), config_of(method))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (GPTAQConfig, {"alpha": 1.5}, "`alpha` is from 0 to 1, not 1.5\nhint: --set alpha=0.25"),
        (GPTAQConfig, {"dampening_frac": -1.0}, "`dampening_frac` is from 0 to 10"),
        (FOEMConfig, {"beta": -0.1}, "`beta` is from 0 to 1, not -0.1\nhint: --set beta=0.2"),
        (FOEMConfig, {"beta": float("nan")}, "`beta` is from 0 to 1, not nan"),
        (BeamConfig, {"beams": 0}, "`beams` is from 1 to 256, not 0\nhint: --set beams=4"),
        (BeamConfig, {"parameters": "fresh"}, "so it cannot fit fresh parameters"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(config: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        config(**options)
    assert message in str(raised.value)


def test_beam_does_not_mind_the_sign_of_a_scale() -> None:
    """Of the negative weight the scales are negative, and the codes the same."""
    scheme = TensorScheme("int3", strategy="group", group_size=8, range_rule="signed_full")
    of = correlated_problem(Int3(), scheme, seed=5, n_out=12, n_in=32)
    found, mirrored = (Beam().quantize(one, BeamConfig()) for one in (of, replace(of, weight=-of.weight, memory={})))
    assert torch.equal(found.parameters[0].scale, -mirrored.parameters[0].scale)
    assert torch.equal(found.codes, mirrored.codes)
    assert found.report["improved_rows"] > 0
