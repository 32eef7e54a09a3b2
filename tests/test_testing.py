"""The checks that plugin authors run: each passes what qtool ships, and fails what breaks one promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.builtin.formats.fp4 import E2M1
from qtool.builtin.formats.integer import Int4
from qtool.builtin.mitigators.gptq import GPTQ
from qtool.builtin.mitigators.lorc import LoRC
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.engine.composition import Composition
from qtool.engine.problem import LayerProblem, Mitigator, QuantizedLinear
from qtool.errors import UsageError
from qtool.model.graph import RESIDUAL
from qtool.model.plan import Proposal, TransformContext
from qtool.numerics.operators import Affine, Diag, Hadamard, Operator, Orthogonal
from qtool.plugins import Plugins
from qtool.scheme import Format, GroupParameters, parse_tensor_scheme
from qtool.testing import (
    CheckError,
    check_format,
    check_mitigator,
    check_transform,
    correlated_problem,
    tiny_model,
)

PLUGINS = Plugins.discover()


@dataclass(frozen=True)
class Empty:
    """No options."""


class Proposing:
    """A transform that proposes what a function says."""

    version = 1
    needs: tuple[str, ...] = ()
    Config = Empty

    def __init__(self, propose: Callable[[TransformContext], Proposal]) -> None:
        self.propose = propose

    def plan(self, context: TransformContext, config: Empty) -> Proposal:
        return self.propose(context)


def residual(make: Callable[[int], Operator]) -> Proposing:
    return Proposing(lambda context: Proposal({RESIDUAL: [make(context.graph.dims.hidden)]}))


class TestCheckTransform:
    def test_an_exact_one_passes(self) -> None:
        check_transform(residual(Hadamard), families=["llama"])

    def test_other_random_numbers_each_time(self) -> None:
        def signs(n: int) -> Tensor:
            return 1 - 2 * torch.randint(0, 2, (n,))

        with pytest.raises(CheckError, match="Proposing proposes other operators when it is asked again"):
            check_transform(residual(lambda n: Hadamard(n, signs(n))), families=["llama"])

    def test_other_sites_each_time(self) -> None:
        calls = iter(range(10))
        fickle = Proposing(lambda _: Proposal({f"layers.{next(calls) % 2}.up_down": [Hadamard(40)]}))
        with pytest.raises(CheckError, match="when it is asked again"):
            check_transform(fickle, families=["llama"])

    def test_the_wrong_size(self) -> None:
        with pytest.raises(UsageError, match="wrong size at `residual`"):
            check_transform(residual(lambda n: Hadamard(n - 4)), families=["llama"])

    def test_what_cannot_be_exact(self) -> None:
        with pytest.raises(UsageError, match="`diag` cannot be folded at `residual`"):
            check_transform(residual(lambda n: Diag(torch.linspace(1, 2, n))), families=["llama"])

    def test_an_operator_that_is_not_what_it_claims_to_be(self) -> None:
        def stretched(n: int) -> Orthogonal:
            return Orthogonal(torch.eye(n).double() * 1.01)

        with pytest.raises(CheckError, match=r"changes the model \(llama, untied head\): relative difference"):
            check_transform(residual(stretched), families=["llama"])

        def wrong_inverse(n: int) -> Affine:
            p = torch.eye(n).double() + 0.1 * torch.ones(n, n).double()
            return Affine(p, torch.linalg.inv(p).mT + 1e-6)

        proposed = Proposing(lambda context: Proposal({"layers.1.vo": [wrong_inverse(context.graph.dims.head_dim)]}))
        with pytest.raises(CheckError, match="changes the model"):
            check_transform(proposed, families=["qwen3"])

    def test_a_difference_that_is_not_a_number(self) -> None:
        def nan(n: int) -> Orthogonal:
            return Orthogonal(torch.full((n, n), torch.nan).double())

        with pytest.raises(CheckError, match="relative difference nan"):
            check_transform(residual(nan), families=["llama"])

    def test_a_family_that_is_not_there(self) -> None:
        with pytest.raises(UsageError, match="no family is called `lama`"):
            check_transform(residual(Hadamard), families=["lama"])


class Changing(RTN):
    """Round to nearest, then change the result, or the problem."""

    def __init__(self, change: Callable[[LayerProblem, QuantizedLinear], QuantizedLinear]) -> None:
        self.change = change

    def quantize(self, problem: LayerProblem, config: ClipOptions) -> QuantizedLinear:
        return self.change(problem, super().quantize(problem, config))


def with_loss(problem: LayerProblem, result: QuantizedLinear) -> QuantizedLinear:
    """State the true loss of changed codes."""
    weight = result.weight(problem.grid)
    error, hessian = problem.weight - weight, problem.need_hessian()
    loss = float(((error @ hessian) * error).sum() / ((problem.weight @ hessian) * problem.weight).sum())
    return replace(result, report={"loss": loss})


class TestCheckMitigator:
    @pytest.mark.parametrize("method", [RTN(), GPTQ(), LoRC()])
    @pytest.mark.parametrize("text", ["int4-g32", "nvfp4", "mxfp4", "int3-asym"])
    def test_what_is_shipped_passes(self, method: Mitigator, text: str) -> None:
        scheme = parse_tensor_scheme(text, PLUGINS.format)
        check_mitigator(method, PLUGINS.format(scheme.format), scheme=scheme)

    def fails(self, change: Callable[[LayerProblem, QuantizedLinear], QuantizedLinear], match: str) -> None:
        with pytest.raises(CheckError, match=match):
            check_mitigator(Changing(change), Int4())

    def test_a_modified_weight(self) -> None:
        def change(problem: LayerProblem, result: QuantizedLinear) -> QuantizedLinear:
            problem.weight[0, 0] += 1e-3
            return result

        self.fails(change, "Changing modifies the weight that it is given")

    def test_a_modified_hessian(self) -> None:
        def change(problem: LayerProblem, result: QuantizedLinear) -> QuantizedLinear:
            problem.need_hessian().diagonal().add_(0.01)
            return result

        self.fails(change, "modifies the hessian that it is given")

    def test_other_codes_each_time(self) -> None:
        calls = iter(range(100))

        def change(problem: LayerProblem, result: QuantizedLinear) -> QuantizedLinear:
            codes = result.codes.clone()
            codes[0, 0] = next(calls) % 16
            return with_loss(problem, replace(result, codes=codes))

        self.fails(change, "gives other codes when it is asked again")

    def test_other_scales_each_time(self) -> None:
        calls = iter(range(100))

        def change(problem: LayerProblem, result: QuantizedLinear) -> QuantizedLinear:
            scale = result.parameters[0].scale * (1 + 0.01 * next(calls))
            return with_loss(problem, replace(result, parameters=(GroupParameters(scale),)))

        self.fails(change, "gives other scales when it is asked again")

    def test_codes_beyond_the_bits(self) -> None:
        def change(problem: LayerProblem, result: QuantizedLinear) -> QuantizedLinear:
            return replace(result, codes=result.codes + 1)

        self.fails(change, "gives codes beyond 4 bits")

    @pytest.mark.parametrize("factor", [0.5, 1.01, 0.0, float("nan")])
    def test_a_loss_that_is_not_so(self, factor: float) -> None:
        def change(problem: LayerProblem, result: QuantizedLinear) -> QuantizedLinear:
            return replace(result, report={"loss": result.report["loss"] * factor})

        self.fails(change, "Changing reports the loss .*, measured")

    def test_no_loss_at_all(self) -> None:
        self.fails(lambda _, result: replace(result, report={}), "reports the loss nan, measured")

    def test_worse_than_rounding_to_nearest(self) -> None:
        def change(problem: LayerProblem, result: QuantizedLinear) -> QuantizedLinear:
            codes = result.codes.clone()
            codes[:, 3] = 15 - codes[:, 3]
            return with_loss(problem, replace(result, codes=codes))

        self.fails(change, "is worse than rounding to nearest")

    def test_the_layers_are_correlated(self) -> None:
        """A diagonal Hessian would hide every mistake in error feedback."""
        for seed in range(4):
            hessian = correlated_problem(Int4(), Int4.defaults, seed=seed).need_hessian()
            size = hessian.diagonal().sqrt()
            correlation = (hessian / torch.outer(size, size)).abs() - torch.eye(len(hessian))
            assert float(correlation.max()) > 0.4
            assert float(torch.linalg.cond(hessian)) > 100

    def test_what_the_full_model_shows_is_near_and_has_the_first_index(self) -> None:
        n, seed = 24, 3
        entries = correlated_problem(Int4(), Int4.defaults, seed=seed, n_out=8, n_in=n).entries
        generator = torch.Generator().manual_seed(seed)
        for shape in ((n, n), (512, n), (8, n)):  # the mixing, the inputs and the weight are drawn first
            torch.randn(shape, generator=generator)
        x = entries["sample"]
        full = x + 0.3 * x.std() * torch.randn(512, n, generator=generator)
        by_token = sum(torch.outer(f, q) for f, q in zip(full.double(), x.double(), strict=True)) / 512
        torch.testing.assert_close(entries["cross"].double(), by_token, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(entries["cross"], entries["cross"].T, atol=1e-3)
        # Both are of one pair of streams: the joint second moment has no negative eigenvalue.
        cross, hessian = entries["cross"].double(), entries["hessian"].double()
        joint = torch.cat([torch.cat([entries["full_hessian"].double(), cross], 1), torch.cat([cross.T, hessian], 1)])
        assert float(torch.linalg.eigvalsh(joint).min()) > -1e-6
        assert 0.01 < float((cross - hessian).norm() / hessian.norm()) < 0.2

    def test_every_method_finds_what_it_needs(self) -> None:
        each_its_own = {"saliency", "guided_hessians"}
        known = {*correlated_problem(Int4(), Int4.defaults).entries} | each_its_own
        methods = [PLUGINS.load("mitigators", name) for name in PLUGINS.offers["mitigators"]]
        for method in methods:
            assert isinstance(method, Composition) or set(method.needs) <= known


class HalfAway(Int4):
    """Rounds halves away from zero."""

    def encode(self, groups: Tensor, parameters: GroupParameters) -> Tensor:
        steps = groups.float() / parameters.step().unsqueeze(-1)
        codes = steps.sign() * (steps.abs() + 0.5).floor() + 8
        return codes.clamp(0, 15).to(torch.uint8)

    def round(self, groups: Tensor, parameters: GroupParameters) -> Tensor:
        return self.decode(self.encode(groups, parameters), parameters)


class HalfUp(HalfAway):
    """Rounds halves up."""

    def encode(self, groups: Tensor, parameters: GroupParameters) -> Tensor:
        steps = groups.float() / parameters.step().unsqueeze(-1)
        return ((steps + 0.5).floor() + 8).clamp(0, 15).to(torch.uint8)


class Truncating(HalfAway):
    """Rounds towards zero."""

    def encode(self, groups: Tensor, parameters: GroupParameters) -> Tensor:
        steps = groups.float() / parameters.step().unsqueeze(-1)
        return (steps.trunc() + 8).clamp(0, 15).to(torch.uint8)


class Disagreeing(Int4):
    """Its short cut is not the way round."""

    def round(self, groups: Tensor, parameters: GroupParameters) -> Tensor:
        return super().round(groups, parameters) * 1.001


class ForgetsACode(Int4):
    """Never uses its lowest code."""

    def encode(self, groups: Tensor, parameters: GroupParameters) -> Tensor:
        return super().encode(groups, parameters).clamp(min=1)

    def round(self, groups: Tensor, parameters: GroupParameters) -> Tensor:
        return self.decode(self.encode(groups, parameters), parameters)


class Drifting(Int4):
    """Gets smaller each time."""

    def decode(self, codes: Tensor, parameters: GroupParameters) -> Tensor:
        return super().decode(codes, parameters) * 0.7

    def round(self, groups: Tensor, parameters: GroupParameters) -> Tensor:
        return self.decode(self.encode(groups, parameters), parameters)


class TestCheckFormat:
    @pytest.mark.parametrize("name", sorted(PLUGINS.offers["formats"]))
    def test_what_is_shipped_passes(self, name: str) -> None:
        check_format(PLUGINS.format(name))

    @pytest.mark.parametrize(
        "text", ["int4-asym-g32", "int8-asym-token", "fp4-g32-se4m3", "int4-g32-se8m0", "fp4-asym-g32"]
    )
    def test_in_other_schemes_too(self, text: str) -> None:
        scheme = parse_tensor_scheme(text, PLUGINS.format)
        check_format(PLUGINS.format(scheme.format), scheme=scheme)

    @pytest.mark.parametrize(
        ("fmt", "match"),
        [
            (HalfAway(), "`int4`: a value between two levels does not go to the even one"),
            (HalfUp(), "a value between two levels does not go to the even one"),
            (Truncating(), "a value is not rounded to the nearest level"),
            (Disagreeing(), "round is not decode after encode"),
            (ForgetsACode(), "a code does not survive"),
            (Drifting(), "rounding a rounded value changes it"),
        ],
    )
    def test_a_broken_promise(self, fmt: Format, match: str) -> None:
        with pytest.raises(CheckError, match=match):
            check_format(fmt)

    def test_floats_whose_ties_go_away_from_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Away(E2M1):
            def encode(self, groups: Tensor, parameters: GroupParameters) -> Tensor:
                return super().encode(groups * (1 + 1e-5), parameters)

            def round(self, groups: Tensor, parameters: GroupParameters) -> Tensor:
                return self.decode(self.encode(groups, parameters), parameters)

        with pytest.raises(CheckError, match="`fp4`: a value between two levels"):
            check_format(Away())


def test_a_tiny_model_of_no_family_is_refused_by_name() -> None:
    with (
        pytest.raises(UsageError, match=r"no family knows the model type `lama`\n  known  .*llama"),
        tiny_model("lama"),
    ):
        pass


def test_tiny_models_are_gone_afterwards() -> None:
    def made() -> Iterator[Any]:
        with tiny_model("llama") as tiny:
            assert tiny.statistics.path.is_file()
            yield tiny

    (tiny,) = made()
    assert not tiny.path.exists()
    assert not tiny.statistics.path.exists()
