from __future__ import annotations

import pytest
import torch

from qtool.errors import ShapeError
from qtool.numerics.groups import from_groups, largest_magnitude, to_groups


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def test_groups_are_neighbours_along_the_last_axis() -> None:
    groups = to_groups(numbered(2, 6), "group", 3)
    assert groups.tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


@pytest.mark.parametrize("strategy", ["channel", "token"])
def test_an_output_row_and_a_token_are_one_group_of_the_last_axis(strategy: str) -> None:
    groups = to_groups(numbered(2, 3, 4), strategy)
    assert groups.shape == (2, 3, 1, 4)
    assert groups[1, 2, 0].tolist() == [20, 21, 22, 23]


def test_a_tensor_is_one_group() -> None:
    assert to_groups(numbered(2, 3), "tensor").tolist() == [[0, 1, 2, 3, 4, 5]]


def test_a_head_of_all_tokens_is_a_group() -> None:
    x = numbered(2, 3, 2, 2)
    groups = to_groups(x, "head")
    assert groups.shape == (2, 3, 1, 1, 4)
    assert groups[1, 2, 0, 0].tolist() == x[1, 2].flatten().tolist()
    assert torch.equal(from_groups(groups, x.shape), x)


@pytest.mark.parametrize(("strategy", "size"), [("tensor", None), ("channel", None), ("token", None), ("group", 4)])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 5, 8)])
def test_from_groups_undoes_to_groups(strategy: str, size: int | None, shape: tuple[int, ...]) -> None:
    x = numbered(*shape)
    assert torch.equal(from_groups(to_groups(x, strategy, size), x.shape), x)


def test_a_transposed_tensor_is_grouped_by_its_own_axes() -> None:
    x = numbered(4, 2).T
    groups = to_groups(x, "group", 2)
    assert groups.tolist() == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    assert torch.equal(from_groups(groups, x.shape), x)


@pytest.mark.parametrize("size", [None, 5])
def test_a_group_size_that_does_not_divide_is_refused(size: int | None) -> None:
    with pytest.raises(ShapeError, match="do not divide an axis of 8"):
        to_groups(numbered(2, 8), "group", size)


def test_largest_magnitude_sees_negative_values_and_widens() -> None:
    groups = torch.tensor([[1.0, -3.0], [2.0, 0.5]], dtype=torch.bfloat16)
    largest = largest_magnitude(groups)
    assert largest.tolist() == [3.0, 2.0]
    assert largest.dtype == torch.float32
