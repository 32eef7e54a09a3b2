"""LWC: the clipped quantizer of its paper, the gradients of its logits, and never worse than the whole range."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.builtin.mitigators.lwc import LWC, LWCConfig
from qtool.builtin.mitigators.rtn import RTN, ClipOptions, round_nearest
from qtool.engine.block_problem import BlockProblem, BlockResult
from qtool.engine.learned_block import LearnedBlock
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import UsageError
from tests.builtin.mitigators.block_cases import HandBlock, Tinies, by_hand, decoded, measured_loss, tiny_models, watch
from tests.oracles.learned_rounding import as_stored, asymmetric_oracle, symmetric_oracle

FEW = LWCConfig(steps=30, batch=4, rate=0.1)


@pytest.fixture(scope="module")
def tinies() -> Iterator[Tinies]:
    with tiny_models() as made:
        yield made


def adam_oracle(leaf: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """The first step of Adam: both moments are those of one gradient."""
    return leaf - rate * gradient / (gradient.abs() + 1e-8)


class Clipped:
    """The fake quantizer by hand: ``γ`` and ``β`` of each group of 16, as logits."""

    def __init__(self, hand: HandBlock, *, symmetric: bool) -> None:
        self.hand, self.symmetric = hand, symmetric
        self.logits: dict[str, list[Tensor]] = {}
        self.starts = {name: round_nearest(one).parameters[0] for name, one in hand.problems.items()}
        for name, own in self.starts.items():
            count = own.scale.numel()
            self.logits[name] = [torch.full((count,), 4.0, requires_grad=True) for _ in range(2 - symmetric)]

    def weights(self) -> dict[str, Tensor]:
        made = {}
        for name, one in self.hand.problems.items():
            groups, scale = one.weight.reshape(-1, 16), self.starts[name].scale.flatten()
            kept = [torch.sigmoid(logit) for logit in self.logits[name]]
            nothing = torch.zeros_like(groups)
            if self.symmetric:
                stored = as_stored(kept[0] * scale, torch.bfloat16)
                fake = symmetric_oracle(groups, stored, nothing, bits=3)
            else:
                zero = self.starts[name].zero_point
                assert zero is not None
                ends = (-zero.flatten() * scale * kept[1], (15 - zero.flatten()) * scale * kept[0])
                fake = asymmetric_oracle(groups, ends, nothing, bits=4, dtype=torch.bfloat16)
            made[name] = fake.reshape(one.weight.shape)
        return made

    def step(self, rate: float) -> None:
        loss = (by_hand(self.weights(), self.hand.states) - self.hand.targets(range(8))).square().mean()
        flat = [logit for own in self.logits.values() for logit in own]
        gradients = torch.autograd.grad(loss, flat)
        with torch.no_grad():
            for leaf, gradient in zip(flat, gradients, strict=True):
                leaf.copy_(adam_oracle(leaf, gradient, rate))


@pytest.mark.parametrize("text", ["int3-g16", "int4-asym-g16"])
@pytest.mark.parametrize("rate", [0.05, 0.7])
def test_starts_and_steps_as_the_paper_says(text: str, rate: float) -> None:
    hand = HandBlock(text)
    LWC().refine(hand.problem(), LWCConfig(steps=1, batch=8, rate=rate))
    assert len(hand.run) == 4  # judged whole, judged clipped, learned from, judged
    expected = Clipped(hand, symmetric="asym" not in text)
    for index in (1, 2, 3):
        if index == 3:
            expected.step(rate)
        for name, weight in expected.weights().items():
            torch.testing.assert_close(hand.run[index][name], weight.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(hand.run[1]["up"], hand.run[3]["up"])
    assert torch.equal(hand.run[0]["up"], round_nearest(hand.problems["up"]).weight(hand.problems["up"].grid))


@pytest.mark.parametrize("text", ["int2", "int3-g16", "int4-asym-g16", "int3-asym", "nvfp4", "fp4-asym-g16"])
def test_what_is_stored_is_rounded_to_nearest_and_what_is_reported(text: str) -> None:
    hand = HandBlock(text)
    block = hand.problem()
    found = LWC().refine(block, FEW)
    starts = {name: round_nearest(one) for name, one in hand.problems.items()}
    after, before = (measured_loss(block, hand.decoded(some), range(8)) for some in (found.linears, starts))
    assert found.report["block_loss"] == pytest.approx(after, rel=1e-4)
    assert found.report["block_loss_before"] == pytest.approx(before, rel=1e-4)
    assert after <= before
    if text.startswith("int"):
        assert after < before
    for name, problem in hand.problems.items():
        linear = found.linears[name]
        (part,), (own,) = problem.grid.parts, linear.parameters
        groups = part.groups(problem.weight)
        nearest = part.format.round(groups, own).reshape(problem.weight.shape)
        same = (linear.weight(problem.grid) - nearest).abs() < 1e-6
        assert same.double().mean() > 0.999  # ties may go either way
        (whole,) = starts[name].parameters
        assert (own.scale <= whole.scale).all()


def test_a_symmetric_group_has_one_fraction_and_another_group_two() -> None:
    moved = {}
    for text in ("int3-g16", "int4-asym-g16"):
        hand = HandBlock(text)
        found = LWC().refine(hand.problem(), LWCConfig(steps=40, batch=4, rate=0.5))
        (own,), (whole,) = found.linears["up"].parameters, round_nearest(hand.problems["up"]).parameters
        moved[text] = own, whole
    own, whole = moved["int3-g16"]
    assert own.zero_point is None
    own, whole = moved["int4-asym-g16"]
    assert own.zero_point is not None
    assert whole.zero_point is not None
    assert (own.zero_point != whole.zero_point).any()
    low, high = own.zero_point * own.scale, (15 - own.zero_point) * own.scale
    parts = low / (whole.zero_point * whole.scale), high / ((15 - whole.zero_point) * whole.scale)
    assert (parts[0] - parts[1]).abs().max() > 0.1


def test_a_step_keeps_nothing_of_the_graph_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches over into the next step is on the stream of the one before, which torch warns of on CUDA."""
    seen: list[LearnedBlock] = []
    started = LearnedBlock.__init__

    def start(self: LearnedBlock, *arguments: Any) -> None:  # noqa: ANN401 - its own
        started(self, *arguments)
        seen.append(self)

    monkeypatch.setattr(LearnedBlock, "__init__", start)
    for text in ("int3-g16", "int4-asym-g16"):
        LWC().refine(HandBlock(text).problem(), LWCConfig(steps=2, batch=4, rate=0.5))
    ends = [end for block in seen for grid in block.grids.values() for end in (grid.high, grid.low)]
    assert len(ends) == 4
    assert not any(end.requires_grad for end in ends)


