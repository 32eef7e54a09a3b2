"""Hadamard matrices are Hadamard, and the fast rotation is the dense product in the documented convention."""

from __future__ import annotations

import hashlib
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from qtool.errors import ShapeError
from qtool.numerics.hadamard import (
    hadamard_core,
    hadamard_factors,
    hadamard_matrix,
    hadamard_rotate,
    random_signs,
)
from qtool.numerics.hadamard_tables import is_tabled_order, tabled_matrix
from qtool.numerics.paley import is_paley_order, jacobsthal_matrix, paley_matrix, prime_power
from tests.oracles.hadamard import is_hadamard, sylvester_oracle

TABLED = (92, 116, 156, 172, 188, 236, 260, 428)
ORDERS = (1, 2, *range(4, 261, 4), 428)
PRIME_POWERS = [9, 25, 27, 49, 81, 121, 125, 169, 243]


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def core_matrix(core: int) -> Tensor:
    if core == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    return (paley_matrix(core) if is_paley_order(core) else tabled_matrix(core)).double()


def convention(n: int) -> Tensor:
    """``kron(H_K, H_P) / sqrt(n)``, with Sylvester's part by its definition."""
    core, power = hadamard_factors(n)
    return torch.kron(core_matrix(core), sylvester_oracle(power)) / sqrt(n)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_hadamard_and_rotates_like_its_matrix(order: int) -> None:
    matrix = hadamard_matrix(order)
    assert matrix.dtype == torch.int8
    assert is_hadamard(matrix)
    x = values(3, order)
    expected = x @ matrix.double() / sqrt(order)
    torch.testing.assert_close(hadamard_rotate(x), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        hadamard_rotate(x, transpose=True), x @ matrix.double().T / sqrt(order), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("order", TABLED)
def test_tabled_orders_are_hadamard_where_paley_has_none(order: int) -> None:
    assert is_tabled_order(order)
    assert is_hadamard(tabled_matrix(order))
    assert hadamard_factors(order) == (order, 1)
    assert not any(is_paley_order(order >> bit) for bit in range(3) if order % (1 << bit) == 0)
    assert torch.equal(hadamard_matrix(order), tabled_matrix(order))


def test_the_array_is_goethals_and_seidels() -> None:
    matrix = tabled_matrix(92).long()
    a, b, c, d = matrix[:23].split(23, 1)
    for block in (a, b.flip(1), c.flip(1), d.flip(1)):
        assert torch.equal(block, torch.stack([block[0].roll(shift) for shift in range(23)]))
    assert torch.equal(matrix[23:46], torch.cat([-b, a, d.flip(1).T.flip(1), -c.flip(1).T.flip(1)], 1))


@pytest.mark.parametrize("order", [4, 8, 96, 264, 268])
def test_orders_without_rows_are_refused(order: int) -> None:
    assert not is_tabled_order(order)
    with pytest.raises(ShapeError, match=f"`{order}`"):
        tabled_matrix(order)


@pytest.mark.parametrize("order", [268, 292, 536])
def test_orders_that_nothing_reaches_are_refused_with_what_is_possible(order: int) -> None:
    with pytest.raises(ShapeError, match=f"`{order}`") as caught:
        hadamard_matrix(order)
    block = order & -order
    assert f"block_size={block} divides {order}" in caught.value.hint
    hadamard_matrix(order + 4)


@pytest.mark.parametrize(("n", "core"), [(344, 344), (368, 368), (464, 464), (312, 312), (184, 92), (232, 116)])
def test_a_table_never_takes_the_place_of_paley(n: int, core: int) -> None:
    assert hadamard_factors(n) == (core, n // core)


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 9, 90])
def test_impossible_orders_are_refused(order: int) -> None:
    with pytest.raises(ShapeError, match=f"`{order}`"):
        hadamard_factors(order)


def test_refusal_names_the_nearest_orders() -> None:
    with pytest.raises(ShapeError, match="the nearest orders are 264 below and 272 above"):
        hadamard_factors(268)
    with pytest.raises(ShapeError, match="the nearest orders are none below and 1 above"):
        hadamard_factors(0)


def test_a_caller_may_write_into_a_matrix() -> None:
    for order in (8, 12, 28):
        first = hadamard_matrix(order)
        first.zero_()
        assert is_hadamard(hadamard_matrix(order))
        assert hadamard_rotate(torch.ones(order)).norm() == pytest.approx(sqrt(order))


