"""Block Hadamard: aligned with the scale groups, at every input, and nothing leaves its group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qtool.builtin.transforms.block_hadamard import BlockHadamard, BlockHadamardConfig, block_size
from qtool.engine.subject import Subject
from qtool.errors import UsageError
from qtool.model.plan import TransformContext
from qtool.numerics.operators import Hadamard
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.schemes import parse_model_scheme
from qtool.steps.transform import context_of
from qtool.testing import TinyModel, check_transform, plan_of, tiny_model

FAMILIES = ("llama", "deepseek")


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("qwen2_moe") as made:
        yield made


@pytest.fixture(scope="module")
def subject(tiny: TinyModel) -> Subject:
    return tiny.subject


@pytest.fixture
def context(subject: Subject, tiny: TinyModel) -> TransformContext:
    return context_of(subject, tiny.statistics)


def blocks(context: TransformContext, **options: Any) -> dict[str, int | None]:  # noqa: ANN401 - options of different types
    """Block size by site."""
    proposal = BlockHadamard().plan(context, BlockHadamardConfig(**options))
    found = {}
    for site, (operator,) in proposal.operators.items():
        assert isinstance(operator, Hadamard)
        assert operator.n == context.graph.site(site).dim
        found[site] = operator.block_size
    return found


class TestInvariance:
    def test_families(self) -> None:
        check_transform(BlockHadamard(), BlockHadamardConfig(block=8, random=True), families=FAMILIES)

    @pytest.mark.slow
    def test_every_family(self) -> None:
        check_transform(BlockHadamard())


class TestSites:
    def test_every_input_of_quantized_linears_and_all_of_it_online(
        self, context: TransformContext, tiny: TinyModel
    ) -> None:
        experts = {f"layers.1.experts.{e}.up_down" for e in range(4)}
        both = {f"layers.{i}.{name}" for i in range(2) for name in ("attn_in", "o_in", "mlp_in")}
        expected = both | experts | {"layers.0.up_down", "layers.1.shared.up_down"}
        assert blocks(context).keys() == expected
        plan = plan_of(BlockHadamard(), BlockHadamardConfig(), tiny)[1]
        assert all(len(site.online) == 1 for site in plan.sites.values())

    def test_kinds_of_sites(self, context: TransformContext) -> None:
        found = blocks(context, sites="o_in,up_down").keys()
        assert {name.rpartition(".")[2] for name in found} == {"o_in", "up_down"}
        assert "layers.1.shared.up_down" in found

    def test_a_site_that_the_model_has_not(self, context: TransformContext) -> None:
        with pytest.raises(UsageError, match="no input sites `mlp`") as refused:
            blocks(context, sites="attn_in,mlp")
        assert refused.value.hint == "--set sites=attn_in,o_in,mlp_in,up_down"


class TestBlock:
    @pytest.mark.parametrize(
        ("scheme", "expected"), [("W4A4", 128), ("NVFP4", 16), ("MXFP4", 32), ("W4A4-g8", 8), ("W4A4-g48", 48)]
    )
    def test_it_is_the_scale_group(
        self, context: TransformContext, subject: Subject, scheme: str, expected: int
    ) -> None:
        parsed = parse_model_scheme(scheme, subject.plugins.format, subject.plugins.presets)
        for site, block in blocks(replace(context, scheme=parsed)).items():
            width = context.graph.site(site).dim
            largest = max(b for b in (1, 2, 4, 8, 16, 32, 64) if width % b == 0 and expected % b == 0)
            assert block == largest

    def test_weights_come_before_activations(self, context: TransformContext, subject: Subject) -> None:
        weights, activations = (parse_tensor_scheme(f"int4-g{g}", subject.plugins.format) for g in (4, 8))
        both = replace(context, scheme=ModelScheme(weights=weights, activations=activations))
        assert set(blocks(both).values()) == {4}
        only = replace(context, scheme=ModelScheme(activations=activations))
        assert set(blocks(only).values()) == {4, 8}  # a width of 20 has no blocks of 8
        assert set(blocks(both, block=2).values()) == {2}

    @pytest.mark.parametrize(
        ("wished", "width", "expected"),
        [(16, 576, 16), (128, 576, 64), (32, 1536, 32), (32, 40, 8), (48, 96, 16), (96, 576, 32), (16, 7, 1)],
    )
    def test_where_it_does_not_divide(self, wished: int, width: int, expected: int) -> None:
        assert block_size(wished, width) == expected

    @pytest.mark.parametrize("block", [0, -16, 48])
    def test_only_powers_of_two(self, block: int) -> None:
        with pytest.raises(UsageError, match="`block` must be a power of two"):
            BlockHadamardConfig(block=block)


class TestOperator:
    def test_the_matrix(self, context: TransformContext) -> None:
        """One Sylvester matrix a block and nothing between the blocks."""
        (operator,) = BlockHadamard().plan(context, BlockHadamardConfig(block=4)).operators["layers.0.attn_in"]
        h = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
        expected = np.zeros((24, 24))
        for start in range(0, 24, 4):
            expected[start : start + 4, start : start + 4] = h
        np.testing.assert_allclose(operator.to_dense().numpy(), expected, atol=1e-15)

    def test_signs_follow_the_seed_and_differ_from_site_to_site(self, context: TransformContext) -> None:
        def signs(seed: int, site: str) -> torch.Tensor:
            proposal = BlockHadamard().plan(replace(context, seed=seed), BlockHadamardConfig(random=True))
            return proposal.operators[site][0].state()[0]["signs"]

        first = signs(0, "layers.0.attn_in")
        assert torch.equal(first, signs(0, "layers.0.attn_in"))
        assert not torch.equal(first, signs(1, "layers.0.attn_in"))
        assert not torch.equal(first, signs(0, "layers.1.attn_in"))

    def test_an_outlier_stays_in_its_group(self, context: TransformContext) -> None:
        (operator,) = BlockHadamard().plan(context, BlockHadamardConfig(block=8)).operators["layers.0.mlp_in"]
        x = torch.zeros(24)
        x[9] = 8.0
        expected = torch.zeros(24)
        expected[8:16] = 8.0 / 8**0.5
        torch.testing.assert_close(operator.act(x).abs(), expected)
