from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from qtool.builtin.formats.fp4 import NVFP4
from qtool.builtin.formats.integer import Int2, Int3, Int4, Int8
from qtool.builtin.formats.presets import PRESETS
from qtool.builtin.mitigators.cd import CD, CDConfig
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.lorc import LoRC, LoRCConfig
from qtool.builtin.mitigators.qera import QERA
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.builtin.mitigators.spqr import SpQR, SpQRConfig
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.engine.stored import linear_tensors, read_linear
from qtool.errors import NumericalError, UsageError
from qtool.model.plan import Segment
from qtool.numerics.losses import relative_loss
from qtool.scheme import Format, GroupParameters, parse_tensor_scheme
from qtool.testing import check_mitigator
from qtool.testing.mitigators import correlated_problem
from tests.oracles.spqr import SpQROptions, spqr_oracle

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (Int2(), Int3(), Int4(), Int8(), NVFP4())}
PLAIN = SpQRConfig(tau=None, dampening_frac=0.01)
LOW = SpQRConfig(tau=0.05)


def problem(text: str, apart: str = "", **options: Any) -> LayerProblem:  # noqa: ANN401 - of `correlated_problem`
    """A correlated layer, with its last 16 channels in the format `apart` if there is one."""
    scheme = parse_tensor_scheme(text, FORMATS.__getitem__)
    of = correlated_problem(FORMATS[scheme.format], scheme, **options)
    if not apart:
        return of
    grid = Grid.segmented(scheme, [Segment(16, apart)], FORMATS.__getitem__)
    return replace(of, grid=grid, global_scales=(None, None))


def spqr(of: LayerProblem, config: SpQRConfig = LOW) -> QuantizedLinear:
    return SpQR().quantize(of, config)


def places(result: QuantizedLinear) -> torch.Tensor:
    assert result.outliers is not None
    return result.outliers.places(result.codes.shape[1])


def damped(of: LayerProblem, dampening_frac: float) -> torch.Tensor:
    hessian = of.need_hessian().double()
    return hessian + dampening_frac * hessian.diagonal().mean() * torch.eye(len(hessian))


@pytest.mark.parametrize("text", ["int2-asym-g16-real", "int4-asym-g16-scales3g16", "int3-asym-channel-scales8g4"])
@pytest.mark.parametrize("config", [SpQRConfig(), PLAIN])
def test_keeps_the_promises_of_a_mitigator(text: str, config: SpQRConfig) -> None:
    scheme = parse_tensor_scheme(text, FORMATS.__getitem__)
    check_mitigator(SpQR(), FORMATS[scheme.format], config, scheme=scheme)


@pytest.mark.parametrize(
    ("text", "bits", "dampening_frac"),
    [
        ("int3-asym-g8-sfp16-scales3g16", 3, 1.0),
        ("int2-asym-g8-sfp16-scales3g16", 2, 0.01),
        ("int3-asym-g8-real-sfp32", 3, 0.01),
    ],
)
def test_equals_the_paper_weight_by_weight(text: str, bits: int, dampening_frac: float) -> None:
    of = problem(text, n_out=20, n_in=32)
    found = spqr(of, SpQRConfig(tau=0.1, dampening_frac=dampening_frac))
    options = SpQROptions(bits, 8, 0.1, second_bits=3 if "scales" in text else 0)
    expected = spqr_oracle(of.weight, damped(of, dampening_frac), options)
    assert expected.outliers.any()
    assert torch.equal(places(found), expected.outliers)
    torch.testing.assert_close(found.weight(of.grid).double(), expected.weight, rtol=2e-3, atol=2e-4)
    assert found.report["outlier_fraction"] == pytest.approx(float(expected.outliers.double().mean()))


def test_lower_thresholds_keep_more() -> None:
    of = problem("int2-asym-g16-sfp16-scales3g16")
    results = [spqr(of, SpQRConfig(tau=tau, dampening_frac=0.01)) for tau in (None, 3.0, 0.3, 0.1, 0.03)]
    shares = [result.report["outlier_fraction"] for result in results]
    assert shares == sorted(set(shares))
    assert shares[0] == 0.0
    losses = [result.report["loss"] for result in results]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("config", [LOW, PLAIN])
