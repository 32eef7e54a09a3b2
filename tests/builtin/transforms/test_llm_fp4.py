"""LLM-FP4: integer shifts of the exponent for each channel, and biases that are scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from qtool.builtin.formats.fp4 import E2M1
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.builtin.transforms.llm_fp4 import LLMFP4, LLMFP4Config, exponent_shifts
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem
from qtool.errors import ArtifactError, UsageError
from qtool.model.statistics import SiteStatistics
from qtool.numerics.operators import Diag
from qtool.scheme import TensorScheme
from qtool.steps.transform import context_of
from qtool.testing import TinyModel, check_transform, tiny_model
from tests.oracles import llm_fp4 as oracle


def magnitudes(n: int) -> torch.Tensor:
    """Return maxima of channels of which a few are much larger."""
    return torch.logspace(-2.5, 1.3, n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("qwen2") as made:
        yield made


class TestInvariance:
    def test_families_tied_and_untied(self) -> None:
        check_transform(LLMFP4(), families=("llama", "qwen2", "qwen3", "gemma2", "deepseek", "qwen2-moe"))

    @pytest.mark.slow
    def test_every_family(self) -> None:
        check_transform(LLMFP4())

    @pytest.mark.parametrize("config", [LLMFP4Config(largest=1), LLMFP4Config(sites="vo"), LLMFP4Config(largest=12)])
    def test_every_option(self, config: LLMFP4Config) -> None:
        check_transform(LLMFP4(), config, families=("qwen2",))


class TestShifts:
    def test_they_are_the_papers(self) -> None:
        maxima = magnitudes(40)
        shifts = exponent_shifts(maxima, 3)
        assert shifts.tolist() == oracle.channel_shifts(maxima.tolist())
        assert set(shifts.tolist()) == {0, 1, 2, 3}

    def test_a_channel_that_is_never_active_keeps_its_scale(self) -> None:
        assert exponent_shifts(torch.tensor([8.0, 0.0, 1.0]), 2).tolist() == [0, 0, 2]
        assert exponent_shifts(torch.zeros(2), 3).tolist() == [0, 0]

    def test_heads_share_the_tensors_largest(self) -> None:
        assert exponent_shifts(torch.tensor([[8.0, 4.0], [2.0, 1.0]]), 3).tolist() == [[0, 1], [2, 3]]

    def test_one_scale_behind_them_is_a_bias_a_channel(self) -> None:
        """Rounding the shifted tensor and shifting it back is the paper's quantizer with ``rho + k_j``."""
        maxima = magnitudes(24)
        x = (torch.rand(16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1) * maxima
        x[0] = maxima
        shifts = exponent_shifts(maxima, 3)
        scale = torch.exp2(shifts)
        form, scheme = E2M1(), TensorScheme("fp4", strategy="tensor")
        rho = oracle.bias_of(float(maxima.max()))
        parameters = form.fit(maxima.max().reshape(1, 1), scheme)
        ours = form.round((x * scale).reshape(1, -1), parameters).reshape(16, 24) / scale
        theirs = [
            [oracle.quantize(v, rho + k) for v, k in zip(row, shifts.tolist(), strict=True)] for row in x.tolist()
        ]
        torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-5, atol=0)
        plain = form.round(x.reshape(1, -1), parameters).reshape(16, 24)
        relative = [((found - x).norm(dim=0) / x.norm(dim=0))[shifts == 3].mean() for found in (ours, plain)]
        assert relative[0] < 0.8 * relative[1]

    @pytest.mark.parametrize("largest", [0, 32, -1])
    def test_a_shift_is_positive(self, largest: int) -> None:
        with pytest.raises(UsageError, match="`largest` is a shift from 1 to 31"):
            LLMFP4Config(largest)


class TestPlan:
    def test_every_absorbed_input_is_shifted_by_its_own_maxima(self, tiny: TinyModel) -> None:
        context = context_of(tiny.subject, tiny.statistics)
        found = LLMFP4().plan(context, LLMFP4Config()).operators
        names = ("attn_in", "mlp_in", "vo", "up_down")
        assert set(found) == {f"layers.{layer}.{name}" for layer in range(2) for name in names}
        for site_id, (diag,) in found.items():
            assert isinstance(diag, Diag)
            absmax = context.statistics[site_id].entries["absmax"]
            if not site_id.endswith("vo"):
                assert torch.equal(diag.s, torch.exp2(exponent_shifts(absmax, 3)))
                assert float(diag.act(absmax).max()) <= 2**0.5 * float(absmax.max())
        site = context.graph.site("layers.0.vo")
        heads = context.statistics[site.id].entries["absmax"].reshape(site.heads, -1, site.dim)
        (diag,) = found[site.id]
        assert torch.equal(diag.state()[0]["s"], torch.exp2(exponent_shifts(heads.amax(1), 3)))

    def test_a_value_head_has_the_largest_of_the_query_heads_that_share_it(self, tiny: TinyModel) -> None:
        context = context_of(tiny.subject, tiny.statistics)
        site = context.graph.site("layers.0.vo")
        n = len(context.statistics[site.id].entries["absmax"])
        absmax = torch.full((n,), 1.0)
        absmax[-1] = 8.0  # of the last query head of the last value head
        statistics = {f"layers.{layer}.vo": SiteStatistics(1, {"absmax": absmax}) for layer in range(2)}
        given = replace(context, statistics=statistics)
        assert n > site.heads * site.dim
        (diag,) = LLMFP4().plan(given, LLMFP4Config(sites="vo")).operators[site.id]
        expected = torch.full((site.heads * site.dim,), 8.0)
        expected[-1] = 1.0
        assert torch.equal(diag.state()[0]["s"].flatten(), expected)

    def test_without_absmax_it_says_what_to_gather(self, tiny: TinyModel) -> None:
        context = context_of(tiny.subject, tiny.statistics)
        bare = {site: SiteStatistics(1, {"hessian": torch.eye(24)}) for site in context.statistics}
        with pytest.raises(ArtifactError, match=r"lack `absmax` at `layers\.0\."):
            LLMFP4().plan(replace(context, statistics=bare), LLMFP4Config())


def test_the_search_for_a_clip_is_that_for_a_bias() -> None:
    """Rounding finds, for each row, a scale that is as good as the best of the paper's 100 biases."""
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(0)) ** 3 / 20
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(1))
    x = x @ (torch.eye(24) + torch.randn(24, 24, generator=torch.Generator().manual_seed(2)) / 4)
    hessian = x.T @ x / len(x)
    form = E2M1()
    of = LayerProblem("layer", weight, Grid.of(TensorScheme("fp4", scale="fp32"), form), hessian=hessian)
    options = ClipOptions(clip="search", clip_metric="output", clip_grid=99, clip_floor=0.3, clip_ceiling=1.75)
    errors = RTN().quantize(of, options).weight(of.grid) - weight
    ours = ((errors @ hessian) * errors).sum(1)
    theirs = [oracle.searched_bias(row, hessian.tolist())[0] for row in weight.tolist()]
    assert float(ours.sum()) < 1.02 * sum(theirs)
