"""QERA: the theorem's optimum, whatever the rank, the Hessian and the solver to the left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qtool.builtin.formats.integer import Int2, Int3
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.l2qer import L2QER
from qtool.builtin.mitigators.lorc import LoRC, LoRCConfig
from qtool.builtin.mitigators.qera import QERA
from qtool.builtin.mitigators.qera_approx import QERAApprox
from qtool.engine.problem import LayerProblem, Mitigator
from qtool.errors import UsageError
from qtool.testing.mitigators import correlated_problem
from tests.oracles.lowrank import output_error, qera_oracle


def problem(*, seed: int = 0, n_out: int = 24, n_in: int = 48) -> LayerProblem:
    return correlated_problem(Int3(), Int3().defaults, seed=seed, n_out=n_out, n_in=n_in)


@pytest.mark.parametrize("shape", [(24, 48), (48, 24)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 2e-2), ("fp16", 2e-3)])
def test_is_the_optimum_up_to_its_storage(shape: tuple[int, int], dtype: str, tolerance: float) -> None:
    of = problem(n_out=shape[0], n_in=shape[1])
    result = QERA().quantize(of, LoRCConfig(rank=6, dtype=dtype))  # type: ignore[arg-type]
    assert result.adapter is not None
    correction = result.adapter.up.double() @ result.adapter.down.double()
    decoded = result.weight(of.grid)
    expected, least = qera_oracle(of.weight, decoded, of.need_hessian(), 6)
    # As the outputs see it: of directions that no input has, the paper's formula says nothing.
    apart = output_error(correction - expected, of.need_hessian()) / output_error(expected, of.need_hessian())
    assert apart**0.5 < tolerance
    left = output_error(of.weight - decoded - correction, of.need_hessian())
    assert left == pytest.approx(least, rel=10 * tolerance**2 + 1e-4)
    assert result.report["loss"] == pytest.approx(left / output_error(of.weight, of.need_hessian()), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 12, 20])
@pytest.mark.parametrize("other", [LoRC(), L2QER(), QERAApprox()])
def test_no_other_correction_loses_less(other: Mitigator, rank: int) -> None:
    for seed in range(4):
        of = problem(seed=seed)
        for start in (of, of.after(GPTQ().quantize(of, GPTQConfig()))):
            best, theirs = (method.quantize(start, LoRCConfig(rank=rank)) for method in (QERA(), other))
            assert best.report["loss"] < theirs.report["loss"]


def test_the_loss_falls_with_the_rank_to_that_of_the_storage() -> None:
    of = correlated_problem(Int2(), Int2().defaults, n_out=16, n_in=32)
    losses = [QERA().quantize(of, LoRCConfig(rank=rank)).report["loss"] for rank in (1, 4, 8, 12, 15, 16)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 3e-5 < 1e-2 < losses[0]


def test_on_white_inputs_it_is_lorc() -> None:
    of = replace(problem(), hessian=torch.eye(48))
    ours, plain = (method.quantize(of, LoRCConfig(rank=5)) for method in (QERA(), LoRC()))
    assert ours.adapter is not None
    assert plain.adapter is not None
    products = [one.up.float() @ one.down.float() for one in (ours.adapter, plain.adapter)]
    assert float((products[0] - products[1]).norm() / products[1].norm()) < 2e-3
    assert ours.report["loss"] == pytest.approx(plain.report["loss"], rel=1e-4)


def test_dead_inputs_and_few_samples_need_no_floor() -> None:
    of = problem()
    inputs = of.entries["sample"][:10].clone()
    inputs[:, [3, 40]] = 0.0
    of = replace(of, hessian=inputs.T @ inputs / 10)
    result = QERA().quantize(of, LoRCConfig(rank=6))
    assert result.adapter is not None
    error = of.weight - result.weight(of.grid)
    correction = result.adapter.up.float() @ result.adapter.down.float()
    assert bool((correction.norm(dim=0) <= 1.01 * error.norm(dim=0)).all())
    _, least = qera_oracle(of.weight, result.weight(of.grid), of.need_hessian(), 6)
    assert output_error(error - correction, of.need_hessian()) == pytest.approx(least, rel=1e-2)
    assert QERA().quantize(of, LoRCConfig(rank=10)).report["loss"] < 1e-4 * result.report["loss_before"]


def test_without_a_hessian_it_asks_for_one() -> None:
    with pytest.raises(UsageError, match="no Hessian was gathered for `layer`"):
        QERA().quantize(replace(problem(), hessian=None), LoRCConfig(rank=2))