@pytest.mark.parametrize(
    ("text", "apart"),
    [("int3-asym-g16-real", ""), ("int3-asym-g16-scales3g16", ""), ("int4-asym-g16-sfp16-scales3g16", "int8")],
)
@pytest.mark.parametrize("n_out", [32, 37])
def test_what_is_stored_decodes_to_the_same_bits(text: str, apart: str, config: SpQRConfig, n_out: int) -> None:
    of = problem(text, apart, n_out=n_out)
    found = spqr(of, config)
    tensors = linear_tensors("linear", found, of.grid)
    again = read_linear("linear", 64, tensors, of.grid)
    assert torch.equal(again.weight(of.grid), found.weight(of.grid))
    assert torch.equal(again.codes, found.codes)
    second = linear_tensors("linear", again, of.grid)
    assert second.keys() == tensors.keys()
    assert all(torch.equal(second[name], tensors[name]) for name in tensors)
    if config.tau is not None:
        decoded, kept = found.weight(of.grid), places(found)
        assert kept.any()
        assert torch.equal(decoded[kept], decoded[kept].half().float())
        assert tensors["linear.outliers.col"].dtype == torch.uint16


def test_the_bytes_are_those_of_the_papers_formula() -> None:
    of = problem("int3-asym-g16-sfp16-scales3g16", n_out=64, n_in=64)
    found = spqr(of, SpQRConfig(tau=0.1))
    tensors = linear_tensors("linear", found, of.grid)
    bits = 8 * sum(tensor.nbytes for tensor in tensors.values()) / of.weight.numel()
    expected = 3 + (3 + 3) / 16 + 2 * (16 + 16) / (16 * 16) + 32 * found.report["outlier_fraction"]
    headers = 8 * 4 * 65 / of.weight.numel()  # where rows begin
    assert bits == pytest.approx(expected + headers, abs=1e-12)


def test_wide_layers_have_wide_columns() -> None:
    of = problem("int3-asym-g16-real-sfp32", n_out=4, n_in=16)
    found = spqr(of)
    assert found.outliers is not None
    wide = replace(found, codes=torch.zeros(4, 1 << 17, dtype=torch.uint8))
    wide = replace(wide, parameters=(GroupParameters(torch.ones(4, 1 << 13), torch.zeros(4, 1 << 13)),))
    col = found.outliers.col.clone()
    col[-1] = (1 << 17) - 1
    tensors = linear_tensors("linear", replace(wide, outliers=replace(found.outliers, col=col)), of.grid)
    again = read_linear("linear", 1 << 17, tensors, of.grid)
    assert again.outliers is not None
    assert torch.equal(again.outliers.col, col)


@pytest.mark.parametrize("text", ["int2-asym-g16-sfp16-scales3g16", "int2-asym-g16-real"])
def test_coordinate_descent_keeps_outliers_and_improves_the_rest(text: str) -> None:
    of = problem(text)
    start = spqr(of)
    improved = CD().quantize(of.after(start), CDConfig(dampening_frac=0.0, sweeps=50))
    assert improved.outliers is start.outliers
    kept, before, after = places(start), start.weight(of.grid), improved.weight(of.grid)
    assert torch.equal(after[kept], before[kept])
    assert torch.equal(improved.codes[kept], start.codes[kept])
    assert improved.report["loss"] < start.report["loss"]
    assert improved.report["loss"] == pytest.approx(relative_loss(of.weight, after, of.hessian), rel=1e-3)
    part, own, hessian = of.grid.parts[0], start.parameters[0], of.need_hessian().double()
    levels = torch.stack([part.format.decode(torch.full((32, 4, 16), c, dtype=torch.uint8), own) for c in range(4)])
    slopes = (of.weight - after).double() @ hessian / hessian.diagonal()
    gaps = (levels.reshape(4, 32, 64) - after - slopes).abs().amin(0)
    assert (slopes.abs() <= gaps + 1e-5)[~kept].all(), "no other code is nearer to the optimum of its weight"


@pytest.mark.parametrize("correction", [LoRC(), QERA()])
def test_low_rank_corrections_see_outliers_as_they_are(correction: LoRC | QERA) -> None:
    of = problem("int2-asym-g16-sfp16-scales3g16")
    start = spqr(of)
    found = correction.quantize(of.after(start), LoRCConfig(rank=8))
    assert found.outliers is start.outliers
    assert found.adapter is not None
    stands = found.weight(of.grid) + found.adapter.up.float() @ found.adapter.down.float()
    assert found.report["loss_before"] == pytest.approx(start.report["loss"], rel=1e-4)
    assert found.report["loss"] == pytest.approx(relative_loss(of.weight, stands, of.hessian), rel=1e-3)
    error = of.weight - start.weight(of.grid)
    assert (error - found.adapter.up.float() @ found.adapter.down.float()).norm() < error.norm()


