"""QERA-approx: the optimum under the Hessian's diagonal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qtool.builtin.formats.integer import Int3
from qtool.builtin.mitigators.lorc import LoRC, LoRCConfig
from qtool.builtin.mitigators.qera import QERA
from qtool.builtin.mitigators.qera_approx import QERAApprox
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.engine.problem import LayerProblem
from qtool.errors import UsageError
from qtool.testing.mitigators import correlated_problem
from tests.oracles.lowrank import output_error, qera_approx_oracle


def problem(seed: int = 0) -> LayerProblem:
    """Return a layer whose inputs differ in size."""
    of = correlated_problem(Int3(), Int3().defaults, seed=seed, n_out=24, n_in=48)
    sizes = torch.logspace(-1.5, 1.0, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(seed))]
    return replace(of, hessian=of.need_hessian() * torch.outer(sizes, sizes))


def product(method: QERA | QERAApprox, of: LayerProblem, rank: int) -> torch.Tensor:
    adapter = method.quantize(of, LoRCConfig(rank=rank)).adapter
    assert adapter is not None
    return adapter.up.double() @ adapter.down.double()


def test_is_the_optimum_under_the_diagonal() -> None:
    of = problem()
    decoded = QERAApprox().quantize(of, LoRCConfig(rank=6)).weight(of.grid)
    correction = product(QERAApprox(), of, 6)
    expected, least = qera_approx_oracle(of.weight, decoded, of.need_hessian(), 6)
    scaled = (correction - expected) * of.need_hessian().diagonal().sqrt()
    assert float(scaled.norm() / (expected * of.need_hessian().diagonal().sqrt()).norm()) < 1e-2
    left = output_error(of.weight - decoded - correction, torch.diag(of.need_hessian().diagonal()))
    assert left == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("rank", [2, 7, 24])
def test_on_a_diagonal_hessian_it_is_qera(rank: int) -> None:
    of = problem()
    of = replace(of, hessian=torch.diag(of.need_hessian().diagonal()))
    ours, exact = product(QERAApprox(), of, rank), product(QERA(), of, rank)
    assert float((ours - exact).norm() / exact.norm()) < 2e-3


def test_loses_less_than_lorc_where_inputs_differ_in_size() -> None:
    for seed in range(4):
        of = problem(seed)
        ours, plain = (method.quantize(of, LoRCConfig(rank=6)).report for method in (QERAApprox(), LoRC()))
        assert ours["loss"] < 0.8 * plain["loss"] < ours["loss_before"]


def test_dead_inputs_weigh_nothing() -> None:
    of = problem()
    hessian = of.need_hessian().clone()
    hessian[[3, 40]] = hessian[:, [3, 40]] = 0.0
    of = replace(of, hessian=hessian, previous=RTN().quantize(of, ClipOptions()))
    weight = of.weight.clone()
    weight[:, [3, 40]] += 10.0
    before, after = product(QERAApprox(), of, 6), product(QERAApprox(), replace(of, weight=weight), 6)
    live = [col for col in range(48) if col not in (3, 40)]
    assert float((after - before)[:, live].norm() / before[:, live].norm()) < 1e-2
    assert float((after - before)[:, [3, 40]].norm()) > 1.0


def test_without_a_hessian_it_asks_for_one() -> None:
    with pytest.raises(UsageError, match="no Hessian was gathered for `layer`"):
        QERAApprox().quantize(replace(problem(), hessian=None), LoRCConfig(rank=2))
