"""AWQ chooses what a search by hand over a block of transformers chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from qtool.builtin.transforms.awq import AWQ, AWQConfig, awq_scale, mean_magnitude
from qtool.engine.planner import extend
from qtool.errors import ArtifactError, UsageError
from qtool.model.plan import Plan, Proposal, TransformContext
from qtool.model.statistics import SiteStatistics
from qtool.numerics.operators import Diag
from qtool.scheme import ModelScheme, TensorScheme
from qtool.steps.calibrate import WINDOWS
from qtool.steps.transform import context_of
from qtool.testing import TinyModel, check_transform, tiny_model

SMALL = AWQConfig(tokens=64, grid=5)
WEIGHTS = ModelScheme(weights=TensorScheme("int3", symmetric=False))
BOTH = replace(WEIGHTS, activations=TensorScheme("int4", symmetric=False, strategy="token"))
RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8)


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("llama") as made:
        yield made


@pytest.fixture(scope="module")
def sparse() -> Iterator[TinyModel]:
    with tiny_model("mixtral") as made:
        yield made


@pytest.fixture
def context(tiny: TinyModel) -> TransformContext:
    return context_of(tiny.subject, tiny.statistics, scheme=WEIGHTS)


def by_hand(weight: Tensor, levels: int = 8) -> Tensor:
    """Round each row to an asymmetric grid that holds zero."""
    low, high = weight.amin(1, keepdim=True).clamp_max(0), weight.amax(1, keepdim=True).clamp_min(0)
    scale = (high - low) / (levels - 1)
    return ((weight / scale).round().clamp((low / scale).round(), (low / scale).round() + levels - 1)) * scale


class TestScale:
    def test_the_formula_by_hand(self) -> None:
        scale = awq_scale(torch.tensor([16.0, 1.0, 4.0]), 0.5)
        torch.testing.assert_close(scale, torch.tensor([4.0, 1.0, 2.0]) / 2)
        torch.testing.assert_close(awq_scale(torch.tensor([16.0, 1.0]), 0.25), torch.tensor([2.0, 1.0]) / 2**0.5)
        assert awq_scale(torch.tensor([16.0, 1.0, 4.0]), 0.0).tolist() == [1, 1, 1]

    def test_a_channel_that_is_never_active_keeps_its_scale(self) -> None:
        torch.testing.assert_close(
            awq_scale(torch.tensor([9.0, 0.0, 1.0]), 0.5), torch.tensor([3.0, 3**0.5, 1.0]) / 3**0.5
        )
        assert awq_scale(torch.zeros(3), 0.5).tolist() == [1, 1, 1]

    def test_tiny_channels_do_not_run_away(self) -> None:
        scale = awq_scale(torch.tensor([1.0, 1e-30]), 0.9)
        torch.testing.assert_close(scale, torch.tensor([100.0, 0.01]))


class TestSearch:
    @pytest.mark.parametrize("kind", ["attn_in", "vo", "mlp_in", "up_down"])
    def test_the_same_as_by_hand(self, tiny: TinyModel, context: TransformContext, kind: str) -> None:
        """The oracle: mean magnitudes, weights and outputs of transformers' own modules, all ratios tried."""
        found = AWQ().plan(context, replace(SMALL, sites=kind)).operators
        assert len(found) == 2
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float64).eval()
        windows = tiny.statistics.tensor(WINDOWS).long()
        with torch.no_grad():
            states = model.model(windows, output_hidden_states=True).hidden_states
            rotary = model.model.rotary_emb(states[0], torch.arange(windows.shape[1])[None])
        for layer, block in enumerate(model.model.layers):
            linears = {
                "attn_in": [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj],
                "vo": [block.self_attn.o_proj],
                "mlp_in": [block.mlp.gate_proj, block.mlp.up_proj],
                "up_down": [block.mlp.down_proj],
            }[kind]
            seen: list[Tensor] = []

            def saw(_: object, given: tuple[Tensor], seen: list[Tensor] = seen) -> None:
                seen.append(given[0])

            hook = linears[0].register_forward_pre_hook(saw)
            with torch.no_grad():
                block(states[layer], position_embeddings=rotary)
                hook.remove()
                exact = block(states[layer][:2], position_embeddings=rotary)
                mean = seen[0].flatten(0, 1).abs().mean(0)
                if kind == "vo":  # 4 heads of queries, 2 of values
                    mean = mean.view(2, 2, 8).mean(1)
                kept, errors, tried = [one.weight.data for one in linears], [], []
                for ratio in RATIOS:
                    s = mean**ratio / (mean.max() * mean.min()) ** (ratio / 2)
                    tried.append(s)
                    wide = s if s.ndim == 1 else s.repeat_interleave(2, 0).flatten()
                    for one, weight in zip(linears, kept, strict=True):
                        one.weight.data = by_hand(weight * wide) / wide
                    output = block(states[layer][:2], position_embeddings=rotary)
                    errors.append(float((output - exact).square().mean()))
                for one, weight in zip(linears, kept, strict=True):
                    one.weight.data = weight
            (diag,) = found[f"layers.{layer}.{kind}"]
            assert isinstance(diag, Diag)
            expected = tried[errors.index(min(errors))].float()
            torch.testing.assert_close(1 / diag.s, expected, rtol=1e-4, atol=1e-5)

    def test_outliers_of_activations_lose_their_error(self, tiny: TinyModel) -> None:
        """A plan to the left makes outliers, which weights per output row then suffer from."""
        outliers = torch.ones(24)
        outliers[[3, 11]] = 1 / 30
        kinds = ("attn_in", "mlp_in")
        made = {f"layers.{layer}.{kind}": [Diag(1 / outliers)] for layer in range(2) for kind in kinds}
        subject = replace(tiny.subject, plan=extend(Plan(), Proposal(made), tiny.subject.model.graph, method="x"))
        context = context_of(subject, tiny.statistics, scheme=BOTH)
        found = AWQ().plan(context, replace(SMALL, sites=",".join(kinds))).operators
        assert context.trials is not None
        for trial in context.trials(64):
            here = {site: operators for site, operators in found.items() if site.startswith(f"layers.{trial.layer}.")}
            assert len(here) == 2
            assert trial.error(here) < 0.5 * trial.error(dict.fromkeys(here, ()))

    def test_the_scheme_decides_whether_inputs_are_rounded(self, tiny: TinyModel) -> None:
        chosen = [
            AWQ().plan(context_of(tiny.subject, tiny.statistics, scheme=scheme), AWQConfig(32, "attn_in")).operators
            for scheme in (WEIGHTS, BOTH)
        ]
        assert any(not torch.equal(chosen[0][one][0].s, chosen[1][one][0].s) for one in chosen[0])  # type: ignore[attr-defined]


