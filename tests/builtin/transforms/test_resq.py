"""ResQ: the subspaces, where they end up, and less error where a few directions are strong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.builtin.transforms.quarot import QuaRot, QuaRotConfig
from qtool.builtin.transforms.resq import ResQ, ResQConfig, split_basis, value_moments
from qtool.builtin.transforms.smoothquant import SmoothQuant, SmoothQuantConfig
from qtool.engine.carry import CarriedStatistics
from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding
from qtool.engine.planner import extend
from qtool.errors import UsageError
from qtool.model.graph import RESIDUAL
from qtool.model.plan import Plan, Segment
from qtool.numerics.operators import Hadamard, Orthogonal, Perm
from qtool.numerics.random_orthogonal import random_orthogonal
from qtool.plugins import Plugins
from qtool.scheme import parse_tensor_scheme
from qtool.steps.schemes import parse_model_scheme
from qtool.steps.transform import context_of
from qtool.testing import TinyModel, check_transform, plan_of, tiny_model

PLUGINS = Plugins.discover()


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("llama") as made:
        yield made


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("heads", [None, 3])
def test_the_last_channels_are_the_principal_subspace(heads: int | None) -> None:
    mixing = drawn(*(() if heads is None else (heads,)), 16, 16)
    moments = mixing @ mixing.mT
    basis = split_basis(moments, 4, torch.Generator().manual_seed(1))
    assert basis.shape == moments.shape
    torch.testing.assert_close(basis @ basis.mT, torch.eye(16).double().expand_as(basis), atol=1e-12, rtol=0)
    turned = basis.mT @ moments @ basis
    for own, behind in zip(moments.reshape(-1, 16, 16), turned.reshape(-1, 16, 16), strict=True):
        strongest = torch.linalg.eigvalsh(own)[-4:].sum()
        assert float(behind.diagonal()[-4:].sum()) == pytest.approx(float(strongest), rel=1e-10)
        assert float(behind[:12, 12:].abs().max()) < 1e-10 * float(own.abs().max())  # the subspaces do not mix
        assert float(behind[12:, 12:].triu(1).abs().max()) > 1e-3 * float(own.abs().max())  # each is rotated inside
        assert float(behind[:12, :12].triu(1).abs().max()) > 1e-3 * float(own.abs().max())


def test_fewer_tokens_than_channels_are_enough() -> None:
    x = drawn(3, 16)
    basis = split_basis(x.T @ x, 4, torch.Generator().manual_seed(1))
    assert bool(torch.isfinite(basis).all())
    assert float((x @ basis)[:, :12].abs().max()) < 1e-7


def test_value_heads_go_by_the_query_heads_that_share_them() -> None:
    x = drawn(50, 4 * 6)
    found = value_moments(x.T @ x / 50, 6, 2)
    for head in range(2):
        parts = [x[:, 6 * query : 6 * query + 6] for query in (2 * head, 2 * head + 1)]
        expected = sum(part.T @ part / 50 for part in parts) / 2
        torch.testing.assert_close(found[head], expected)


class TestPlan:
    def test_energy_gathers_at_the_end_of_every_input(self, tiny: TinyModel) -> None:
        subject, plan = plan_of(ResQ(), ResQConfig(), tiny)
        behind = CarriedStatistics(tiny.statistics, subject.model, plan)
        dims = subject.model.graph.dims
        total = torch.zeros(dims.hidden).double()
        for layer in range(dims.num_layers):
            for name in ("attn_in", "mlp_in"):
                site = f"layers.{layer}.{name}"
                assert plan.at(site).segments == (Segment(3, "int8"),)
                total += behind[site].entries["hessian"].diagonal().double()
        alone = CarriedStatistics(tiny.statistics, subject.model, Plan(fold_norms=True))
        moments = sum(
            alone[f"layers.{i}.{name}"].entries["hessian"].double()
            for i in range(dims.num_layers)
            for name in ("attn_in", "mlp_in")
        )
        strongest = torch.linalg.eigvalsh(moments)[-3:].sum()
        assert float(total[-3:].sum()) == pytest.approx(float(strongest), rel=1e-5)

    def test_strong_channels_of_all_heads_are_behind_the_others(self, tiny: TinyModel) -> None:
        subject, plan = plan_of(ResQ(), ResQConfig(share=0.25), tiny)
        dims = subject.model.graph.dims
        behind = CarriedStatistics(tiny.statistics, subject.model, plan)
        original = CarriedStatistics(tiny.statistics, subject.model, Plan())
        for layer in range(dims.num_layers):
            site = plan.at(f"layers.{layer}.o_in")
            assert (site.folded, site.segments) == (0, (Segment(8, "int8"),))
            (gather,) = site.operators
            assert isinstance(gather, Perm)
            last = gather.index[-8:].tolist()
            assert last == [8 * head + channel for head in range(4) for channel in (6, 7)]
            (rotation,) = plan.at(f"layers.{layer}.vo").operators
            assert isinstance(rotation, Orthogonal)
            assert (rotation.heads, plan.at(f"layers.{layer}.vo").folded) == (2, 1)
            moments = value_moments(original[f"layers.{layer}.o_in"].entries["hessian"].double(), 8, 2)
            strongest = 2 * torch.linalg.eigvalsh(moments)[:, -2:].sum()
            found = behind[f"layers.{layer}.o_in"].entries["hessian"].diagonal()[-8:].sum()
            assert float(found) == pytest.approx(float(strongest), rel=1e-5)

    def test_down_projections_have_block_hadamards_and_no_segment(self, tiny: TinyModel) -> None:
        _, plan = plan_of(ResQ(), ResQConfig(), tiny)
        site = plan.at("layers.0.up_down")
        (operator,) = site.operators
        assert isinstance(operator, Hadamard)
        assert (operator.dim, operator.block_size, site.segments, site.folded) == (40, 8, (), 0)

    def test_segments_end_where_groups_end(self, tiny: TinyModel) -> None:
        scheme = parse_model_scheme("W4A4-g8", PLUGINS.format, PLUGINS.presets)
        _, plan = plan_of(ResQ(), ResQConfig(), tiny, scheme=scheme)
        assert plan.at("layers.0.attn_in").segments == (Segment(8, "int8"),)
        coarse = replace(scheme, weights=parse_tensor_scheme("int4-g24", PLUGINS.format))
        _, plan = plan_of(ResQ(), ResQConfig(), tiny, scheme=coarse)
        assert not plan.at("layers.0.attn_in").segments
        assert plan.at(RESIDUAL).operators

    def test_scales_of_a_method_to_the_left_do_not_reach_the_residual(self, tiny: TinyModel) -> None:
        subject, alone = plan_of(ResQ(), ResQConfig(), tiny)
        graph = subject.model.graph
        context = context_of(subject, tiny.statistics)
        smooth = extend(Plan(), SmoothQuant().plan(context, SmoothQuantConfig()), graph, method="smoothquant")
        behind = context_of(replace(subject, plan=smooth), tiny.statistics, scheme=context.scheme)
        proposal = ResQ().plan(behind, ResQConfig())
        (ours,), (theirs,) = proposal.operators[RESIDUAL], alone.at(RESIDUAL).operators
        assert isinstance(ours, Orthogonal)
        assert isinstance(theirs, Orthogonal)
        torch.testing.assert_close(ours.q, theirs.q)
        rotated = extend(Plan(), QuaRot().plan(context, QuaRotConfig()), graph, method="quarot")
        behind = context_of(replace(subject, plan=rotated), tiny.statistics)
        moments = behind.residual["layers.0.attn_in"].entries["hessian"]
        (hadamard,) = rotated.at(RESIDUAL).operators
        plain = context.residual["layers.0.attn_in"].entries["hessian"]
        torch.testing.assert_close(moments, hadamard.act(hadamard.act(plain).mT).mT, atol=1e-5, rtol=1e-4)


def test_a_strong_subspace_lowers_the_error_of_four_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=generator)
    x[:, :6] *= 25
    x = (x.double() @ random_orthogonal(64, generator)).float()  # no channel stands out, a few directions do
    scheme = parse_tensor_scheme("int4-sym-token-sfp32", PLUGINS.format, vector="token")

    def error(basis: Tensor, *segments: Segment) -> float:
        turned = (x.double() @ basis).float()
        rounded = Rounding(Grid.segmented(scheme, segments, PLUGINS.format))(turned)
        return float((rounded - turned).square().mean())

    basis = split_basis((x.T @ x).double(), 8, generator)
    rotated = error(random_orthogonal(64, generator))
    assert error(basis, Segment(8, "int8")) < rotated / 20
    assert error(basis) > rotated / 4  # it is not the basis alone
    assert error(random_orthogonal(64, generator), Segment(8, "int8")) > rotated / 4  # nor the segment alone


def test_the_function_stays() -> None:
    check_transform(ResQ(), families=["llama", "qwen3"])


def test_families_whose_residual_cannot_be_rotated_are_refused() -> None:
    with pytest.raises(UsageError, match="`ResQ` is not exact on this model: `orthogonal` cannot be folded"):
        check_transform(ResQ(), families=["gemma2"])


@pytest.mark.slow
def test_the_function_stays_in_every_family() -> None:
    check_transform(ResQ())


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 0.6}, {"block": 24}])
def test_options_that_mean_nothing_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"`share` is above 0|`block` must be a power of two"):
        ResQConfig(**options)  # type: ignore[arg-type]
