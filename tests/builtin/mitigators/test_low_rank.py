"""What all low-rank corrections have in common, alone and behind a solver."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from qtool.builtin.formats.integer import Int3, Int4
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.l2qer import L2QER
from qtool.builtin.mitigators.lorc import LoRC, LoRCConfig, stored_adapter
from qtool.builtin.mitigators.qera import QERA
from qtool.builtin.mitigators.qera_approx import QERAApprox
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.engine.problem import LayerProblem, Mitigator
from qtool.errors import NumericalError, UsageError
from qtool.plugins import Plugins
from qtool.scheme import parse_tensor_scheme
from qtool.testing.mitigators import check_mitigator, correlated_problem

PLUGINS = Plugins.discover()
EVERY = pytest.mark.parametrize("method", [LoRC(), L2QER(), QERAApprox(), QERA()])


def problem(seed: int = 0) -> LayerProblem:
    return correlated_problem(Int3(), Int3().defaults, seed=seed, n_out=24, n_in=48)


@EVERY
@pytest.mark.parametrize("text", ["int4-g32", "nvfp4", "int3-asym"])
def test_keeps_the_contract(method: Mitigator, text: str) -> None:
    scheme = parse_tensor_scheme(text, PLUGINS.format)
    check_mitigator(method, PLUGINS.format(scheme.format), LoRCConfig(rank=5), scheme=scheme)


@pytest.mark.parametrize("name", ["lorc", "l2qer", "qera-approx", "qera"])
def test_is_found_by_its_name(name: str) -> None:
    method = PLUGINS.load("mitigators", name)
    assert type(method).__name__.lower() == name.replace("-", "")


@EVERY
def test_first_in_line_it_starts_from_nearest_rounding(method: Mitigator) -> None:
    of = problem()
    result, nearest = method.quantize(of, LoRCConfig(rank=4)), RTN().quantize(of, ClipOptions())
    assert torch.equal(result.codes, nearest.codes)
    assert result.report["loss_before"] == result.report["loss_rtn"] == nearest.report["loss"]
    assert result.report["loss"] < nearest.report["loss"]
    assert result.report["rank"] == 4.0


@EVERY
def test_takes_what_the_method_to_the_left_made(method: Mitigator) -> None:
    of = problem()
    left = GPTQ().quantize(of, GPTQConfig())
    result = method.quantize(of.after(left), LoRCConfig(rank=4))
    assert result.codes is left.codes
    assert result.parameters is left.parameters
    assert result.counters == left.counters
    assert result.report["loss_rtn"] == left.report["loss_rtn"]
    assert result.report["loss_before"] == left.report["loss"] > result.report["loss"]
    assert result.report["dampening_frac"] == 0.01


def test_behind_gptq_the_more_it_knows_the_less_it_loses() -> None:
    losses = dict.fromkeys(("LoRC", "QERAApprox", "QERA"), 0.0)
    for seed in range(6):
        of = problem(seed)
        sizes = torch.logspace(-1.0, 1.0, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(seed))]
        of = replace(of, hessian=of.need_hessian() * torch.outer(sizes, sizes))
        of = of.after(GPTQ().quantize(of, GPTQConfig()))
        for method in (LoRC(), QERAApprox(), QERA()):
            losses[type(method).__name__] += method.quantize(of, LoRCConfig(rank=4)).report["loss"]
    assert losses["QERA"] < 0.9 * losses["QERAApprox"] < 0.9 * losses["LoRC"]


@EVERY
def test_of_full_rank_nothing_but_the_storage_is_lost(method: Mitigator) -> None:
    report = method.quantize(problem(), LoRCConfig(rank=24)).report
    assert report["loss"] < 1e-4 * report["loss_before"]


@EVERY
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_factors_of_8_bits_change_the_loss_by_less_than_a_hundredth(method: Mitigator, rank: int) -> None:
    for seed in range(3):
        of = problem(seed)
        of = of.after(GPTQ().quantize(of, GPTQConfig()))
        wide, narrow = (method.quantize(of, LoRCConfig(rank=rank, dtype=dtype)) for dtype in ("fp16", "int8"))  # type: ignore[arg-type]
        assert narrow.report["loss"] == pytest.approx(wide.report["loss"], rel=0.01)
        adapter = narrow.adapter
        assert wide.adapter is not None
        assert adapter is not None
        assert adapter.down.dtype == adapter.up.dtype == torch.int8
        assert adapter.down_scale is not None
        assert adapter.up_scale is not None
        assert adapter.down_scale.dtype == adapter.up_scale.dtype == torch.float16
        assert adapter.down_scale.shape == adapter.up_scale.shape == (rank,)
        for ours, theirs, scale in zip(
            adapter.factors(torch.float64),
            wide.adapter.factors(torch.float64),
            (adapter.down_scale.unsqueeze(-1), adapter.up_scale),
            strict=True,
        ):
            assert bool(((ours - theirs).abs() <= 0.57 * scale).all())
        rows, columns = adapter.down.double().unbind(), adapter.up.double().unbind(1)
        scales = (adapter.down_scale.double() * adapter.up_scale.double()).tolist()
        product = torch.stack([s * torch.outer(*one) for s, *one in zip(scales, columns, rows, strict=True)]).sum(0)
        torch.testing.assert_close(adapter.product(torch.float64), product, rtol=0, atol=1e-6)


@EVERY
def test_experts_stay_as_they_are_unless_asked(method: Mitigator) -> None:
    of = replace(problem(), expert=True)
    left = GPTQ().quantize(of, GPTQConfig())
    assert method.quantize(of.after(left), LoRCConfig(rank=1000)) is left
    first = method.quantize(of, LoRCConfig(rank=4))
    nearest = RTN().quantize(of, ClipOptions())
    assert first.adapter is None
    assert torch.equal(first.codes, nearest.codes)
    assert first.report == nearest.report
    assert method.quantize(of, LoRCConfig(rank=4, experts=True)).adapter is not None


@EVERY
def test_what_it_reads_is_kept_with_it(method: Mitigator) -> None:
    adapters = [method.quantize(problem(), LoRCConfig(rank=4, reads=reads)).adapter for reads in ("quantized", "full")]  # type: ignore[arg-type]
    assert [one.reads for one in adapters if one is not None] == ["quantized", "full"]


@EVERY
def test_refuses_what_it_cannot_do(method: Mitigator) -> None:
    of = problem()
    with pytest.raises(UsageError, match=r"has no part of rank 32\n  weight  \(24, 48\)\nhint: --set rank=24"):
        method.quantize(of, LoRCConfig())
    corrected = method.quantize(of, LoRCConfig(rank=2))
    with pytest.raises(UsageError, match=r"already has a low-rank correction\nhint: one correction alone"):
        method.quantize(of.after(corrected), LoRCConfig(rank=2))
    huge = replace(of, weight=of.weight * 1e12)
    with pytest.raises(NumericalError, match=r"correction of `layer` overflows fp16\nhint: --set dtype=bf16"):
        method.quantize(huge, LoRCConfig(rank=2, dtype="fp16"))
    with pytest.raises(NumericalError, match=r"correction of `layer` overflows int8\nhint: --set dtype=bf16"):
        method.quantize(replace(of, weight=of.weight * 1e15), LoRCConfig(rank=2, dtype="int8"))
    weight = of.weight.clone()
    weight[1, 2] = float("nan")
    with pytest.raises(NumericalError, match="weight of `layer` holds NaN"):
        method.quantize(replace(of, weight=weight), LoRCConfig(rank=2))


@pytest.mark.parametrize("large", ["up", "down"])
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_either_factor_that_overflows_is_named(dtype: Literal["fp16", "int8"], large: str) -> None:
    config = LoRCConfig(rank=2, dtype=dtype)
    up, down = torch.ones(24, 2), torch.ones(2, 48)
    stored = stored_adapter(problem(), config, (up, down)).product()
    torch.testing.assert_close(stored, torch.full((24, 48), 2.0), rtol=1e-3, atol=0)
    {"up": up, "down": down}[large][1, 1] = 1e9
    with pytest.raises(NumericalError, match=f"correction of `layer` overflows {dtype}"):
        stored_adapter(problem(), config, (up, down))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_factors_are_stored_in_16_bits(method: Mitigator, dtype: torch.dtype) -> None:
    of = correlated_problem(Int4(), Int4().defaults, n_out=20, n_in=32)
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    adapter = method.quantize(of, LoRCConfig(rank=3, dtype=name)).adapter  # type: ignore[arg-type]
    assert adapter is not None
    assert adapter.up.dtype == adapter.down.dtype == dtype
    assert (adapter.up.shape, adapter.down.shape) == ((20, 3), (3, 32))
    # Of one size, so that neither overflows before the other.
    torch.testing.assert_close(adapter.up.float().norm(dim=0), adapter.down.float().norm(dim=1), rtol=1e-2, atol=0)
