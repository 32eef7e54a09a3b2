"""WUSH: the identities of the paper, a numpy oracle, and less error than what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from qtool.builtin.transforms.wush import WUSH, AffineBlockConfig, finished, wush_matrices
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, NumericalError, UsageError
from qtool.model.plan import TransformContext
from qtool.model.statistics import SiteStatistics
from qtool.numerics.groups import from_groups, to_groups
from qtool.numerics.operators import Block, Hadamard, Operator
from qtool.numerics.second_moments import dampened, diagonal_blocks, weight_moment_blocks
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, TensorScheme, parse_tensor_scheme
from qtool.steps.schemes import parse_model_scheme
from qtool.steps.transform import context_of
from qtool.testing import TinyModel, check_transform, plan_of, tiny_model

FAMILIES = ("qwen3", "qwen2-moe")
Matrix = npt.NDArray[np.float64]


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


def matrices(context: TransformContext, **options: Any) -> dict[str, Tensor]:  # noqa: ANN401 - options of different types
    """The blocks by site."""
    proposal = WUSH().plan(context, AffineBlockConfig(**options))
    found = {}
    for site, (operator,) in proposal.operators.items():
        assert isinstance(operator, Block)
        assert operator.n == context.graph.site(site).dim
        found[site] = operator.matrices.double()
    return found


def oracle(weight: Matrix, hessian: Matrix, size: int, dampening: float) -> list[tuple[Matrix, Matrix]]:
    """``T_act`` and ``T_wgt`` of the paper's equations, one block after the other, each from its own formula."""
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    h = h / np.sqrt(size)
    found = []
    for start in range(0, len(hessian), size):
        rows = weight[:, start : start + size]
        m_w = rows.T @ rows / len(rows)
        m_x = hessian[start : start + size, start : start + size]
        m_w = m_w + dampening * np.trace(m_w) / size * np.eye(size)
        m_x = m_x + dampening * np.trace(m_x) / size * np.eye(size)
        l_w, l_x = np.linalg.cholesky(m_w), np.linalg.cholesky(m_x)
        u, s, vt = np.linalg.svd(l_w.T @ l_x)
        root = h @ np.diag(s**-0.5)
        found.append((root @ u.T @ l_w.T, root @ vt @ l_x.T))
    return found


class TestInvariance:
    def test_families(self) -> None:
        check_transform(WUSH(), AffineBlockConfig(block=8), families=FAMILIES)

    def test_a_transform_that_is_badly_conditioned(self) -> None:
        check_transform(WUSH(), AffineBlockConfig(block=8, dampening=1e-7, max_condition=1e6), families=("qwen2",))

    @pytest.mark.slow
    def test_every_family(self) -> None:
        check_transform(WUSH())


class TestFormula:
    def test_the_paper_block_by_block(self, context: TransformContext) -> None:
        """Signs of singular vectors are free, so what does not depend on them is compared: T Tᵀ, and T_act T_wgtᵀ."""
        found = matrices(context, block=8, dampening=0.02)
        for site_id in ("layers.0.attn_in", "layers.1.mlp_in", "layers.1.experts.2.up_down"):
            weights = [context.weights(linear.name) for linear in context.graph.consumers(context.graph.site(site_id))]
            assert len(weights) == {"attn_in": 3, "mlp_in": 10, "up_down": 1}[site_id.rpartition(".")[2]]
            hessian = context.statistics[site_id].entries["hessian"].double().numpy()
            expected = oracle(torch.cat(weights).double().numpy(), hessian, 8, 0.02)
            assert len(expected) == len(found[site_id])
            for t, (act, weight) in zip(found[site_id].numpy(), expected, strict=True):
                np.testing.assert_allclose(act @ weight.T, np.eye(8), atol=1e-9)
                np.testing.assert_allclose(t @ t.T, act.T @ act, rtol=1e-4, atol=1e-5 * np.abs(act).max() ** 2)

    def test_both_moments_become_alike_with_equal_diagonals(self) -> None:
        weights, inputs = moments(seed=1), moments(seed=2)
        t = wush_matrices(weights, inputs)
        inverse = torch.linalg.inv(t)
        s = t.mT @ inputs @ t
        torch.testing.assert_close(inverse @ weights @ inverse.mT, s)
        torch.testing.assert_close(s, torch.diag_embed(s.diagonal(dim1=-2, dim2=-1)), rtol=1e-9, atol=1e-9)
        assert bool((s.diagonal(dim1=-2, dim2=-1).diff() <= 0).all())

    def test_the_hadamard_makes_all_channels_of_a_block_alike(self, context: TransformContext) -> None:
        found, plain = (matrices(context, block=8, dampening=0.01, hadamard=choice) for choice in ("on", "off"))
        for site_id in ("layers.0.attn_in", "layers.1.mlp_in", "layers.0.up_down"):
            t, hessian = found[site_id], context.statistics[site_id].entries["hessian"]
            blocks = torch.stack([hessian[i : i + 8, i : i + 8] for i in range(0, len(hessian), 8)])
            energies = (t.mT @ dampened(blocks, 0.01) @ t).diagonal(dim1=-2, dim2=-1)
            torch.testing.assert_close(energies, energies.mean(-1, keepdim=True).expand_as(energies), rtol=1e-3, atol=0)
            torch.testing.assert_close(t @ t.mT, plain[site_id] @ plain[site_id].mT, rtol=1e-3, atol=1e-4)

    def test_no_transform_of_the_block_has_less_energy(self) -> None:
        """``tr(Tᵀ M_X T) tr(T⁻¹ M_W T⁻ᵀ)``, what is lost with one scale a block, is least: Cauchy and Schwarz."""

        def energy(t: Tensor) -> Tensor:
            inverse = torch.linalg.inv(t)
            return (t.mT @ inputs @ t).trace() * (inverse @ weights @ inverse.mT).trace()

        weights, inputs = moments(1, seed=3)[0], moments(1, seed=4)[0]
        best = wush_matrices(weights, inputs)
        generator = torch.Generator().manual_seed(0)
        for size in (1e-3, 0.1, 1.0):
            for _ in range(20):
                change = torch.randn(best.shape, generator=generator, dtype=torch.float64) * size
                assert energy(best) <= energy(best + change * best.abs().mean()) * (1 + 1e-12)