def test_no_steps_leave_everything_as_it_is() -> None:
    hand = HandBlock("int4-asym-g16")
    found = LWC().refine(hand.problem(), LWCConfig(steps=0))
    assert hand.run == []
    for name, problem in hand.problems.items():
        start = round_nearest(problem)
        assert torch.equal(found.linears[name].codes, start.codes)
        assert found.linears[name].report["loss"] == found.linears[name].report["loss_rtn"]


def test_the_whole_range_stays_where_it_was_better() -> None:
    hand = HandBlock("int8-g16-sfp32")
    found = LWC().refine(hand.problem(), LWCConfig(steps=1, batch=8, rate=1.0))
    for name, problem in hand.problems.items():
        start = round_nearest(problem)
        assert torch.equal(found.linears[name].codes, start.codes)
        assert torch.equal(found.linears[name].parameters[0].scale, start.parameters[0].scale)
    assert found.report["block_loss"] == found.report["block_loss_before"]


def test_the_answer_is_the_same_when_asked_again() -> None:
    found = [LWC().refine(HandBlock("int3-g16").problem(seed), FEW).linears["up"] for seed in (0, 0, 1)]
    assert torch.equal(found[0].codes, found[1].codes)
    assert torch.equal(found[0].parameters[0].scale, found[1].parameters[0].scale)
    assert not torch.equal(found[0].parameters[0].scale, found[2].parameters[0].scale)


@pytest.mark.parametrize(
    ("model_type", "method", "scheme"),
    [
        ("llama", "lwc", {"weights": "int3-asym-g16", "activations": "int4-asym-token-sfp32"}),
        ("llama", "lwc+autoround", {"weights": "int3-g16"}),
        ("qwen3_moe", "lwc+qera", {"weights": "int2-g16"}),
    ],
)
def test_blocks_of_models(
    tinies: Tinies, model_type: str, method: str, scheme: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []

    def look(block: BlockProblem, result: BlockResult) -> None:
        rows = range(block.windows)
        starts = {name: round_nearest(one) for name, one in block.problems.items()}
        seen.append(
            (
                measured_loss(block, decoded(block, starts), rows),
                measured_loss(block, decoded(block, result.linears), rows),
            )
        )

    watch(monkeypatch, LWC, look)
    settings = {"lwc.steps": "6", "lwc.rate": "0.2"}
    settings |= {"autoround.steps": "2"} if "autoround" in method else {}
    settings |= {"qera.rank": "2"} if "qera" in method else {}
    artifact = tinies.solved(method, scheme, model_type=model_type, settings=settings)
    assert len(seen) == 2
    assert all(after <= before * (1 + 1e-6) for before, after in seen)
    assert any(after < before for before, after in seen)
    told = artifact.manifest.details["blocks"]["1"]
    assert told["block_loss"] <= told["block_loss_before"]


def test_has_to_come_first(tinies: Tinies) -> None:
    def clipped(of: LayerProblem) -> QuantizedLinear:
        return RTN().quantize(of, ClipOptions(clip="search"))

    with pytest.raises(
        UsageError, match=r"`lwc` rounds to nearest in the ranges .* so it has to come first, .*\nhint: --method lwc"
    ):
        LWC().refine(HandBlock("int4", clipped).problem(), FEW)
    with pytest.raises(UsageError, match="so it has to come first"):
        tinies.solved("gptq+lwc", {"weights": "int4"})


def test_behind_plain_rounding_it_does_what_it_does_alone() -> None:
    def rtn(of: LayerProblem) -> QuantizedLinear:
        return RTN().quantize(of, ClipOptions())

    behind, alone = (LWC().refine(HandBlock("int3-g16", *before).problem(), FEW) for before in ((rtn,), ()))
    assert behind.report == alone.report
    for name, linear in alone.linears.items():
        assert torch.equal(behind.linears[name].codes, linear.codes)
        assert torch.equal(behind.linears[name].parameters[0].scale, linear.parameters[0].scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "`steps` is 0 or more, not -1\nhint: --set steps=320"),
        ({"batch": 0}, "`batch` is a number of windows, not 0\nhint: --set batch=4"),
        ({"judged": 0}, "`judged` is a number of windows, not 0\nhint: --set judged=16"),
        ({"rate": 0.0}, "`rate` is above 0 and up to 1, not 0\nhint: --set rate=0.01"),
        ({"rate": float("nan")}, "`rate` is above 0 and up to 1, not nan"),
        ({"loss_weight": "heavy"}, "cannot read the token weight `heavy`"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        LWCConfig(**options)
    assert message in str(raised.value)
