"""The oracles hold among themselves, so that they can be trusted elsewhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from .gptq import Order, Params, dampen, gptq_oracle
from .hadamard import is_hadamard, sylvester_oracle
from .ldlq import ldlq_oracle, unit_upper_ldl
from .lowrank import lorc_oracle, matrix_root, output_error, qera_oracle, weighted_oracle
from .protocol import kl_divergence_oracle, perplexity_oracle, top1_agreement_oracle, window_losses_oracle
from .rounding import Grid, int_grid, mxfp4_grid, nvfp4_grid

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

N_OUT, N_IN, GROUP = 5, 24, 8


def problem(seed: int, n_in: int = N_IN) -> tuple[Tensor, Tensor]:
    """Return a weight and the Hessian of inputs that share a few directions and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_in, n_in // 3, generator=generator, dtype=torch.float64)
    hidden = torch.randn(n_in // 3, 4 * n_in, generator=generator, dtype=torch.float64)
    noise = torch.randn(n_in, 4 * n_in, generator=generator, dtype=torch.float64)
    sizes = torch.linspace(0.5, 2.0, n_in, dtype=torch.float64)[torch.randperm(n_in, generator=generator)]
    inputs = sizes[:, None] * (mixing @ hidden + 0.5 * noise)
    weight = torch.randn(N_OUT, n_in, generator=generator, dtype=torch.float64)
    return weight, inputs @ inputs.T / inputs.shape[1]


def with_dead_columns(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Zero two inputs."""
    hessian = hessian.clone()
    for col in (0, 9):
        hessian[col, :] = 0
        hessian[:, col] = 0
    return weight, hessian


def shrunk(grid: Grid, ratio: float) -> Grid:
    """Shrink every range, so that values clip."""

    def fit(group: Tensor) -> tuple[Tensor, Tensor | None]:
        return grid.fit(group * ratio)

    return Grid(fit, grid.encode, grid.decode)


def round_nearest(weight: Tensor, grid: Grid, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the codes and values of rounding each weight on its own."""
    codes, values = torch.zeros_like(weight, dtype=torch.long), torch.zeros_like(weight)
    for col in range(weight.shape[1]):
        start = col // group_size * group_size
        scale, zero = grid.fit(weight[:, start : start + group_size])
        codes[:, col] = grid.encode(weight[:, col], scale, zero)
        values[:, col] = grid.decode(codes[:, col], scale, zero)
    return codes, values


def row_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """Return the diagonal of ``E H E.T``."""
    return torch.stack([row @ hessian @ row for row in error])


GRIDS = {
    "int4-asym": int_grid(4, "asym"),
    "int3-half": int_grid(3, "half", "float16"),
    "int2-clipped": shrunk(int_grid(2, "full"), 0.4),
    "int4-wide": shrunk(int_grid(8, "full"), 16.0),
    "mxfp4": mxfp4_grid("even"),
    "nvfp4": nvfp4_grid(2.0**-9),
}


# --- GPTQ and LDLQ ---


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("params", ["fresh", "static", "stale", "activation"])
@pytest.mark.parametrize("name", ["int4-asym", "int2-clipped"])
def test_gptq_loss_is_the_quadratic_model(name: str, params: str, dead: bool) -> None:
    weight, hessian = problem(1)
    if dead:
        weight, hessian = with_dead_columns(weight, hessian)
    before = weight.clone(), hessian.clone()
    order: Order = "activation" if params == "activation" else "natural"
    kind: Params = "stale" if params == "stale" else "static" if params == "static" else "fresh"
    grid = GRIDS[name]
    codes, values, loss, scales, zeros = gptq_oracle(
        weight, hessian, **grid._asdict(), group_size=GROUP, params=kind, block_size=12, order=order
    )
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    original, damped = dampen(weight, hessian, 0.01)
    torch.testing.assert_close(loss, row_losses(original - values, damped), rtol=1e-10, atol=0)
    for col in range(N_IN):
        zero = None if zeros is None else zeros[:, col // GROUP]
        assert torch.equal(grid.decode(codes[:, col], scales[:, col // GROUP], zero), values[:, col])


def test_dampen_adds_a_fraction_of_the_mean_after_the_dead_fix() -> None:
    weight, damped = dampen(torch.ones(1, 3), torch.diag(torch.tensor([0.0, 2.0, 6.0])), 0.1)
    assert weight.tolist() == [[0.0, 1.0, 1.0]]
    torch.testing.assert_close(damped.diagonal(), torch.tensor([1.3, 2.3, 6.3], dtype=torch.float64))


@pytest.mark.parametrize("order", ["natural", "activation", "groups"])
@pytest.mark.parametrize("params", ["fresh", "static", "stale"])
@pytest.mark.parametrize("name", GRIDS)
def test_diagonal_hessian_gives_nearest_rounding(name: str, params: Params, order: Order) -> None:
    weight, hessian = problem(2)
    nearest, values = round_nearest(weight, GRIDS[name], GROUP)
    result = gptq_oracle(
        weight,
        torch.diag(hessian.diagonal()),
        **GRIDS[name]._asdict(),
        group_size=GROUP,
        params=params,
        order=order,
    )
    assert torch.equal(result[0], nearest)
    assert torch.equal(result[1], values)


@pytest.mark.parametrize("order", ["natural", "activation", "groups"])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_ldlq_equals_gptq(name: str, dead: bool, order: Order) -> None:
    weight, hessian = problem(10)
    if dead:
        weight, hessian = with_dead_columns(weight, hessian)
    grid = GRIDS[name]._asdict()
    gptq = gptq_oracle(weight, hessian, **grid, group_size=GROUP, params="static", order=order)
    ldlq = ldlq_oracle(weight, hessian, **grid, group_size=GROUP, order=order)
    assert torch.equal(gptq[0], ldlq[0])
    assert torch.equal(gptq[1], ldlq[1])
    torch.testing.assert_close(gptq[2], ldlq[2], rtol=1e-10, atol=0)
    assert torch.equal(gptq[3], ldlq[3])
    assert (gptq[4] is None) == (ldlq[4] is None)


@pytest.mark.parametrize("name", ["int4-asym", "int2-clipped"])
def test_every_column_rounds_the_conditional_optimum(name: str) -> None:
    """Given the columns rounded so far, the rest of the weight solves its normal equations."""
    weight, hessian = problem(3)
    grid = GRIDS[name]
    codes, values, _, _, _ = gptq_oracle(weight, hessian, **grid._asdict(), group_size=GROUP)
    _, damped = dampen(weight, hessian, 0.01)
    scale, zero = grid.fit(weight[:, :GROUP])
    for col in range(N_IN):
        done = weight[:, :col] - values[:, :col]
        moved = torch.linalg.solve(damped[col:, col:], damped[col:, :col] @ done.T).T
        optimum = weight[:, col:] + moved
        if col % GROUP == 0:
            scale, zero = grid.fit(optimum[:, :GROUP])
        assert torch.equal(codes[:, col], grid.encode(optimum[:, 0], scale, zero))


def test_activation_order_is_gptq_on_permuted_columns() -> None:
    weight, hessian = problem(4)
    grid = int_grid(3, "full")
    ordered = gptq_oracle(weight, hessian, **grid._asdict(), group_size=N_IN, order="activation")
    order = torch.argsort(hessian.diagonal(), descending=True)
    permuted = gptq_oracle(weight[:, order], hessian[order][:, order], **grid._asdict(), group_size=N_IN)
    natural = gptq_oracle(weight, hessian, **grid._asdict(), group_size=N_IN)
    assert torch.equal(ordered[0][:, order], permuted[0])
    assert not torch.equal(ordered[0], natural[0])


def test_stale_lies_between_fresh_and_static() -> None:
    weight, hessian = problem(5)
    grid = int_grid(3, "asym")

    def scales(params: Params, block_size: int = 128) -> Tensor:
        result = gptq_oracle(weight, hessian, **grid._asdict(), group_size=GROUP, params=params, block_size=block_size)
        return result[3]

    assert torch.equal(scales("stale", GROUP), scales("fresh"))
    assert torch.equal(scales("stale", N_IN), scales("static"))
    partly = scales("stale", 2 * GROUP)
    assert torch.equal(partly[:, 1], scales("static")[:, 1])
    assert not torch.equal(partly[:, 2], scales("static")[:, 2])
    assert not torch.equal(scales("fresh")[:, 1:], scales("static")[:, 1:])


@pytest.mark.parametrize("name", ["int4-asym", "int3-half", "nvfp4"])
def test_gptq_beats_nearest_rounding_on_correlated_inputs(name: str) -> None:
    solved = nearest = 0.0
    for seed in range(20):
        weight, hessian = problem(100 + seed)
        values = gptq_oracle(weight, hessian, **GRIDS[name]._asdict(), group_size=GROUP)[1]
        ours = output_error(weight - values, hessian)
        theirs = output_error(weight - round_nearest(weight, GRIDS[name], GROUP)[1], hessian)
        solved, nearest = solved + ours, nearest + theirs
    assert solved < 0.5 * nearest


def test_unclipped_loss_stays_under_the_lattice_bound() -> None:
    """No clipping: each row loses at most ``s^2 / 4`` times the sum of the LDL pivots (arXiv:2507.18553)."""
    weight, hessian = problem(6)
    _, _, loss, scales, _ = gptq_oracle(
        weight, hessian, **GRIDS["int4-wide"]._asdict(), group_size=N_IN, params="static"
    )
    _, pivots = unit_upper_ldl(dampen(weight, hessian, 0.01)[1])
    bound = scales[:, 0] ** 2 / 4 * pivots.sum()
    assert (loss <= bound).all()
    assert (loss > bound / 20).all()


def test_unit_upper_ldl_rebuilds_the_hessian() -> None:
    _, hessian = problem(7)
    feedback, pivots = unit_upper_ldl(hessian)
    unit = feedback + torch.eye(N_IN, dtype=torch.float64)
    torch.testing.assert_close(unit @ torch.diag(pivots) @ unit.T, hessian, rtol=1e-12, atol=1e-12)
    assert torch.equal(feedback, feedback.triu(1))


def test_solvers_refuse_an_indefinite_hessian() -> None:
    hessian = torch.diag(torch.tensor([1.0, -1.0]))
    grid = int_grid(4, "full")._asdict()
    with pytest.raises(ArithmeticError, match="pivot"):
        gptq_oracle(torch.ones(1, 2), hessian, **grid, group_size=2)
    with pytest.raises(ArithmeticError, match="pivot"):
        ldlq_oracle(torch.ones(1, 2), hessian, **grid, group_size=2)


# --- low rank ---


@pytest.mark.parametrize("rank", [0, 1, 4, N_OUT])
def test_low_rank_loss_is_the_tail_of_the_spectrum(rank: int) -> None:
    weight, hessian = problem(8)
    quantized = round_nearest(weight, GRIDS["int3-half"], GROUP)[1]
    error = weight - quantized
    plain, plain_loss = lorc_oracle(weight, quantized, rank)
    exact, exact_loss = qera_oracle(weight, quantized, hessian, rank)
    tail = torch.linalg.svdvals(error)[rank:].square().sum()
    gram = torch.linalg.eigvalsh(error @ hessian @ error.T).flip(0)[rank:].sum()
    assert plain_loss == pytest.approx(float(tail), rel=1e-10, abs=1e-12)
    assert exact_loss == pytest.approx(float(gram), rel=1e-8, abs=1e-12)
    assert (error - plain).square().sum() == pytest.approx(plain_loss, rel=1e-10, abs=1e-12)
    assert output_error(error - exact, hessian) == pytest.approx(exact_loss, rel=1e-8, abs=1e-12)
    assert torch.linalg.matrix_rank(exact) == torch.linalg.matrix_rank(plain) == rank


def test_exact_correction_beats_every_other() -> None:
    weight, hessian = problem(9)
    error = weight - round_nearest(weight, GRIDS["int3-half"], GROUP)[1]
    quantized = weight - error
    for rank in range(1, N_OUT):
        exact, best = qera_oracle(weight, quantized, hessian, rank)
        plain, _ = lorc_oracle(weight, quantized, rank)
        approximate, _ = weighted_oracle(error, torch.diag(hessian.diagonal().sqrt()), rank)
        assert output_error(error, hessian) > output_error(error - plain, hessian) > best * (1 + 1e-6)
        assert output_error(error - approximate, hessian) > best * (1 + 1e-6)
        rows = torch.linalg.svd(exact)[2][:rank]
        refitted = error @ hessian @ rows.T @ torch.linalg.inv(rows @ hessian @ rows.T) @ rows
        torch.testing.assert_close(refitted, exact)


def test_special_hessians_reduce_to_the_simpler_methods() -> None:
    weight, hessian = problem(11)
    quantized = round_nearest(weight, GRIDS["int3-half"], GROUP)[1]
    diagonal = hessian.diagonal()
    torch.testing.assert_close(
        qera_oracle(weight, quantized, torch.eye(N_IN), 2)[0], lorc_oracle(weight, quantized, 2)[0]
    )
    torch.testing.assert_close(
        qera_oracle(weight, quantized, torch.diag(diagonal), 2)[0],
        weighted_oracle(weight - quantized, torch.diag(diagonal.sqrt()), 2)[0],
    )


def test_rank_deficient_hessian_keeps_the_optimum() -> None:
    weight, _ = problem(12)
    inputs = torch.randn(N_IN, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hessian = inputs @ inputs.T
    torch.testing.assert_close(matrix_root(hessian) @ matrix_root(hessian), hessian)
    correction, loss = qera_oracle(weight, torch.zeros_like(weight), hessian, 3)
    assert output_error(weight - correction, hessian) == pytest.approx(loss, rel=1e-8)
    assert correction.norm() <= weight.norm()


# --- Hadamard ---


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 64])
def test_sylvester_matrix(n: int) -> None:
    matrix = sylvester_oracle(n)
    assert is_hadamard(matrix)
    if n > 1:
        half = sylvester_oracle(n // 2)
        assert torch.equal(matrix, torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), half))


def test_is_hadamard_refuses_others() -> None:
    broken = sylvester_oracle(8)
    broken[3, 5] *= -1
    assert not is_hadamard(broken)
    assert not is_hadamard(2 * torch.eye(4))
    with pytest.raises(ValueError, match="power of two"):
        sylvester_oracle(12)


# --- protocol ---


@pytest.fixture(scope="module")
def tiny_llama() -> LlamaForCausalLM:
    """Return a random one-layer model in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config)
    model.double().train(False)
    return model


def test_perplexity_drops_the_tail_and_averages_windows(tiny_llama: LlamaForCausalLM) -> None:
    tokens = torch.randint(0, 40, (3 * 16 + 11,), generator=torch.Generator().manual_seed(1))
    losses = window_losses_oracle(tiny_llama, tokens, 16)
    rows = tokens[:48].reshape(3, 16)
    expected = [tiny_llama(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert perplexity_oracle(tiny_llama, tokens, 16) == pytest.approx(math.exp(sum(expected) / 3), rel=1e-6)


def test_divergence_and_agreement() -> None:
    generator = torch.Generator().manual_seed(2)
    reference, logits = torch.randn(2, 3, 4, 9, generator=generator, dtype=torch.float64).mul(5)
    expected = torch.nn.functional.kl_div(
        logits.log_softmax(-1).reshape(12, 9),
        reference.log_softmax(-1).reshape(12, 9),
        reduction="batchmean",
        log_target=True,
    )
    assert kl_divergence_oracle(reference, logits) == pytest.approx(float(expected), rel=1e-12)
    assert kl_divergence_oracle(reference, reference + 100) == pytest.approx(0.0, abs=1e-12)
    assert kl_divergence_oracle(logits, reference) != pytest.approx(float(expected), rel=1e-3)
    same = (reference.argmax(-1) == logits.argmax(-1)).double().mean()
    assert top1_agreement_oracle(reference, logits) == pytest.approx(float(same))
    assert top1_agreement_oracle(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])) == 1.0
