"""Second moments in blocks, against numpy loops and against what defines a geometric mean."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from qtool.errors import NumericalError, ShapeError
from qtool.numerics.second_moments import (
    cholesky,
    dampened,
    diagonal_blocks,
    geometric_mean,
    inner_blocks,
    limit_condition,
    matrix_power,
    weight_moment_blocks,
)


def definite(*shape: int, seed: int = 0, rows: int = 40) -> Tensor:
    """Random second moments [*shape, b, b] of correlated rows whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    *batch, b = shape
    mixing = torch.randn(*batch, b, b, generator=generator, dtype=torch.float64)
    x = torch.randn(*batch, rows, b, generator=generator, dtype=torch.float64) @ mixing
    return x.mT @ x / rows


class TestBlocks:
    def test_the_blocks_along_the_diagonal(self) -> None:
        matrix = torch.arange(36.0).reshape(6, 6)
        found = diagonal_blocks(matrix, 2)
        assert found.tolist() == [[[0, 1], [6, 7]], [[14, 15], [20, 21]], [[28, 29], [34, 35]]]
        found.zero_()
        assert float(matrix[0, 1]) == 1.0

    @pytest.mark.parametrize(("start", "stop"), [(0, 24), (8, 24), (4, 20), (12, 16)])
    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_smaller_blocks_are_those_of_the_whole(self, start: int, stop: int, size: int) -> None:
        matrix = definite(24)
        found = inner_blocks(diagonal_blocks(matrix, 8), slice(start, stop), size)
        assert torch.equal(found, diagonal_blocks(matrix[start:stop, start:stop], size))

    @pytest.mark.parametrize(("columns", "size"), [(slice(0, 24), 12), (slice(0, 24), 24), (slice(4, 20), 8)])
    def test_blocks_across_two_are_refused(self, columns: slice, size: int) -> None:
        with pytest.raises(ShapeError, match=f"blocks of {size} do not lie in blocks of 8"):
            inner_blocks(diagonal_blocks(torch.eye(24), 8), columns, size)

    def test_weights_one_row_after_the_other(self) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(rows, 12, generator=generator) for rows in (5, 3000, 1)]
        expected = np.zeros((3, 4, 4))
        for weight in weights:
            for row in weight.double().numpy():
                for block in range(3):
                    part = row[4 * block : 4 * block + 4]
                    expected[block] += np.outer(part, part)
        found = weight_moment_blocks(iter(weights), 4)
        np.testing.assert_allclose(found.numpy(), expected / 3006, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize(
        "cut",
        [
            lambda n: diagonal_blocks(torch.eye(12), n),
            lambda n: inner_blocks(torch.eye(12)[None], slice(0, 12), n),
            lambda n: weight_moment_blocks([torch.ones(2, 12)], n),
        ],
    )
    @pytest.mark.parametrize("size", [0, 5, 24])
    def test_a_size_that_does_not_divide(self, cut: Callable[[int], Tensor], size: int) -> None:
        with pytest.raises(ShapeError, match=f"blocks of {size} do not divide an axis of 12"):
            cut(size)

    def test_no_weights(self) -> None:
        with pytest.raises(ShapeError, match="of no weights"):
            weight_moment_blocks([], 4)


class TestDampened:
    def test_the_mean_of_the_diagonal_is_what_counts(self) -> None:
        found = dampened(torch.tensor([[[4.0, 1.0], [1.0, 0.0]]]), 0.1)
        torch.testing.assert_close(found, torch.tensor([[[4.2, 1.0], [1.0, 0.2]]], dtype=torch.float64))

    def test_a_block_of_zeros_becomes_the_identity_and_its_neighbour_does_not(self) -> None:
        found = dampened(torch.stack([torch.zeros(3, 3), torch.eye(3)]), 0.5)
        assert torch.equal(found[0], torch.eye(3, dtype=torch.float64))
        assert torch.equal(found[1], 1.5 * torch.eye(3, dtype=torch.float64))

    def test_fewer_tokens_than_channels_are_enough(self) -> None:
        moment = definite(3, 8, rows=2).float()
        with pytest.raises(NumericalError, match="not positive definite"):
            cholesky(moment.double() - 1e-6 * torch.eye(8, dtype=torch.float64))
        factor = cholesky(dampened(moment, 1e-4))
        torch.testing.assert_close(factor @ factor.mT, dampened(moment, 1e-4))

    def test_rounding_leaves_it_symmetric(self) -> None:
        moment = definite(2, 4).float()
        moment[0, 1, 2] += 1e-3
        found = dampened(moment, 0.01)
        assert torch.equal(found, found.mT)
        torch.testing.assert_close(found[0, 1, 2], (moment[0, 1, 2] + moment[0, 2, 1]).double() / 2)


class TestPowers:
    def test_they_multiply_as_powers_do(self) -> None:
        m = definite(3, 5)
        half, inverse = matrix_power(m, 0.5), matrix_power(m, -1.0)
        torch.testing.assert_close(half @ half, m)
        torch.testing.assert_close(inverse @ m, torch.eye(5, dtype=torch.float64).expand(3, 5, 5))
        torch.testing.assert_close(half, half.mT)

    @pytest.mark.parametrize("broken", [0.0, -1.0, float("nan"), float("inf")])
    def test_what_has_no_root(self, broken: float) -> None:
        m = torch.eye(3, dtype=torch.float64)
        m[1, 1] = broken
        for refused in (lambda: matrix_power(m, 0.5), lambda: cholesky(m)):
            with pytest.raises(NumericalError, match="not positive definite"):
                refused()


class TestGeometricMean:
    def test_it_solves_the_equation_of_riccati(self) -> None:
        """A # B is the only positive definite G with G A⁻¹ G = B."""
        a, b = definite(4, 6, seed=1), definite(4, 6, seed=2)
        g = geometric_mean(a, b)
        torch.testing.assert_close(g @ torch.linalg.inv(a) @ g, b)
        assert bool((torch.linalg.eigvalsh(g) > 0).all())
        assert torch.equal(g, g.mT)

    def test_it_does_not_matter_which_comes_first(self) -> None:
        a, b = definite(2, 6, seed=1), definite(2, 6, seed=2)
        torch.testing.assert_close(geometric_mean(a, b), geometric_mean(b, a))

    def test_of_diagonals_it_is_the_root_of_the_product(self) -> None:
        a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([16.0, 1.0, 4.0]).double()
        found = geometric_mean(torch.diag(a), torch.diag(b))
        torch.testing.assert_close(found, torch.diag(torch.tensor([4.0, 2.0, 6.0]).double()))


class TestLimitCondition:
    def test_the_limit_holds_and_both_ends_give_way(self) -> None:
        m = torch.diag(torch.tensor([100.0, 3.0, 0.01])).double()
        found = torch.linalg.svdvals(limit_condition(m, 100.0))
        torch.testing.assert_close(found, torch.tensor([10.0, 3.0, 0.1]).double())

    @pytest.mark.parametrize("most", [1.0, 3.0, 50.0])
    def test_random_matrices(self, most: float) -> None:
        m = torch.randn(20, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = limit_condition(m, most)
        before, after = torch.linalg.cond(m), torch.linalg.cond(found)
        assert bool((after <= most * (1 + 1e-9)).all())
        within = before <= most
        assert torch.equal(found[within], m[within])
        # Singular vectors stay: m Vᵀ… commutes, so that mᵀ found is symmetric.
        torch.testing.assert_close(m.mT @ found, (m.mT @ found).mT)


def test_nothing_is_modified() -> None:
    a, b = definite(2, 4, seed=1), definite(2, 4, seed=2)
    kept = a.clone(), b.clone()
    for function in (
        lambda: dampened(a, 0.5),
        lambda: cholesky(a),
        lambda: matrix_power(a, 0.5),
        lambda: geometric_mean(a, b),
        lambda: limit_condition(a, 1.5),
        lambda: weight_moment_blocks([a[0]], 2),
    ):
        function()
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])
