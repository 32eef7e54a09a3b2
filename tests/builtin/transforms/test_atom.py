"""Atom: the order of channels, the segment behind it, and less error where a few channels are large."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.builtin.transforms.atom import Atom, AtomConfig, segment_channels
from qtool.engine.fold import fold_block
from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding
from qtool.engine.planner import extend
from qtool.engine.problem import LayerProblem
from qtool.errors import UsageError
from qtool.model.plan import Plan, Segment
from qtool.model.statistics import SiteStatistics
from qtool.numerics.operators import Perm
from qtool.plugins import Plugins
from qtool.scheme import parse_tensor_scheme
from qtool.steps.schemes import parse_model_scheme
from qtool.steps.transform import context_of
from qtool.testing import TinyModel, check_transform, plan_of, tiny_model

PLUGINS = Plugins.discover()


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("qwen2_moe") as made:
        yield made


@pytest.mark.parametrize(
    ("wished", "width", "group", "expected"),
    [
        (128, 4096, 128, 128),
        (128, 4096, 1, 128),
        (128, 4096, 96, 96),
        (150, 4096, 100, 200),  # ties of rounding aside, the nearest multiple
        (10, 4096, 128, 128),  # one group at least
        (128, 192, 32, 96),  # half of the channels at most
        (128, 64, 1, 32),
        (128, 128, 128, 0),
        (128, 100, 128, 0),
    ],
)
def test_a_segment_ends_where_groups_end(wished: int, width: int, group: int, expected: int) -> None:
    assert segment_channels(wished, width, group) == expected


def test_channels_are_in_the_order_of_their_energy(tiny: TinyModel) -> None:
    subject, plan = plan_of(Atom(), AtomConfig(outliers=5), tiny)
    context = context_of(subject, tiny.statistics)
    sites = {linear.reads for linear in subject.model.graph.linears}
    assert {site for site, one in plan.sites.items() if one.operators} == sites
    for site, one in plan.sites.items():
        (perm,) = one.operators
        assert isinstance(perm, Perm)
        energy = context.statistics[site].entries["hessian"].diagonal().tolist()
        ordered = [energy[channel] for channel in perm.index.tolist()]
        assert ordered == sorted(energy)
        assert one.segments == (Segment(5, "int8"),)
        assert one.folded == int(site.endswith("up_down")), site


def test_what_writes_down_projections_is_reordered_and_runs_nothing(tiny: TinyModel) -> None:
    subject, plan = plan_of(Atom(), AtomConfig(), tiny)
    graph, layer = subject.model.graph, 1
    state = subject.model.tensors(f"{graph.block_name(layer)}.")
    folded = fold_block(graph, plan, layer, state)
    for site in graph.of_kind("up_down", layer):
        order = plan.at(site.id).operators[0]
        assert isinstance(order, Perm)
        down = next(linear for linear in graph.linears_of(layer) if linear.reads == site.id).spec.module
        around = down.rpartition(".")[0]
        before = plan.at(f"layers.{layer}.mlp_in").operators[0]
        assert isinstance(before, Perm)
        for writer in ("gate_proj", "up_proj"):
            weight = state[f"{around}.{writer}.weight"]
            expected = weight[order.index][:, before.index]
            assert torch.equal(folded[f"{around}.{writer}.weight"], expected), writer


def test_groups_of_the_scheme_decide_where_segments_end(tiny: TinyModel) -> None:
    scheme = parse_model_scheme("W4A4-g8", PLUGINS.format, PLUGINS.presets)
    _, plan = plan_of(Atom(), AtomConfig(outliers=5), tiny, scheme=scheme)
    widths = {plan.at(site).operators[0].dim: plan.at(site).segments for site in plan.sites}
    assert all(segments == (Segment(8, "int8"),) for segments in widths.values())
    apart = replace(scheme, activations=parse_tensor_scheme("int4-asym-g12", PLUGINS.format, vector="token"))
    _, none = plan_of(Atom(), AtomConfig(), tiny, scheme=apart)  # 24 channels, and groups end together there
    assert not none.at("layers.0.attn_in").operators


def test_an_expert_that_saw_nothing_keeps_its_order(tiny: TinyModel) -> None:
    subject = tiny.subject
    context = context_of(subject, tiny.statistics)
    known = dict(context.statistics)
    known["layers.1.experts.2.up_down"] = SiteStatistics(0, {})
    found = Atom().plan(replace(context, statistics=MappingProxyType(known)), AtomConfig())
    assert "layers.1.experts.2.up_down" not in found.operators
    assert "layers.1.experts.1.up_down" in found.operators
    extend(Plan(), found, subject.model.graph, method="atom")


@pytest.mark.parametrize("method", [(RTN(), ClipOptions()), (GPTQ(), GPTQConfig())], ids=["rtn", "gptq"])
def test_large_channels_set_apart_lower_the_error_of_w4a4(method: tuple[RTN | GPTQ, ClipOptions]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 128, generator=generator)
    x[:, torch.randperm(128, generator=generator)[:4]] *= 30
    weight = torch.randn(32, 128, generator=generator) / 10
    weights = parse_tensor_scheme("int4-g16", PLUGINS.format)
    inputs = parse_tensor_scheme("int4-asym-g16-sfp32", PLUGINS.format, vector="token")
    hessian = x.T @ x / len(x)
    order = torch.argsort(hessian.diagonal())

    def error(perm: torch.Tensor, *segments: Segment) -> float:
        grids = [Grid.segmented(scheme, segments, PLUGINS.format) for scheme in (weights, inputs)]
        turned, seen = weight[:, perm].contiguous(), hessian[perm][:, perm].contiguous()
        solved = method[0].quantize(LayerProblem("layer", turned, grids[0], hessian=seen), method[1])  # type: ignore[arg-type]
        rounded = Rounding(grids[1])(x[:, perm]) @ solved.weight(grids[0]).T
        return float((rounded - x @ weight.T).square().mean() / (x @ weight.T).square().mean())

    plain, sorted_only = error(torch.arange(128)), error(order)
    apart = error(order, Segment(16, "int8"))
    assert apart < sorted_only / 5
    assert apart < plain / 5


def test_the_function_stays() -> None:
    check_transform(Atom(), families=["llama", "gemma2"])


@pytest.mark.slow
def test_the_function_stays_in_every_family() -> None:
    check_transform(Atom())


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="`outliers` must be positive"):
        AtomConfig(outliers=0)