class TestOptions:
    def test_the_cap_holds(self, context: TransformContext) -> None:
        free, capped = (matrices(context, block=8, dampening=0.01, max_condition=most) for most in (1e3, 2.0))
        assert max(float(torch.linalg.cond(t).max()) for t in free.values()) > 2.5
        assert max(float(torch.linalg.cond(t).max()) for t in capped.values()) < 2.0001
        rotation = matrices(context, block=8, max_condition=1.0)["layers.0.attn_in"]
        gram = rotation @ rotation.mT
        torch.testing.assert_close(gram, gram[:, :1, :1] * torch.eye(8).double(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("scheme", "rotated"),
        [("NVFP4", False), ("NVFP4A16", False), ("MXFP4", True), ("W4A4-g16", True), ("FP8", True)],
    )
    def test_blocks_are_rotated_unless_scales_are_fine(
        self, context: TransformContext, subject: Subject, scheme: str, rotated: bool
    ) -> None:
        parsed = parse_model_scheme(scheme, subject.plugins.format, subject.plugins.presets)
        known = replace(context, scheme=parsed)
        auto, on, off = (matrices(known, hadamard=choice)["layers.0.attn_in"] for choice in ("auto", "on", "off"))
        assert torch.equal(auto, on if rotated else off)
        assert not torch.equal(on, off)

    def test_both_sides_must_be_fine(self, context: TransformContext, subject: Subject) -> None:
        fine, coarse = (parse_tensor_scheme(name, subject.plugins.format) for name in ("nvfp4", "fp4-g32-se4m3"))
        for weights, activations in ((fine, coarse), (coarse, fine)):
            mixed = replace(context, scheme=ModelScheme(weights=weights, activations=activations))
            auto, on = (matrices(mixed, block=8, hadamard=choice)["layers.0.o_in"] for choice in ("auto", "on"))
            assert torch.equal(auto, on)

    def test_the_scale_group_is_the_block(self, context: TransformContext, subject: Subject) -> None:
        scheme = parse_model_scheme("NVFP4", subject.plugins.format, subject.plugins.presets)
        sizes = {site: t.shape[-1] for site, t in matrices(replace(context, scheme=scheme)).items()}
        assert sizes["layers.1.experts.0.up_down"] == 16
        assert sizes["layers.0.attn_in"] == 8  # 16 does not divide 24
        assert sizes["layers.1.shared.up_down"] == 4

    def test_it_runs_online_everywhere(self, tiny: TinyModel) -> None:
        plan = plan_of(WUSH(), AffineBlockConfig(sites="mlp_in,up_down"), tiny)[1]
        assert {site.rpartition(".")[2] for site in plan.sites} == {"mlp_in", "up_down"}
        assert all(site.folded == 0 for site in plan.sites.values())

    @pytest.mark.parametrize("dampening", [0.0, -1.0, 11.0, float("nan")])
    def test_dampening_is_a_fraction(self, dampening: float) -> None:
        with pytest.raises(UsageError, match="`dampening` must lie above 0"):
            AffineBlockConfig(dampening=dampening)

    @pytest.mark.parametrize("most", [0.5, float("nan")])
    def test_a_condition_number_is_one_or_more(self, most: float) -> None:
        with pytest.raises(UsageError, match="`max_condition` must be 1 or more"):
            AffineBlockConfig(max_condition=most)


class TestWhatLittleIsKnown:
    def test_without_a_hessian_it_says_what_to_gather(self, context: TransformContext) -> None:
        bare = {site: SiteStatistics(1, {"absmax": torch.ones(1)}) for site in context.statistics}
        with pytest.raises(ArtifactError, match=r"lack `hessian` at `layers\.0\.attn_in`"):
            matrices(replace(context, statistics=bare))

    def test_an_expert_of_which_nothing_was_gathered_is_left_out(self, context: TransformContext) -> None:
        some = {**context.statistics, "layers.1.experts.3.up_down": SiteStatistics(0, {})}
        found = matrices(replace(context, statistics=some))
        assert "layers.1.experts.3.up_down" not in found
        assert "layers.1.experts.2.up_down" in found

    def test_dead_channels_and_blocks(self, context: TransformContext) -> None:
        """Zeros in inputs or weights leave every block invertible and finite."""
        hessian = torch.zeros(24, 24)
        hessian[9, 9] = 1e-12
        hessian[16:, 16:] = 1e12
        some = {**context.statistics, "layers.0.attn_in": SiteStatistics(1, {"hessian": hessian})}

        def weights(name: str) -> Tensor:
            weight = context.weights(name).clone()
            weight[:, :4] = 0.0
            weight[:, 8:16] = 0.0
            return weight

        found = matrices(replace(context, statistics=some, weights=weights), block=8)["layers.0.attn_in"]
        assert bool(found.isfinite().all())
        assert float(torch.linalg.cond(found).max()) <= 1000.1

    def test_what_is_not_positive_definite_is_refused(self) -> None:
        with pytest.raises(NumericalError, match="not positive definite"):
            wush_matrices(torch.eye(4).double()[None], -torch.eye(4).double()[None])


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "int4-g16", "int4-g32"])
def test_less_error_than_no_transform_and_than_a_hadamard(scheme: str) -> None:
    """Correlated inputs with loud channels; weights and inputs rounded to nearest."""
    fmt = Plugins.discover().format
    parsed = parse_tensor_scheme(scheme, fmt)
    weight, x = problem()
    size = parsed.group_size
    assert size is not None
    both = (
        dampened(weight_moment_blocks([weight], size), 0.01),
        dampened(diagonal_blocks(x.mT @ x / len(x), size), 0.01),
    )
    wush = Block(finished(wush_matrices(*both), AffineBlockConfig(), ModelScheme(weights=parsed)), 64)

    def error(operator: Operator | None) -> float:
        ours = (weight, x) if operator is None else (operator.weight_in(weight), operator.act(x))
        w, inputs = (rounded(one, parsed) for one in ours)
        exact = x @ weight.T
        return float((inputs @ w.T - exact).norm() / exact.norm())

    none, rotated, best = error(None), error(Hadamard(64, block_size=size)), error(wush)
    assert best < 0.75 * min(none, rotated)


def moments(count: int = 3, *, seed: int) -> Tensor:
    """Second moments of correlated rows."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(count, 8, 8, generator=generator, dtype=torch.float64)
    return mixing @ mixing.mT + 0.01 * torch.eye(8, dtype=torch.float64)


def problem() -> tuple[Tensor, Tensor]:
    """A weight [48, 64] and inputs [512, 64] that are correlated within neighbouring channels, some of them loud."""
    generator = torch.Generator().manual_seed(0)
    loud = torch.exp(1.2 * torch.randn(64, generator=generator))
    mixing = torch.block_diag(*(torch.randn(32, 32, generator=generator) for _ in range(2)))
    x = torch.randn(512, 64, generator=generator) @ mixing * loud
    weight = torch.randn(48, 24, generator=generator) @ torch.randn(24, 64, generator=generator)
    return weight, x


def rounded(values: Tensor, scheme: TensorScheme) -> Tensor:
    """Values rounded to nearest."""
    fmt = Plugins.discover().format(scheme.format)
    groups = to_groups(values, scheme.strategy, scheme.group_size)
    parameters = fmt.fit(groups, scheme, global_scale=fmt.global_scale(values.abs().amax(), scheme))
    return from_groups(fmt.round(groups, parameters), values.shape)
