from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from qtool.builtin.formats.integer import Int4
from qtool.engine.grid import Grid
from qtool.engine.linear import ExecutedLinear, Rounding, SiteInput
from qtool.engine.problem import Adapter
from qtool.scheme import parse_tensor_scheme


def test_remembered_inputs_are_never_stale() -> None:
    site, calls = SiteInput(), list[Tensor]()
    site.observer, site.readers = calls.append, 3
    x = torch.ones(2, 3)
    assert site(x) is site(x)
    assert len(calls) == 1
    site(torch.ones(2, 3))
    assert len(calls) == 2, "equal values in another tensor are another input"
    site(x)
    x.mul_(2)
    site(x)
    assert len(calls) == 4, "a tensor that was written to is another input"
    assert calls[-1].equal(torch.full((2, 3), 2.0))
    with torch.inference_mode():
        x = torch.ones(2, 3)
        site(x)
        x.mul_(2)
        site(x)
    assert len(calls) == 6, "writes cannot be seen in inference mode"


def rounding() -> Rounding:
    scheme = parse_tensor_scheme("int4-token", lambda _: Int4())
    return Rounding(Grid.of(scheme, Int4()))


class Doubled:
    """An operator of the forward pass."""

    def act(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("reads", ["quantized", "full"])
def test_a_correction_reads_the_input_rounded_or_as_it_was(reads: Literal["quantized", "full"]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, down, up, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((6, 8), (2, 8), (6, 2), (3, 5, 8))
    )
    site, calls = SiteInput(), list[Tensor]()
    first, second = (ExecutedLinear(weight, None, site) for _ in range(2))
    site.operators, site.rounding, site.observer = (Doubled(),), rounding(), calls.append  # type: ignore[assignment]
    first.adapter = Adapter(down, up, reads=reads)
    rounded = rounding()(2 * x)
    seen = 2 * x if reads == "full" else rounded
    torch.testing.assert_close(first(x), rounded @ weight.T + seen @ (up @ down).T)
    assert not torch.equal(rounded, 2 * x)
    assert site._seen is not None, "the second has still to read"
    flat = x.view(15, 8)
    torch.testing.assert_close(second(flat), rounded.view(15, 8) @ weight.T)
    assert site._seen is None, "both have read"
    assert len(calls) == 1
    first(x)
    second.adapter = first.adapter
    torch.testing.assert_close(second(flat), first(x).view(15, 6))


def test_without_rounding_what_a_correction_reads_makes_no_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, down, up, x = (torch.randn(*shape, generator=generator) for shape in ((6, 8), (2, 8), (6, 2), (5, 8)))
    linear, outputs = ExecutedLinear(weight, None, SiteInput()), []
    for reads in ("quantized", "full"):
        linear.adapter = Adapter(down.half(), up.half(), reads=reads)  # type: ignore[arg-type]
        outputs.append(linear(x))
    assert torch.equal(*outputs)
    torch.testing.assert_close(outputs[0], x @ (weight + up.half().float() @ down.half().float()).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_8_bits_are_decoded_by_component(dtype: torch.dtype) -> None:
    down = torch.tensor([[1, -2, 3], [4, 5, -6]], dtype=torch.int8)
    up = torch.tensor([[7, 8], [-9, 10]], dtype=torch.int8)
    adapter = Adapter(down, up, torch.tensor([0.5, 2.0]).half(), torch.tensor([0.25, 4.0]).half())
    linear = ExecutedLinear(torch.zeros(2, 3, dtype=dtype), None, SiteInput())
    linear.adapter = adapter
    first, second = (
        torch.outer(up[:, 0].float() * 0.25, down[0] * 0.5),
        torch.outer(up[:, 1].float() * 4, down[1] * 2.0),
    )
    by_hand = first + second
    assert torch.equal(adapter.product(), by_hand)
    outputs = linear(torch.eye(3, dtype=dtype)).T
    assert outputs.dtype == dtype
    torch.testing.assert_close(outputs.float(), by_hand, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