class TestExperts:
    def test_each_has_its_own_scales_and_all_share_a_ratio(self, sparse: TinyModel) -> None:
        context = context_of(sparse.subject, sparse.statistics, scheme=WEIGHTS)
        found = AWQ().plan(context, replace(SMALL, sites="up_down")).operators
        for layer in range(2):
            sites = list(context.graph.of_kind("up_down", layer))
            means = [mean_magnitude(context, site) for site in sites]
            fits = [
                ratio
                for ratio in RATIOS
                if all(
                    torch.allclose(1 / found[site.id][0].s, awq_scale(mean, ratio))  # type: ignore[attr-defined]
                    for site, mean in zip(sites, means, strict=True)
                    if mean is not None
                )
            ]
            assert len(fits) == 1

    def test_one_without_statistics_is_left_alone(self, sparse: TinyModel) -> None:
        context = context_of(sparse.subject, sparse.statistics, scheme=WEIGHTS)
        lacking = "layers.0.experts.1.up_down"
        known = Replaced(context.statistics, {lacking: SiteStatistics(0, {})})
        found = AWQ().plan(replace(context, statistics=known), replace(SMALL, sites="up_down")).operators
        assert lacking not in found
        assert len(found) == 7


class Replaced(Mapping[str, SiteStatistics]):
    """Statistics of which some are replaced."""

    def __init__(self, known: Mapping[str, SiteStatistics], changes: Mapping[str, SiteStatistics]) -> None:
        self.known, self.changes = known, changes

    def __getitem__(self, key: str) -> SiteStatistics:
        return self.changes[key] if key in self.changes else self.known[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)


class TestRefusals:
    def test_without_a_scheme(self, tiny: TinyModel) -> None:
        with pytest.raises(UsageError, match="quantized") as refused:
            AWQ().plan(context_of(tiny.subject, tiny.statistics), AWQConfig())
        assert refused.value.hint == "--scheme W4A16"

    def test_without_tokens_to_run(self, tiny: TinyModel) -> None:
        with pytest.raises(UsageError, match="calibration tokens"):
            AWQ().plan(context_of(tiny.subject, None, scheme=WEIGHTS), AWQConfig())

    def test_sites_that_absorb_nothing(self, context: TransformContext) -> None:
        with pytest.raises(UsageError, match="`o_in`") as refused:
            AWQ().plan(context, AWQConfig(sites="attn_in,o_in"))
        assert refused.value.hint == "--set sites=attn_in,mlp_in,up_down,vo"

    def test_without_the_mean_magnitude(self, context: TransformContext) -> None:
        known = Replaced(context.statistics, {"layers.0.attn_in": SiteStatistics(1, {})})
        with pytest.raises(ArtifactError, match="mean_abs"):
            AWQ().plan(replace(context, statistics=known), SMALL)

    @pytest.mark.parametrize("options", [{"tokens": 0}, {"grid": 0}])
    def test_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match="1 or more"):
            AWQConfig(**options)


class TestInvariance:
    def test_families(self) -> None:
        check_transform(AWQ(), AWQConfig(tokens=16, grid=2), families=("gpt-neox", "qwen2-moe"))

    @pytest.mark.slow
    def test_every_family(self) -> None:
        check_transform(AWQ(), replace(SMALL, grid=3))