def test_matrices_made_under_inference_mode_serve_a_backward_pass() -> None:
    with torch.inference_mode():
        hadamard_rotate(torch.ones(40))
    x = torch.ones(40, requires_grad=True)
    hadamard_rotate(x)[3].backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, convention(40)[:, 3].float())


@pytest.mark.parametrize("q", PRIME_POWERS)
def test_residues_of_prime_power_fields(q: int) -> None:
    residues = jacobsthal_matrix(q).long()
    assert torch.equal(residues @ residues.T, q * torch.eye(q, dtype=torch.long) - 1)
    assert torch.equal(residues.T, residues if q % 4 == 1 else -residues)
    assert residues.sum(1).abs().max() == 0


@pytest.mark.parametrize("q", [7, 13])
def test_residues_of_a_prime_field_are_eulers(q: int) -> None:
    squares = {a * a % q for a in range(1, q)}
    expected = [[0 if i == j else 1 if (i - j) % q in squares else -1 for j in range(q)] for i in range(q)]
    assert jacobsthal_matrix(q).tolist() == expected


@pytest.mark.parametrize(
    ("order", "digest"),
    [
        (12, "db7478025ce74776"),
        (28, "75a65a7aa5dd6380"),
        (36, "1a7aed2f42a8c71d"),
        (52, "7aad05503190a3c5"),
        (76, "290dc2c593bbcba4"),
        (344, "c85b69f851f28ba2"),
        (92, "2f34f7f018d88822"),
        (116, "f64343f84e68d424"),
        (156, "04dd3c488d1a71b0"),
        (172, "8bdbc9e6a24cfa9d"),
        (188, "c139b6bb70881dc9"),
        (236, "84eba09dde15ad43"),
        (260, "75d1cfb7ec70743c"),
        (428, "3d5363c528adac53"),
    ],
)
def test_entries_never_change_since_plans_store_only_the_order(order: int, digest: str) -> None:
    assert hashlib.sha256(hadamard_matrix(order).numpy().tobytes()).hexdigest().startswith(digest)


def test_prime_powers() -> None:
    assert [prime_power(n) for n in (1, 2, 12, 27, 343, 961, 187)] == [
        None,
        (2, 1),
        None,
        (3, 3),
        (7, 3),
        (31, 2),
        None,
    ]
    with pytest.raises(ShapeError, match="`15`"):
        jacobsthal_matrix(15)
    with pytest.raises(ShapeError, match="`16`"):
        jacobsthal_matrix(16)
    with pytest.raises(ShapeError, match="`92`"):
        paley_matrix(92)
    assert not is_paley_order(2)


