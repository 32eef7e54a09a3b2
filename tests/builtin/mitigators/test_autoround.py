"""AutoRound: one step by hand, the start where nothing is learned, and never a worse block whatever is around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qtool.artifacts.store import Artifact
from qtool.builtin.mitigators.autoround import AutoRound, AutoRoundConfig
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.lorc import LoRC, LoRCConfig
from qtool.builtin.mitigators.lwc import LWC
from qtool.builtin.mitigators.rtn import RTN, ClipOptions, round_nearest
from qtool.engine.block_problem import BlockProblem, BlockResult
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import NumericalError, SchemeError, UsageError
from qtool.numerics.levels import levels
from qtool.numerics.losses import relative_loss
from qtool.scheme import parse_tensor_scheme
from qtool.steps.subjects import open_subject
from tests.builtin.mitigators.block_cases import (
    FORMATS,
    HandBlock,
    Tinies,
    by_hand,
    decoded,
    measured_loss,
    tiny_models,
    watch,
)
from tests.oracles.learned_rounding import as_stored, asymmetric_oracle, symmetric_oracle

FEW = AutoRoundConfig(steps=12, batch=3, rate=0.06, range_rate=0.004)


@pytest.fixture(scope="module")
def tinies() -> Iterator[Tinies]:
    with tiny_models() as made:
        yield made


def gptq(of: LayerProblem) -> QuantizedLinear:
    return GPTQ().quantize(of, GPTQConfig())


def gptq_lorc(of: LayerProblem) -> QuantizedLinear:
    return LoRC().quantize(of.after(gptq(of)), LoRCConfig(rank=4, dtype="int8"))


def rtn_clipped(of: LayerProblem) -> QuantizedLinear:
    return RTN().quantize(of, ClipOptions(clip="search"))


def grouped(weight: Tensor, size: int) -> Tensor:
    return weight.reshape(-1, size)


class TestOneStep:
    """The step of the paper, by plain autograd through fake quantizers written by hand."""

    def stepped(self, hand: HandBlock, **options: float) -> dict[str, Tensor]:
        """The weights behind one step on all windows, as the block is judged with them."""
        AutoRound().refine(hand.problem(), AutoRoundConfig(steps=1, batch=8, **options))  # type: ignore[arg-type]
        assert len(hand.run) == 3  # judged, learned from, judged
        return hand.run[2]

    @pytest.mark.parametrize(
        "options",
        [{"rate": 0.2, "range_rate": 0.05}, {"rate": 0.03, "range_rate": 0.03}, {"rate": 0.2}, {"learn_ranges": False}],
    )
    def test_symmetric(self, options: dict[str, float]) -> None:
        hand = HandBlock("int3-g16-sfp32")
        # Without a rate of its own a step of one is as long as the offset, and as the range, can become.
        rate = options.get("rate", 1.0)
        range_rate = options.get("range_rate", 1.0) if options.get("learn_ranges", True) else 0.0
        start = {name: round_nearest(one).parameters[0].scale.flatten() for name, one in hand.problems.items()}
        leaves: dict[str, tuple[Tensor, Tensor]] = {}
        for name, one in hand.problems.items():
            zeros, ones = torch.zeros_like(grouped(one.weight, 16)), torch.ones_like(start[name])
            leaves[name] = (zeros.requires_grad_(True), ones.requires_grad_(True))

        def weights() -> dict[str, Tensor]:
            return {
                name: symmetric_oracle(
                    grouped(one.weight, 16), start[name] * leaves[name][1], leaves[name][0], bits=3
                ).reshape(one.weight.shape)
                for name, one in hand.problems.items()
            }

        rows = range(8)
        loss = (by_hand(weights(), hand.states) - hand.targets(rows)).square().mean()
        flat = [leaf for pair in leaves.values() for leaf in pair]
        for (offset, factor), (of_offset, of_factor) in zip(
            leaves.values(), _pairs(torch.autograd.grad(loss, flat)), strict=True
        ):
            assert of_offset.count_nonzero() > 0.9 * of_offset.numel()
            with torch.no_grad():
                offset.sub_(rate * of_offset.sign()).clamp_(-0.5, 0.5)
                factor.sub_(range_rate * of_factor.sign()).clamp_(0.01, 1.0)
        found, expected = self.stepped(hand, **options), weights()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name].detach(), rtol=1e-5, atol=1e-6)

    def test_both_ends_of_asymmetric_ranges(self) -> None:
        hand = HandBlock("int4-asym-g16")
        ends, leaves = {}, {}
        for name, one in hand.problems.items():
            (own,) = round_nearest(one).parameters
            assert own.zero_point is not None
            scale, zero = own.scale.flatten(), own.zero_point.flatten()
            ends[name] = (-zero * scale, (15 - zero) * scale)
            zeros, ones = torch.zeros_like(grouped(one.weight, 16)), torch.ones_like(scale)
            leaves[name] = [leaf.requires_grad_(True) for leaf in (zeros, ones, ones.clone())]

        def weights() -> dict[str, Tensor]:
            made = {}
            for name, one in hand.problems.items():
                (low, high), (offset, below, above) = ends[name], leaves[name]
                fake = asymmetric_oracle(
                    grouped(one.weight, 16), (low * below, high * above), offset, bits=4, dtype=torch.bfloat16
                )
                made[name] = fake.reshape(one.weight.shape)
            return made

        loss = (by_hand(weights(), hand.states) - hand.targets(range(8))).square().mean()
        flat = [leaf for own in leaves.values() for leaf in own]
        gradients = torch.autograd.grad(loss, flat)
        with torch.no_grad():
            for leaf, gradient in zip(flat, gradients, strict=True):
                leaf.sub_((0.2 if leaf.ndim == 2 else 0.1) * gradient.sign())
                leaf.clamp_(*((-0.5, 0.5) if leaf.ndim == 2 else (0.01, 1.0)))
        found, expected = self.stepped(hand, rate=0.2, range_rate=0.1), weights()
        for name in expected:
            # A gradient that is 0 but for rounding may go either way, and with it a whole group.
            near = (found[name] - expected[name].detach()).abs() < 1e-5
            assert near.double().mean() > 0.98

    @pytest.mark.parametrize(("text", "reach"), [("int4-g16-sfp32", 0.5), ("fp4-g16-sfp32", 1.0)])
    def test_offsets_reach_further_where_levels_are_not_even(self, text: str, reach: float) -> None:
        """From step one on, the last, every offset is at its limit; each sign is that of a gradient by hand."""
        hand = HandBlock(text)
        starts = {name: round_nearest(one) for name, one in hand.problems.items()}
        leaves = {name: start.weight(hand.problems[name].grid).requires_grad_(True) for name, start in starts.items()}
        loss = (by_hand(leaves, hand.states) - hand.targets(range(8))).square().mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        found = self.stepped(hand, learn_ranges=False)
        for name, one in hand.problems.items():
            (own,), (part,) = starts[name].parameters, one.grid.parts
            steps, table = grouped(one.weight, 16) / own.scale.flatten().unsqueeze(-1), levels(part.format)
            place = torch.from_numpy(np.interp(steps, table, range(len(table))))
            place -= reach * grouped(gradients[name], 16).sign()
            expected = table[place.round().clamp(0, len(table) - 1).long()] * own.scale.flatten().unsqueeze(-1)
            inside = (steps > table[0]) & (steps < table[-1])
            torch.testing.assert_close(grouped(found[name], 16)[inside], expected[inside], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(("text", "rate"), [("int4-g16", 0.05), ("nvfp4", 0.1)])
    def test_by_default_the_steps_together_just_reach_the_limit(self, text: str, rate: float) -> None:
        found = [
            AutoRound().refine(
                HandBlock(text).problem(), AutoRoundConfig(steps=20, batch=8, learn_ranges=False, rate=own)
            )
            for own in (0.0, rate, rate / 2)
        ]
        for name, plain in found[0].linears.items():
            assert torch.equal(plain.codes, found[1].linears[name].codes)
        assert any(not torch.equal(one.codes, found[2].linears[name].codes) for name, one in found[0].linears.items())

    def test_ranges_may_grow_where_that_is_allowed(self) -> None:
        ranges = []
        for widest in (1.0, 1.5):
            hand = HandBlock("int3-g16-c0.6")
            found = AutoRound().refine(hand.problem(), replace(FEW, widest=widest, range_rate=0.05))
            before = {name: round_nearest(one).parameters[0].scale for name, one in hand.problems.items()}
            ratios = [found.linears[n].parameters[0].scale / before[n] for n in before]
            ranges.append(max(float(ratio.max()) for ratio in ratios))
        assert ranges[0] == 1.0
        assert 1.0 < ranges[1] <= 1.51


@pytest.mark.parametrize("text", ["int3-g16", "int4-asym-g16", "nvfp4", "fp8"])
@pytest.mark.parametrize("first", [None, gptq, rtn_clipped, gptq_lorc])
def test_no_steps_leave_the_start_as_it_is(text: str, first: Any) -> None:  # noqa: ANN401 - a function or None
    hand = HandBlock(text, first)
    found = AutoRound().refine(hand.problem(), AutoRoundConfig(steps=0))
    for name, problem in hand.problems.items():
        expected = problem.previous or round_nearest(problem)
        assert torch.equal(found.linears[name].codes, expected.codes)
        assert torch.equal(hand.decoded(found.linears)[name], expected.weight(problem.grid))
        assert found.linears[name].adapter is expected.adapter
        assert found.linears[name].report["changed_fraction"] == 0.0
    assert found.report["block_loss"] == found.report["block_loss_before"]
    assert torch.equal(hand.run[0]["up"], hand.decoded(found.linears)["up"])


@pytest.mark.parametrize("text", ["int2", "int3-g16", "int4-asym-g16", "int4-tensor", "nvfp4", "mxfp4", "fp4-asym-g16"])
@pytest.mark.parametrize("first", [None, gptq, rtn_clipped])
def test_what_is_reported_is_what_is_stored(text: str, first: Any) -> None:  # noqa: ANN401 - as above
    if text == "mxfp4":
        text = "fp4-sym-g16-se8m0"  # 48 inputs are no groups of 32
    hand = HandBlock(text, first)
    block = hand.problem()
    found = AutoRound().refine(block, FEW)
    starts = {name: one.previous or round_nearest(one) for name, one in hand.problems.items()}
    rows = range(8)
    after, before = (measured_loss(block, hand.decoded(some), rows) for some in (found.linears, starts))
    assert found.report["block_loss"] == pytest.approx(after, rel=1e-4)
    assert found.report["block_loss_before"] == pytest.approx(before, rel=1e-4)
    assert after < before
    for name, problem in hand.problems.items():
        report, weight = found.linears[name].report, hand.decoded(found.linears)[name]
        hessian = problem.need_hessian()
        assert report["loss"] == pytest.approx(relative_loss(problem.weight, weight, hessian), rel=1e-3)
        start = starts[name].weight(problem.grid)
        assert report["loss_before"] == pytest.approx(relative_loss(problem.weight, start, hessian), rel=1e-3)
        nearest = round_nearest(problem).weight(problem.grid)
        assert report["loss_rtn"] == pytest.approx(relative_loss(problem.weight, nearest, hessian), rel=1e-3)
        changed = float((found.linears[name].codes != starts[name].codes).double().mean())
        assert report["changed_fraction"] == pytest.approx(changed)
        assert 0 < changed < 0.9


def test_the_answer_is_the_same_when_asked_again_and_another_with_another_seed() -> None:
    found = [AutoRound().refine(HandBlock("int3-g16").problem(seed), FEW).linears for seed in (0, 0, 1)]
    assert all(torch.equal(found[0][name].codes, found[1][name].codes) for name in found[0])
    assert not all(torch.equal(found[0][name].codes, found[2][name].codes) for name in found[0])


def test_token_weights_change_what_is_learned() -> None:
    found = [
        AutoRound().refine(HandBlock("int3-g16").problem(), replace(FEW, loss_weight=rule))
        for rule in ("uniform", "inverse-norm")
    ]
    assert not torch.equal(found[0].linears["up"].codes, found[1].linears["up"].codes)
    assert found[0].report["block_loss_before"] != found[1].report["block_loss_before"]


def test_adapters_are_counted_in_the_losses_of_linears() -> None:
    hand = HandBlock("int2-g16", gptq_lorc)
    found = AutoRound().refine(hand.problem(), FEW).linears["down"]
    problem, adapter = hand.problems["down"], found.adapter
    assert adapter is not None
    assert adapter.down_scale is not None
    stands = found.weight(problem.grid) + adapter.product()
    expected = relative_loss(problem.weight, stands, problem.need_hessian())
    assert found.report["loss"] == pytest.approx(expected, rel=1e-3)
    assert problem.previous is not None
    assert found.report["loss_before"] == pytest.approx(problem.previous.report["loss"], rel=1e-3)


Scheme = Mapping[str, str]
W4A4 = {"weights": "int4-channel", "activations": "int4-asym-token-sfp32", "kv": "int4-asym-token-head"}
SETTINGS = {"autoround.steps": "6", "autoround.rate": "0.08", "autoround.range_rate": "0.004"}
CASES: dict[str, tuple[str, Scheme, dict[str, Any]]] = {
    "int3": ("autoround", {"weights": "int3-g16"}, {}),
    "behind gptq": (
        "gptq+autoround",
        {"weights": "mxfp4"},
        {"settings": {"autoround.steps": "30", "autoround.rate": "0.03"}},
    ),
    "nvfp4": ("autoround", {"weights": "nvfp4", "activations": "nvfp4"}, {}),
    "rotated": ("autoround", W4A4, {"transforms": "quarot", "round_activations": True}),
    "segments": (
        "gptq+autoround",
        {"weights": "int4-g16", "activations": "int4-sym-g16-sfp32", "kv": "int4-asym-token-head"},
        {"transforms": "atom"},
    ),
    "experts": ("autoround", {"weights": "nvfp4", "activations": "nvfp4"}, {"model_type": "qwen3_moe"}),
    "adapters in front": (
        "gptq+lorc+autoround",
        {"weights": "int2-g16", "activations": "int4-asym-token-sfp32"},
        {"settings": {"lorc.rank": "3", "lorc.dtype": "int8", "lorc.reads": "full"}},
    ),
    "adapters behind": ("autoround+qera", {"weights": "int2-g16"}, {"settings": {"qera.rank": "3"}}),
    "target": ("target+autoround", {"weights": "int3-asym-g16"}, {}),
    "outliers": ("spqr+autoround", {"weights": "int3-asym-g16-real"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_get_better_whatever_is_around_them(tinies: Tinies, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, scheme, changes = CASES[case]
    changes = {**changes, "settings": {**SETTINGS, **changes.get("settings", {})}}
    seen: list[tuple[float, float]] = []

    def look(block: BlockProblem, result: BlockResult) -> None:
        rows = range(block.windows)
        starts = {name: one.previous or round_nearest(one) for name, one in block.problems.items()}
        before, after = (measured_loss(block, decoded(block, some), rows) for some in (starts, result.linears))
        assert result.report["block_loss_before"] == pytest.approx(before, rel=1e-3)
        assert result.report["block_loss"] == pytest.approx(after, rel=1e-3)
        seen.append((before, after))

    watch(monkeypatch, AutoRound, look)
    artifact = tinies.solved(method, scheme, **changes)
    assert len(seen) == 2
    assert all(after <= before for before, after in seen)
    assert any(after < before for before, after in seen)
    told = artifact.manifest.details["blocks"]
    assert [told[str(layer)]["block_loss"] for layer in range(2)] == pytest.approx([b for _, b in seen], rel=1e-3)
    _check_stored(artifact, tinies)


def _check_stored(artifact: Artifact, tinies: Tinies) -> None:
    """Every block of the artifact can be loaded, and linears that an engine fuses share their multipliers."""
    subject = open_subject(str(artifact.path), next(iter(tinies.made.values())).workspace).subject
    shared: dict[Any, set[float]] = {}
    for linear in subject.model.graph.linears:
        found = subject.linear(linear)
        weight = found.weight(subject.weight_grid(linear))
        assert torch.isfinite(weight).all()
        executed = subject.block(linear.layer, torch.float32).state[f"{linear.spec.module}.weight"]
        assert torch.equal(executed, weight)
        for own in found.parameters:
            if own.global_scale is not None:
                shared.setdefault(linear.fused_with, set()).add(float(own.global_scale))
    assert all(len(values) == 1 for values in shared.values())


def test_seeds_and_repetition_through_the_whole_step(tinies: Tinies) -> None:
    home = tinies.of().workspace.home
    ids = [
        tinies.solved(
            "autoround", {"weights": "int3-g8"}, settings=SETTINGS, seed=seed, output=home / f"{name}.safetensors"
        )
        for name, seed in (("one", 0), ("two", 0), ("three", 1))
    ]
    assert ids[0].manifest.id == ids[1].manifest.id
    assert ids[0].manifest.id != ids[2].manifest.id


@pytest.mark.parametrize("method", [AutoRound(), LWC()])
@pytest.mark.parametrize("text", ["int3-asym-g16-scales3g16", "int4-g16-sfp16-scales4g2"])
def test_scales_that_are_codes_are_refused(method: AutoRound | LWC, text: str) -> None:
    with pytest.raises(SchemeError, match=r"ranges are learned, and the scales of `\w+` are codes") as refused:
        method.refine(HandBlock(text).problem(), method.Config(steps=1))
    nearest = parse_tensor_scheme(text.partition("-scales")[0], FORMATS.__getitem__)
    assert refused.value.hint == f"--method gptq, or --weights {nearest}"


def test_weights_that_are_not_finite_are_refused() -> None:
    hand = HandBlock("int4")
    hand.problems["up"] = replace(hand.problems["up"], weight=hand.problems["up"].weight * torch.nan)
    with pytest.raises(NumericalError, match="the weight of `up` holds NaN or Inf"):
        AutoRound().refine(hand.problem(), FEW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "`steps` is 0 or more, not -1\nhint: --set steps=200"),
        ({"batch": 0}, "`batch` is a number of windows, not 0\nhint: --set batch=8"),
        ({"judged": 0}, "`judged` is a number of windows, not 0\nhint: --set judged=16"),
        ({"rate": 1.5}, "`rate` is from 0 to 1, not 1.5\nhint: leave `rate` out"),
        ({"rate": float("nan")}, "`rate` is from 0 to 1, not nan"),
        ({"range_rate": -0.1}, "`range_rate` is from 0 to 1, not -0.1"),
        ({"widest": 0.5}, "`widest` is from 1 to 4, not 0.5\nhint: --set widest=1"),
        ({"loss_weight": "heavy"}, "cannot read the token weight `heavy`"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        AutoRoundConfig(**options)
    assert message in str(raised.value)


def _pairs(flat: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def test_the_oracle_stores_scales() -> None:
    assert float(as_stored(torch.tensor(1.001), torch.bfloat16)) == 1.0
