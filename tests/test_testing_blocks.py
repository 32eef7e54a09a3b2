"""The checks of block-wise methods and of retargeters pass what qtool ships, and fail what breaks one promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from qtool.builtin.formats.integer import Int3
from qtool.builtin.mitigators.autoround import AutoRound, AutoRoundConfig
from qtool.builtin.mitigators.lwc import LWC, LWCConfig
from qtool.builtin.mitigators.qwt import QwT, QwTConfig
from qtool.builtin.mitigators.target import Target, TargetConfig
from qtool.engine.block_problem import BlockMitigator, BlockProblem, BlockResult
from qtool.engine.problem import LayerProblem
from qtool.numerics.two_streams import TwoStreams
from qtool.plugins import Plugins
from qtool.scheme import GroupParameters, parse_tensor_scheme
from qtool.testing import CheckError, block_problem, check_block_mitigator, check_retargeter, two_stream_problem

PLUGINS = Plugins.discover()


class Changing(QwT):
    """QwT, whose result is changed, or the problem."""

    def __init__(self, change: Callable[[BlockProblem, BlockResult], BlockResult]) -> None:
        self.change = change

    def refine(self, block: BlockProblem, config: QwTConfig) -> BlockResult:
        return self.change(block, super().refine(block, config))


def with_linear(result: BlockResult, **changes: object) -> BlockResult:
    """Change the first linear."""
    name = next(iter(result.linears))
    return replace(result, linears={**result.linears, name: replace(result.linears[name], **changes)})


class TestCheckBlockMitigator:
    @pytest.mark.parametrize(
        ("method", "config"),
        [(AutoRound(), AutoRoundConfig(steps=10)), (LWC(), LWCConfig(steps=10)), (QwT(), QwTConfig(rank=6))],
    )
    @pytest.mark.parametrize("text", ["int3-g16", "nvfp4", "int4-asym"])
    def test_what_is_shipped_passes(self, method: BlockMitigator, config: object, text: str) -> None:
        scheme = parse_tensor_scheme(text, PLUGINS.format)
        check_block_mitigator(method, PLUGINS.format(scheme.format), config, scheme=scheme)

    def fails(self, change: Callable[[BlockProblem, BlockResult], BlockResult], match: str) -> None:
        with pytest.raises(CheckError, match=match):
            check_block_mitigator(Changing(change), Int3(), QwTConfig(rank=4))

    @pytest.mark.parametrize("what", ["weight", "hessian"])
    def test_what_is_modified(self, what: str) -> None:
        def change(block: BlockProblem, result: BlockResult) -> BlockResult:
            problem = block.problems["layers.0.down"]
            (problem.weight if what == "weight" else problem.need_hessian()).mul_(1.5)
            return result

        self.fails(change, f"Changing modifies the {what} of `layers.0.down` that it is given")

    def test_a_linear_that_is_missing(self) -> None:
        def change(_: BlockProblem, result: BlockResult) -> BlockResult:
            return replace(result, linears=dict(list(result.linears.items())[:1]))

        self.fails(change, "does not give every linear of the block")

    @pytest.mark.parametrize("what", ["codes", "scales", "compensation"])
    def test_another_answer_each_time(self, what: str) -> None:
        calls = iter(range(100))

        def change(_: BlockProblem, result: BlockResult) -> BlockResult:
            count, linear = next(calls), next(iter(result.linears.values()))
            if what == "codes":
                codes = linear.codes.clone()
                codes[0, 0] = count % 8
                return with_linear(result, codes=codes)
            if what == "scales":
                return with_linear(result, parameters=(GroupParameters(linear.parameters[0].scale * (1 + count)),))
            assert result.compensation is not None
            return replace(result, compensation=replace(result.compensation, bias=result.compensation.bias + count))

        self.fails(change, f"Changing gives other {what} .*when it is asked again")

    def test_codes_beyond_the_bits(self) -> None:
        self.fails(lambda _, result: with_linear(result, codes=next(iter(result.linears.values())).codes + 1), "3 bits")

    @pytest.mark.parametrize("factor", [0.9, 1.01, float("nan")])
    def test_losses_that_are_not_so(self, factor: float) -> None:
        def of_linear(_: BlockProblem, result: BlockResult) -> BlockResult:
            loss = next(iter(result.linears.values())).report["loss"]
            return with_linear(result, report={"loss": loss * factor})

        def of_block(_: BlockProblem, result: BlockResult) -> BlockResult:
            return replace(result, report={"block_loss": result.report["block_loss"] * factor})

        self.fails(of_linear, "reports the loss .* of `layers.0.up`, measured")
        self.fails(of_block, "reports the block loss .*, measured .* on all windows")

    def test_no_losses_at_all(self) -> None:
        self.fails(lambda _, result: with_linear(result, report={}), "reports the loss nan")
        self.fails(lambda _, result: replace(result, report={}), "reports the block loss nan")

    def test_worse_than_rounding_to_nearest(self) -> None:
        def change(block: BlockProblem, result: BlockResult) -> BlockResult:
            assert result.compensation is not None
            wrong = replace(result.compensation, bias=result.compensation.bias + 0.3)
            rows = range(14, 16)
            weights = {name: linear.weight(block.problems[name].grid) for name, linear in result.linears.items()}
            x, targets = block.inputs(rows), block.targets(rows)
            left = wrong.added(x, block.forward(weights, x)) - targets
            loss = float(left.square().sum() / targets.square().sum())
            return replace(result, compensation=wrong, report={"block_loss": loss})

        self.fails(change, "is worse than rounding to nearest")

    def test_inputs_are_not_those_of_the_targets(self) -> None:
        """Otherwise a method that takes one for the other would pass."""
        block = block_problem(Int3(), Int3.defaults)
        rows = range(block.windows)
        weights = {name: one.weight for name, one in block.problems.items()}
        left = block.forward(weights, block.inputs(rows)) - block.targets(rows)
        assert 1e-4 < float(left.square().sum() / block.targets(rows).square().sum()) < 0.1


@dataclass(frozen=True)
class Empty:
    """No options."""


class Aiming:
    """A retargeter that does what a function says."""

    version, needs, Config = 1, ("hessian", "cross"), Empty

    def __init__(self, aim: Callable[[LayerProblem], LayerProblem]) -> None:
        self.aim = aim

    def retarget(self, problem: LayerProblem, config: Empty) -> LayerProblem:
        return self.aim(problem)


def aimed(problem: LayerProblem, part: float = 0.5) -> LayerProblem:
    return Target().retarget(problem, TargetConfig(alpha=part))


class TestCheckRetargeter:
    @pytest.mark.parametrize("text", ["int3-g16", "mxfp4", "int4-asym"])
    def test_what_is_shipped_passes(self, text: str) -> None:
        scheme = parse_tensor_scheme(text, PLUGINS.format)
        check_retargeter(Target(), PLUGINS.format(scheme.format), scheme=scheme)

    def fails(self, aim: Callable[[LayerProblem], LayerProblem], match: str) -> None:
        with pytest.raises(CheckError, match=match):
            check_retargeter(Aiming(aim), Int3())

    @pytest.mark.parametrize("what", ["hessian", "cross", "held_out", "weight"])
    def test_what_is_modified(self, what: str) -> None:
        def aim(problem: LayerProblem) -> LayerProblem:
            result = aimed(problem)
            (problem.weight if what == "weight" else problem.entries[what]).mul_(1.01)
            return result

        self.fails(aim, f"Aiming modifies the {what} that it is given")

    def test_another_weight_each_time(self) -> None:
        calls = iter(range(100))
        self.fails(lambda problem: aimed(problem, next(calls) / 100), "gives another weight when it is asked again")

    def test_what_it_has_no_business_with(self) -> None:
        self.fails(lambda problem: replace(aimed(problem), seed=7), "changes the seed of the problem")
        self.fails(lambda problem: replace(aimed(problem), hessian=torch.eye(64)), "changes the hessian of the problem")
        self.fails(lambda problem: replace(problem, weight=problem.weight.double()), "another shape or dtype")

    def test_a_layer_that_is_rounded_already(self) -> None:
        self.fails(
            lambda problem: aimed(replace(problem, previous=None)), "does not refuse a layer that is rounded already"
        )

    def test_the_wrong_way(self) -> None:
        def away(problem: LayerProblem) -> LayerProblem:
            if problem.previous is not None:
                return aimed(problem)
            return replace(problem, weight=2 * problem.weight - aimed(problem).weight)

        self.fails(away, "leads GPTQ away from full precision")

    def test_the_streams_differ(self) -> None:
        problem = two_stream_problem(Int3(), Int3.defaults)
        moments = [problem.entries[name] for name in ("hessian", "cross", "full_hessian")]
        streams = TwoStreams.of(*moments, dampening_frac=0.0)
        gap = streams.energy(problem.weight, problem.weight) / streams.energy(problem.weight, 0 * problem.weight)
        assert 0.01 < gap < 0.5
        assert float((moments[1] - moments[1].T).norm() / moments[1].norm()) > 0.01