@pytest.mark.parametrize(
    ("n", "core"),
    [
        (576, 36), (896, 28), (960, 60), (1536, 12), (2880, 180), (4864, 76), (6912, 108), (8960, 140), (9728, 76),
        (11008, 344), (13824, 108), (14336, 28), (18944, 148), (29568, 924), (1024, 1), (128, 1), (2, 1), (1, 1),
        (768, 12), (1152, 36), (1408, 44), (2304, 36), (2560, 20), (3072, 12), (3584, 28), (5120, 20), (5632, 44),
        (6144, 12), (7168, 28), (9216, 36), (10240, 20), (12288, 12), (17408, 68), (18432, 36),
        (25600, 100), (27648, 108), (28672, 28), (10944, 684), (13696, 428), (17920, 140), (21504, 84), (27392, 428),
    ],
)  # fmt: skip
def test_sizes_of_models_match_the_convention(n: int, core: int) -> None:
    assert hadamard_factors(n) == (core, n // core)
    left, power = core_matrix(core), n // core
    assert is_hadamard(left)
    x = values(2, n)
    sylvester = sylvester_oracle(power) / sqrt(n)
    for transpose, matrix in ((False, left), (True, left.T)):
        expected = (matrix.T @ (x.reshape(2, core, power) @ sylvester)).reshape(2, n)
        rotated = hadamard_rotate(x, transpose=transpose)
        torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)
        torch.testing.assert_close(hadamard_rotate(rotated, transpose=not transpose), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("n", [8, 24, 140, 184])
def test_the_core_is_what_is_left_of_a_rotation(n: int, transpose: bool) -> None:
    core, power = hadamard_factors(n)
    x = values(2, n)
    sylvester = (x.reshape(2, core, power) @ sylvester_oracle(power) / sqrt(power)).flatten(1)
    received = hadamard_core(sylvester, transpose=transpose)
    torch.testing.assert_close(received, hadamard_rotate(x, transpose=transpose), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("n", "radices"), [(4096, (64, 64)), (8192, (32, 16, 16)), (16384, (32, 32, 16))])
def test_large_powers_of_two_are_products_of_small_ones(n: int, radices: tuple[int, ...]) -> None:
    x = values(2, n)
    expected = x.reshape(2, *radices)
    for axis, radix in enumerate(radices, start=1):
        expected = (expected.movedim(axis, -1) @ sylvester_oracle(radix)).movedim(-1, axis)
    torch.testing.assert_close(hadamard_rotate(x), expected.reshape(2, n) / sqrt(n), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [12, 20, 24, 60, 140, 172, 184, 344])
def test_the_side_of_a_core_that_is_not_symmetric(n: int) -> None:
    matrix = hadamard_matrix(n).double() / sqrt(n)
    assert not torch.equal(matrix, matrix.T)
    rotated = hadamard_rotate(torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(rotated, matrix, rtol=0, atol=1e-14)
    x, weight = values(5, n), values(7, n, seed=1)
    product = hadamard_rotate(x) @ hadamard_rotate(weight).T
    torch.testing.assert_close(product, x @ weight.T, rtol=0, atol=1e-11)
    wrong_side = hadamard_rotate(x) @ hadamard_rotate(weight, transpose=True).T
    assert not torch.allclose(wrong_side, x @ weight.T, atol=1e-3)


@pytest.mark.parametrize("n", [16, 12, 28, 576])
def test_signs_come_before_the_matrix_and_transpose_undoes_both(n: int) -> None:
    signs = random_signs(n, torch.Generator().manual_seed(3))
    x = values(2, 3, n)
    rotated = hadamard_rotate(x, signs=signs)
    torch.testing.assert_close(rotated, x @ torch.diag(signs.double()) @ convention(n), rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_rotate(rotated, signs=signs, transpose=True), x, rtol=0, atol=1e-12)


def test_signs_of_another_length_are_refused() -> None:
    with pytest.raises((ShapeError, TypeCheckError), match="signs"):  # the latter where shapes are checked at run time
        hadamard_rotate(values(2, 8), signs=torch.ones(4))


@settings(max_examples=25, deadline=None)
@given(core=st.sampled_from([1, 12, 20, 28, 36, 44, 52, 92]), bits=st.integers(0, 9), seed=st.integers(0, 99))
def test_norms_and_the_inverse_hold_for_any_size(core: int, bits: int, seed: int) -> None:
    x = values(2, core << bits, seed=seed)
    rotated = hadamard_rotate(x)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)
    torch.testing.assert_close(hadamard_rotate(rotated, transpose=True), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = values(4, 1536, dtype=dtype)
    rotated = hadamard_rotate(x)
    assert rotated.dtype == dtype
    exact = hadamard_rotate(x.double())
    tolerance = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps * exact.abs().max().item()
    assert (rotated.double() - exact).abs().max() <= tolerance


def test_the_largest_half_precision_values_survive() -> None:
    x = torch.zeros(14336, dtype=torch.float16)
    x[:100] = 60000.0
    rotated = hadamard_rotate(x)
    assert rotated.isfinite().all()
    assert rotated.double().norm() == pytest.approx(x.double().norm().item(), rel=1e-3)
    wide = torch.zeros(4096)
    wide[:4] = 2e38
    assert hadamard_rotate(wide).isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 8, 12])
def test_inputs_are_kept_and_results_are_new(n: int) -> None:
    x = values(3, n, dtype=torch.float32)
    before = x.clone()
    rotated = hadamard_rotate(x)
    rotated.zero_()
    assert torch.equal(x, before)


def test_an_empty_batch_and_a_strided_input() -> None:
    assert hadamard_rotate(torch.zeros(0, 5, 24)).shape == (0, 5, 24)
    x = values(24, 6)
    torch.testing.assert_close(hadamard_rotate(x.T), x.T @ convention(24), rtol=0, atol=1e-13)


def test_a_first_use_under_a_meta_device_does_not_poison_the_cache() -> None:
    with torch.device("meta"):
        matrix = hadamard_matrix(84)
    assert is_hadamard(matrix)
    torch.testing.assert_close(hadamard_rotate(values(84)), values(84) @ convention(84), rtol=0, atol=1e-13)


def test_random_signs_are_reproducible_and_fair() -> None:
    first, second = (random_signs(4096, torch.Generator().manual_seed(s)) for s in (5, 6))
    assert torch.equal(first, random_signs(4096, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, second)
    assert torch.equal(first.abs(), torch.ones(4096))
    assert abs(first.mean()) < 0.1
