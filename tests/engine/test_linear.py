from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from qtool.builtin.formats.fp4 import NVFP4
from qtool.builtin.formats.integer import Int4, Int8
from qtool.engine.grid import Grid
from qtool.engine.linear import ExecutedLinear, Rounding, SiteInput
from qtool.engine.problem import Adapter
from qtool.model.plan import Segment
from qtool.scheme import Format, TensorScheme, parse_tensor_scheme
from tests.oracles.llm_int8 import llm_int8_oracle

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (Int4(), Int8(), NVFP4())}


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


def scheme_of(text: str) -> TensorScheme:
    return parse_tensor_scheme(text, FORMATS.__getitem__, vector="token")


def rounding(text: str) -> Rounding:
    scheme = scheme_of(text)
    return Rounding(Grid.of(scheme, FORMATS[scheme.format]))


def inputs(*shape: int, seed: int = 0) -> Tensor:
    """Values of which some columns are large, others in each window."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    for window in x if x.ndim == 3 else [x]:
        window[torch.randint(len(window), (3,), generator=generator), torch.randperm(shape[-1])[:3]] = 9.0
    return x


class TestOutlierColumns:
    @pytest.mark.parametrize("threshold", [0.5, 2.0, 6.0, 1000.0])
    def test_a_linear_is_that_of_the_paper(self, threshold: float) -> None:
        x, weight = inputs(12, 32), torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
        by_row = scheme_of("int8-sym-channel-sfp32-full")
        groups = weight.unsqueeze(1)
        fitted = Int8().fit(groups, by_row)
        rounded = Int8().decode(Int8().encode(groups, fitted), fitted).squeeze(1)
        found = rounding(f"int8-sym-token-sfp32-full-o{threshold}")(x).double() @ rounded.double().T
        expected = llm_int8_oracle(x, weight, threshold)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_with_all_columns_large_nothing_is_rounded(self) -> None:
        x = inputs(12, 32)
        assert torch.equal(rounding("int8-token-o0.001")(x), x)
        assert not torch.equal(rounding("int8-token-o2")(x), x)

    @pytest.mark.parametrize("text", ["int8-sym-token-sfp32-full", "int4-asym-g8", "nvfp4"])
    def test_with_none_that_large_all_are_rounded(self, text: str) -> None:
        x = inputs(2, 12, 32)
        expected = torch.stack([rounding(text)(window) for window in x])
        assert torch.equal(rounding(f"{text}-o1000")(x), expected)
        assert torch.equal(rounding(f"{text}-o0")(x), expected)

    @pytest.mark.parametrize("text", ["int8-token-full", "int4-asym-g8", "nvfp4", "int8-tensor"])
    def test_other_columns_do_not_see_the_large_ones(self, text: str) -> None:
        x = inputs(12, 32)
        large = (x.abs() >= 6).any(0)
        assert 0 < int(large.sum()) < 32
        found = rounding(f"{text}-o6")(x)
        assert torch.equal(found[:, large], x[:, large])
        assert torch.equal(found[:, ~large], rounding(text)(x.masked_fill(large, 0.0))[:, ~large])
        assert not torch.equal(found[:, ~large], rounding(text)(x)[:, ~large])

    def test_the_threshold_itself_is_large(self) -> None:
        x = torch.tensor([[6.0, -6.0, 5.99, 0.37]])
        found = rounding("int4-token-sfp32-o6")(x)
        assert torch.equal(found[0, :2], x[0, :2])
        assert float(found[0, 2]) == pytest.approx(5.99)
        assert float(found[0, 3]) == 0.0

    def test_each_window_has_its_own(self) -> None:
        one, x = rounding("int8-token-o6"), inputs(3, 12, 32)
        assert one.shared
        alone = [one(window) for window in x]
        assert torch.equal(one(x), torch.stack(alone))
        assert not torch.equal(one(x), one(x.flatten(0, 1)).reshape(x.shape))
        site = SiteInput()
        site.rounding, site.windows = one, [12, 12, 12]
        assert torch.equal(site(x.flatten(0, 1)), torch.cat(alone))

    def test_channels_that_are_set_apart_have_it_too(self) -> None:
        grid = Grid.segmented(scheme_of("int4-token-o6"), [Segment(8, "int8")], FORMATS.__getitem__)
        assert [part.scheme.outlier_threshold for part in grid.parts] == [6.0, 6.0]
        x = inputs(12, 32)
        x[0, 30] = 7.0
        assert torch.equal(Rounding(grid)(x)[:, 30], x[:, 30])
        plain = Grid.segmented(scheme_of("int4-token"), [Segment(8, "int8")], FORMATS.__getitem__)
        assert not torch.equal(Rounding(plain)(x)[:, 30], x[:, 30])


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
    site.operators, site.rounding, site.observer = (Doubled(),), rounding("int4-token"), calls.append  # type: ignore[assignment]
    first.adapter = Adapter(down, up, reads=reads)
    rounded = rounding("int4-token")(2 * x)
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


def test_an_adapter_goes_to_a_device_whole() -> None:
    eight = torch.ones(2, 3, dtype=torch.int8), torch.ones(4, 2, dtype=torch.int8), torch.ones(2), torch.ones(2)
    moved = Adapter(*eight, reads="full").on(torch.device("meta"))
    assert [moved.down.device.type, moved.up.device.type] == ["meta", "meta"]
    assert moved.down_scale is not None
    assert moved.up_scale is not None
    assert [moved.down_scale.device.type, moved.up_scale.device.type] == ["meta", "meta"]
    assert moved.reads == "full"
    assert Adapter(torch.ones(2, 3), torch.ones(4, 2)).on(torch.device("meta")).down_scale is None


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