def test_the_unit_of_inputs_and_dead_ones_do_not_matter() -> None:
    of = problem("int3-asym-g16-sfp16-scales3g16")
    hessian = of.need_hessian().clone()
    hessian[[5, 9]] = 0
    hessian[:, [5, 9]] = 0
    one, other = (spqr(replace(of, hessian=hessian * unit, memory={})) for unit in (1.0, 2.0**-90))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(places(one), places(other))
    assert one.counters["dead_columns"] == 2
    changed = of.weight.clone()
    changed[:, [5, 9]] += 7.0
    again = spqr(replace(of, weight=changed, hessian=hessian, memory={}))
    assert torch.equal(one.codes, again.codes)


def test_the_factor_is_shared_by_siblings() -> None:
    of = problem("int3-asym-g16-sfp16-scales3g16")
    first = spqr(of)
    assert list(of.memory) == [("spqr", 1.0)]
    poisoned = replace(of, hessian=torch.eye(64))
    assert torch.equal(spqr(poisoned).codes, first.codes)


def test_a_hessian_that_says_nothing_is_counted() -> None:
    of = replace(problem("int4-asym-g16-real"), hessian=torch.zeros(64, 64))
    found = spqr(of)
    assert found.counters["fallback_rtn"] == 1
    assert torch.equal(found.codes, RTN().quantize(of, ClipOptions()).codes)
    assert found.outliers is None


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("int3-asym-g8", "int3-asym-g8-sfp16-scales3g16"),
        ("int4-g16", "int4-asym-g16-sfp16-scales3g16"),
        ("int4-g16-scales3g16", "int4-asym-g16-sfp16-scales3g16"),
        ("int4-asym-tensor-real", "int4-asym-g16-sfp16-scales3g16"),
        ("int4-asym-g16-offset", "int4-asym-g16-sfp16-scales3g16"),
        ("nvfp4", "int4-asym-g16-sfp16-scales3g16"),
        ("int4-asym-g16-real-c0.9", "int4-asym-g16-sfp16-scales3g16"),
    ],
)
def test_other_schemes_are_refused(text: str, nearest: str) -> None:
    with pytest.raises(UsageError, match="asymmetric integers with real zero points") as refused:
        spqr(problem(text))
    assert refused.value.hint.startswith(f"--weights {nearest}, as published, or ")
    first, second = re.findall(r"int\S+-(?:scales3g16|real)", refused.value.hint)
    assert first == nearest
    assert spqr(problem(second)).codes.shape == spqr(problem(first)).codes.shape


def test_the_schemes_named_after_it_are_the_papers() -> None:
    for preset in (one for one in PRESETS if one.name.startswith("SPQR")):
        assert preset.weights is not None
        assert spqr(problem(preset.weights)).report["outlier_fraction"] > 0
        scheme = parse_tensor_scheme(preset.weights, FORMATS.__getitem__)
        assert (scheme.group_size, scheme.scale, scheme.scale_bits, scheme.scale_rows) == (16, "fp16", 3, 16)


@pytest.mark.parametrize("text", ["int3-asym-g16-sfp16-scales3g16", "int2-asym-g8-scales4g5", "int4-asym-channel-real"])
@pytest.mark.parametrize("dampening_frac", [0.01, 1.0])
def test_without_outliers_it_is_gptq_on_the_same_scheme(text: str, dampening_frac: float) -> None:
    of = problem(text, n_out=37)
    found = spqr(of, SpQRConfig(tau=None, dampening_frac=dampening_frac))
    same = GPTQConfig(dampening_frac=dampening_frac, parameters="fresh", order="natural", clip="none")
    expected = GPTQ().quantize(replace(of, memory={}), same)
    ours, theirs = (linear_tensors("one", one, of.grid) for one in (found, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_refuses_what_it_cannot_do() -> None:
    of = problem("int4-asym-g16-sfp16-scales3g16")
    with pytest.raises(UsageError, match="`spqr` starts from the weight"):
        spqr(of.after(spqr(of)))
    with pytest.raises(UsageError, match="no Hessian was gathered"):
        spqr(replace(of, hessian=None))
    with pytest.raises(NumericalError, match="the Hessian of `layer` holds NaN or Inf"):
        spqr(replace(of, hessian=of.need_hessian() * torch.nan))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "`tau` is above 0, or `none` for no outliers, not 0.0\nhint: --set tau=0.2"),
        ({"tau": float("inf")}, "`tau` is above 0"),
        ({"dampening_frac": float("nan")}, "`dampening_frac` is from 0 to 10, not nan"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        SpQRConfig(**options)
    assert message in str(raised.value)
