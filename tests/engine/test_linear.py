from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.builtin.formats.fp4 import NVFP4
from qtool.builtin.formats.integer import Int4, Int8
from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding, SiteInput
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
        assert torch.equal(rounding(f"{text}-o1000")(x), torch.stack([rounding(text)(window) for window in x]))

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
