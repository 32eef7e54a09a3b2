from __future__ import annotations

import pytest
import torch

from qtool.numerics.outliers import Outliers


def some(share: float, shape: tuple[int, int] = (7, 11)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    return weight, torch.rand(shape, generator=generator) < share


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_rows_become_sparse_and_dense_again(share: float) -> None:
    weight, places = some(share)
    places[2] = False
    found = Outliers.of(weight, places)
    assert int(found.row_ptr[-1]) == int(places.sum()) == len(found.values)
    assert torch.equal(found.places(11), places)
    below = torch.full_like(weight, 9.0)
    dense = found.put(below)
    assert torch.equal(dense[places], weight[places].half().float())
    assert torch.equal(dense[~places], below[~places])
    assert (below == 9).all()
    assert torch.equal(Outliers.of(dense, places).values, found.values)


def test_entries_lie_row_by_row() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    found = Outliers.of(weight, torch.tensor([[True, False, True], [False, True, False]]))
    assert found.row_ptr.tolist() == [0, 2, 3]
    assert found.col.tolist() == [0, 2, 1]
    assert found.values.tolist() == [0.0, 2.0, 4.0]
