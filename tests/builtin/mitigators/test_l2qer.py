"""L²QER: the optimum under the mean magnitudes of the inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.builtin.formats.integer import Int3
from qtool.builtin.mitigators.l2qer import L2QER
from qtool.builtin.mitigators.lorc import LoRC, LoRCConfig
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.engine.problem import LayerProblem
from qtool.errors import NumericalError, UsageError
from qtool.testing.mitigators import correlated_problem
from tests.oracles.lowrank import l2qer_oracle, output_error


def problem(seed: int = 0) -> LayerProblem:
    """Return a layer whose inputs differ in size."""
    of = correlated_problem(Int3(), Int3().defaults, seed=seed, n_out=24, n_in=48)
    sizes = torch.logspace(-1.5, 1.0, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(seed))]
    entries = {"mean_abs": of.entries["mean_abs"] * sizes}
    return replace(of, hessian=of.need_hessian() * torch.outer(sizes, sizes), entries=entries)


def with_magnitudes(of: LayerProblem, mean_abs: Tensor) -> LayerProblem:
    return replace(of, entries={"mean_abs": mean_abs})


def product(method: L2QER | LoRC, of: LayerProblem, rank: int) -> Tensor:
    adapter = method.quantize(of, LoRCConfig(rank=rank)).adapter
    assert adapter is not None
    return adapter.up.double() @ adapter.down.double()


def test_is_the_optimum_under_mean_magnitudes() -> None:
    of = problem()
    mean_abs = of.entries["mean_abs"].double()
    decoded = L2QER().quantize(of, LoRCConfig(rank=6)).weight(of.grid)
    correction = product(L2QER(), of, 6)
    expected, least = l2qer_oracle(of.weight, decoded, mean_abs, 6)
    assert float(((correction - expected) * mean_abs).norm() / (expected * mean_abs).norm()) < 1e-2
    left = output_error(of.weight - decoded - correction, torch.diag(mean_abs.square()))
    assert left / float(mean_abs.min() * mean_abs.max()) == pytest.approx(least, rel=1e-3)


def test_it_does_not_read_the_hessian() -> None:
    of = problem()
    assert L2QER.needs == ("mean_abs",)
    assert torch.equal(product(L2QER(), replace(of, hessian=None), 6), product(L2QER(), of, 6))
    report = L2QER().quantize(replace(of, hessian=None), LoRCConfig(rank=6)).report
    assert report["weight_error"] < report["weight_error_before"] == report["weight_error_rtn"]


def test_inputs_of_one_size_give_lorc() -> None:
    of = with_magnitudes(problem(), torch.full((48,), 0.3))
    ours, plain = product(L2QER(), of, 5), product(LoRC(), of, 5)
    assert float((ours - plain).norm() / plain.norm()) < 2e-3


def test_loses_less_than_lorc_where_inputs_differ_in_size() -> None:
    for seed in range(4):
        of = problem(seed)
        ours, plain = (method.quantize(of, LoRCConfig(rank=6)).report for method in (L2QER(), LoRC()))
        assert ours["loss"] < 0.8 * plain["loss"] < ours["loss_before"]


def test_dead_inputs_weigh_nothing() -> None:
    of = problem()
    mean_abs = of.entries["mean_abs"].clone()
    mean_abs[[3, 40]] = 0.0
    of = replace(with_magnitudes(of, mean_abs), previous=RTN().quantize(of, ClipOptions()))
    weight = of.weight.clone()
    weight[:, [3, 40]] += 10.0
    before, after = product(L2QER(), of, 6), product(L2QER(), replace(of, weight=weight), 6)
    live = [col for col in range(48) if col not in (3, 40)]
    assert float((after - before)[:, live].norm() / before[:, live].norm()) < 1e-2
    assert float((after - before)[:, [3, 40]].norm()) > 1.0


def test_a_statistic_that_is_missing_or_not_finite_is_refused() -> None:
    of = problem()
    with pytest.raises(UsageError, match=r"no `mean_abs` was gathered for `layer`\nhint: .*--gather .*mean_abs"):
        L2QER().quantize(replace(of, entries={}), LoRCConfig(rank=2))
    mean_abs = of.entries["mean_abs"].clone()
    mean_abs[7] = float("inf")
    with pytest.raises(NumericalError, match="`mean_abs` of `layer` holds NaN or Inf"):
        L2QER().quantize(with_magnitudes(of, mean_abs), LoRCConfig(rank=2))
