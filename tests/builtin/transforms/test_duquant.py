"""DuQuant: smoothing, greedy rotation, zig-zag order, rotation; all of it from statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.builtin.transforms.duquant import DuQuant, DuQuantConfig, rotations
from qtool.builtin.transforms.smoothquant import SmoothQuant, SmoothQuantConfig, smoothing_scale
from qtool.errors import ArtifactError, UsageError
from qtool.model.plan import TransformContext
from qtool.model.statistics import SiteStatistics
from qtool.numerics.greedy_rotation import spreading_rotations
from qtool.numerics.operators import Block, Diag, Operator, Perm, compose_act
from qtool.steps.schemes import parse_model_scheme
from qtool.steps.transform import context_of
from qtool.testing import TinyModel, check_transform, plan_of, tiny_model

QUICK = DuQuantConfig(steps=12)


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("qwen2_moe") as made:
        yield made


@pytest.fixture
def context(tiny: TinyModel) -> TransformContext:
    return context_of(tiny.subject, tiny.statistics)


def outliers(tokens: int, n: int, seed: int = 0) -> Tensor:
    """Activations with a loud channel, and a token that is loud in another one."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g)
    x[:, 3] *= 30
    x[tokens // 2, 1] = 100
    return x


def rounded(x: Tensor) -> Tensor:
    """Round each row to a symmetric grid of 15 levels."""
    step = x.abs().amax(1, keepdim=True) / 7
    return (x / step).round() * step


def at(context: TransformContext, site: str, config: DuQuantConfig = QUICK) -> list[Operator]:
    return list(DuQuant().plan(context, config).operators[site])


class TestInvariance:
    def test_families_tied_and_untied(self) -> None:
        check_transform(DuQuant(), QUICK, families=("olmo2", "qwen2-moe"))

    @pytest.mark.slow
    def test_every_family(self) -> None:
        check_transform(DuQuant())

    def test_a_block_size_of_ones_own(self) -> None:
        check_transform(DuQuant(), DuQuantConfig(block_size=4, steps=5), families=("llama",))


class TestPlan:
    def test_every_input_of_linears_has_all_four(self, context: TransformContext) -> None:
        found = DuQuant().plan(context, QUICK).operators
        graph = context.graph
        assert set(found) == {f"layers.{i}.{name}" for i in range(2) for name in graph.input_sites_of(i)}
        assert {"layers.1.experts.3.up_down", "layers.1.shared.up_down", "layers.0.up_down"} < set(found)
        smooth, first, order, second = found["layers.0.up_down"]
        assert isinstance(smooth, Diag)
        assert isinstance(order, Perm)
        for rotation in (first, second):
            assert isinstance(rotation, Block)
            assert rotation.matrices.shape == (5, 8, 8)
            dense = rotation.to_dense()
            torch.testing.assert_close(dense @ dense.T, torch.eye(40).double(), rtol=0, atol=1e-6)

    def test_only_the_scale_is_folded(self, tiny: TinyModel) -> None:
        sites = plan_of(DuQuant(), QUICK, tiny)[1].sites
        folded = {name.rpartition(".")[2]: site.folded for name, site in sites.items()}
        assert folded == {"attn_in": 1, "mlp_in": 1, "up_down": 1, "o_in": 0}

    def test_the_scale_is_smoothquants_with_the_papers_alpha(self, context: TransformContext) -> None:
        smooth = SmoothQuant().plan(context, SmoothQuantConfig(alpha=0.6)).operators
        for site in ("layers.0.attn_in", "layers.1.mlp_in"):
            (expected,), diag = smooth[site], at(context, site, DuQuantConfig(steps=1))[0]
            assert isinstance(expected, Diag)
            assert isinstance(diag, Diag)
            assert torch.equal(diag.s, expected.s)
        weight = context.weights("model.layers.0.mlp.down_proj").abs().amax(0)
        absmax = context.statistics["layers.0.up_down"].entries["absmax"]
        diag = at(context, "layers.0.up_down")[0]
        assert isinstance(diag, Diag)
        torch.testing.assert_close(1 / diag.s, smoothing_scale(absmax, weight, 0.6))

    def test_the_order_deals_out_what_the_first_rotation_leaves(self, context: TransformContext) -> None:
        smooth, first, order, _ = at(context, "layers.0.up_down")
        sample = context.statistics["layers.0.up_down"].entries["sample"]
        absmax = compose_act((smooth, first), sample).abs().amax(0)
        assert isinstance(order, Perm)
        dealt = absmax[order.index].reshape(5, 8)
        ranks = dealt.flatten().argsort(descending=True).argsort().reshape(5, 8)
        assert ranks[:, 0].tolist() == [0, 1, 2, 3, 4]
        assert ranks[:, 1].tolist() == [9, 8, 7, 6, 5]
        assert ranks[:, 7].tolist() == [39, 38, 37, 36, 35]

    def test_each_rotation_makes_the_largest_magnitude_of_a_block_smaller(self, context: TransformContext) -> None:
        smooth, *operators = at(context, "layers.0.up_down", DuQuantConfig(steps=64))
        x = smooth.act(context.statistics["layers.0.up_down"].entries["sample"])
        for operator in operators:
            before, x = x, operator.act(x)
            if isinstance(operator, Block):
                left, right = (one.reshape(-1, 5, 8).abs().amax((0, 2)) for one in (before, x))
                assert bool((right < 1.05 * left).all())
                assert bool((right < 0.95 * left).any())

    def test_the_seed_decides(self, context: TransformContext) -> None:
        config = DuQuantConfig(steps=64)
        first, again, other = (
            at(replace(context, seed=seed), "layers.0.up_down", config)[1].to_dense() for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.allclose(first, other)

    def test_blocks_are_the_largest_powers_of_two_that_divide(self, context: TransformContext) -> None:
        def size(operator: Operator) -> int:
            assert isinstance(operator, Block)
            return operator.matrices.shape[-1]

        sizes = {name: size(ops[1]) for name, ops in DuQuant().plan(context, QUICK).operators.items()}
        assert sizes["layers.0.attn_in"] == 8  # of 24
        assert sizes["layers.0.o_in"] == 32
        assert sizes["layers.1.shared.up_down"] == 4  # of 20
        halves = DuQuant().plan(context, DuQuantConfig(block_size=4, steps=1)).operators
        assert {size(ops[1]) for ops in halves.values()} == {4}


class TestGaps:
    def test_an_expert_without_tokens_is_left_alone(self, context: TransformContext) -> None:
        class Starved(dict[str, SiteStatistics]):
            def __missing__(self, site: str) -> SiteStatistics:
                if site == "layers.1.experts.2.up_down":
                    return SiteStatistics(0, {})
                gathered: SiteStatistics = context.statistics[site]
                rows = 0 if site == "layers.1.experts.1.up_down" else None
                return SiteStatistics(1, {**gathered.entries, "sample": gathered.entries["sample"][:rows]})

        starved: Mapping[str, SiteStatistics] = Starved()
        found = DuQuant().plan(replace(context, statistics=starved), QUICK).operators
        assert "layers.1.experts.0.up_down" in found
        assert not {"layers.1.experts.1.up_down", "layers.1.experts.2.up_down"} & set(found)

    def test_without_a_sample_it_says_what_to_gather(self, context: TransformContext) -> None:
        bare = {site: SiteStatistics(1, {"absmax": torch.ones(24)}) for site in context.statistics}
        with pytest.raises(ArtifactError, match=r"lack `sample` at `layers\.0\.attn_in`"):
            DuQuant().plan(replace(context, statistics=bare), QUICK)

    def test_dead_channels_do_no_harm(self, context: TransformContext) -> None:
        sample = context.statistics["layers.0.attn_in"].entries["sample"].clone()
        sample[:, :3] = 0
        drawn = spreading_rotations(8, 10, torch.Generator().manual_seed(0))
        for operator in rotations(sample, drawn):
            assert bool(operator.to_dense().isfinite().all())

    def test_channels_by_themselves_are_not_rotated(self) -> None:
        assert rotations(outliers(8, 9), torch.ones(3, 1, 1, dtype=torch.float64)) == []
        (alone,) = rotations(outliers(8, 8), spreading_rotations(8, 3, torch.Generator().manual_seed(0)))
        assert isinstance(alone, Block)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"alpha": 1.1}, "`alpha` must lie between 0 and 1"),
            ({"block_size": 0}, "`block_size` must be at least 1"),
            ({"steps": 0}, "`steps` must be at least 1"),
        ],
    )
    def test_options_that_mean_nothing(self, options: dict[str, float], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            DuQuantConfig(**options)  # type: ignore[arg-type]

    def test_a_block_size_that_does_not_divide(self, context: TransformContext) -> None:
        with pytest.raises(UsageError, match=r"does not divide the input at `layers\.0\.attn_in`") as refused:
            DuQuant().plan(context, DuQuantConfig(block_size=16))
        assert refused.value.hint == "leave `block_size` out, or use 8"


def test_outliers_are_rounded_with_less_error() -> None:
    """Every part helps: blocks alone leave those with outliers loud, the order spreads these over blocks."""
    x = outliers(400, 128)
    one, order, two = rotations(x, spreading_rotations(32, 128, torch.Generator().manual_seed(0)))

    def error(operators: list[Operator]) -> float:
        y = compose_act(operators, x)
        return float((rounded(y) - y).norm() / y.norm())

    none, rotated, all_three = error([]), error([one]), error([one, order, two])
    assert rotated < 0.6 * none
    assert all_three < 0.75 * rotated


def test_the_published_scheme(tiny: TinyModel) -> None:
    plugins = tiny.subject.plugins
    scheme = parse_model_scheme("DuQuant-W4A4KV4", plugins.format, plugins.presets)
    assert scheme.weights is not None
    assert scheme.activations is not None
    assert (scheme.weights.clip, scheme.activations.clip) == (0.8, 0.9)
    atom = parse_model_scheme("Atom-W4A4KV4", plugins.format, plugins.presets)
    assert atom.weights is not None
    assert atom.activations is not None
    assert (atom.weights.clip, atom.activations.clip) == (0.85, 0.9)
    assert atom.weights.group_size == atom.activations.group_size == 128
