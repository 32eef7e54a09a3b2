"""Solving a block with experts: whose statistics each linear goes by, what is shared, what is solved at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import qtool.engine.solve as solving
import qtool.numerics.gptq as gptq_numerics
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.engine.solve import Method, Solution, Solver
from qtool.model.graph import LinearSite, ModelGraph
from qtool.model.statistics import SiteStatistics
from qtool.plugins import Plugins
from qtool.scheme import TensorScheme, parse_tensor_scheme
from tests.engine.sparse import HIDDEN, INNER, drawn, of_tokens, sparse_graph


@dataclass
class Recorder:
    """Rounds to nearest and remembers which problems it was given together."""

    version: int = 1
    needs: tuple[str, ...] = ()
    Config: type = object
    calls: list[list[LayerProblem]] = field(default_factory=list)

    def quantize(self, problem: LayerProblem, config: Any) -> QuantizedLinear:  # noqa: ANN401 - a method's config
        return self.quantize_siblings([problem], config)[0]

    def quantize_siblings(self, problems: Sequence[LayerProblem], config: Any) -> list[QuantizedLinear]:  # noqa: ANN401
        from qtool.builtin.mitigators.rtn import round_nearest

        self.calls.append(list(problems))
        return [round_nearest(problem) for problem in problems]

    def problems(self) -> dict[str, LayerProblem]:
        return {problem.name: problem for call in self.calls for problem in call}


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover()


@pytest.fixture
def graph() -> ModelGraph:
    return sparse_graph()


def solver(graph: ModelGraph, plugins: Plugins, mitigator: Any, config: Any = None, scheme: str = "int4") -> Solver:  # noqa: ANN401 - any method
    parsed: TensorScheme = parse_tensor_scheme(scheme, plugins.format)
    grid = Grid.of(parsed, plugins.format(parsed.format))
    return Solver(graph, [Method(mitigator, config)], lambda _: grid, 7, torch.device("cpu"))


def weights(linears: Sequence[LinearSite], graph: ModelGraph) -> dict[str, Tensor]:
    """Weights of 6 rows, each expert's larger than the one's before."""
    return {
        f"{one.spec.module}.weight": drawn(6, graph.width(one.spec.reads), seed) * (1 + (one.expert or 0))
        for seed, one in enumerate(linears)
    }


def everything(graph: ModelGraph, *, routed: bool) -> dict[str, SiteStatistics]:
    """Statistics of all sites of the sparse block, other ones at every site."""
    names = {one.spec.reads: None for one in graph.linears_of(1)}
    names |= {one.observed: None for one in graph.linears_of(1)} if routed else {}
    return {name: of_tokens(drawn(64, graph.width(name), 100 + seed)) for seed, name in enumerate(names)}


def solve(
    of: Solver, linears: Sequence[LinearSite], state: Mapping[str, Tensor], known: Mapping[str, SiteStatistics]
) -> dict[str, QuantizedLinear]:
    solution = Solution()
    of.solve(of.methods, linears, state, known, solution)
    return solution.linears


class TestWhoseStatistics:
    @pytest.mark.parametrize("routed", [False, True])
    def test_an_expert_goes_by_its_own_where_there_are_any(
        self, graph: ModelGraph, plugins: Plugins, routed: bool
    ) -> None:
        recorder, known = Recorder(), everything(graph, routed=routed)
        linears = graph.linears_of(1)
        solved = solve(solver(graph, plugins, recorder), linears, weights(linears, graph), known)
        assert set(solved) == {one.name for one in linears}
        for name, problem in recorder.problems().items():
            linear = next(one for one in linears if one.name == name)
            site = linear.observed if routed else linear.spec.reads
            assert problem.hessian is not None
            assert torch.equal(problem.hessian, known[site].entries["hessian"]), name

    def test_seeds_are_places_in_the_model(self, graph: ModelGraph, plugins: Plugins) -> None:
        recorder, linears = Recorder(), graph.linears_of(1)
        solve(solver(graph, plugins, recorder), linears, weights(linears, graph), {})
        seeds = {name: problem.seed for name, problem in recorder.problems().items()}
        assert seeds == {one.name: 7 + graph.linears.index(one) for one in linears}
        experts = {name for name, problem in recorder.problems().items() if problem.expert}
        assert experts == {one.name for one in linears if one.expert is not None}
        assert 0 < len(experts) < len(linears)


class TestWhatIsShared:
    def test_multipliers_are_shared_by_what_engines_fuse_and_by_nothing_else(
        self, graph: ModelGraph, plugins: Plugins
    ) -> None:
        recorder, linears = Recorder(), graph.linears_of(1)
        scheme = "fp4-sym-g8-se4m3"
        state = weights(linears, graph)
        solve(solver(graph, plugins, recorder, scheme=scheme), linears, state, everything(graph, routed=False))
        found = recorder.problems()
        groups: dict[tuple[str, str], list[LinearSite]] = {}
        for one in linears:
            groups.setdefault(one.fused_with, []).append(one)
        assert {len(group) for group in groups.values()} == {1, 2, 3}
        for group in groups.values():
            amax = max(float(state[f"{one.spec.module}.weight"].abs().max()) for one in group)
            for one in group:
                assert float(found[one.name].global_scales[0]) == pytest.approx(amax / (6 * 448), rel=1e-6)
        for call in recorder.calls:
            assert len({float(problem.global_scales[0]) for problem in call}) == 1

    def test_one_hessian_is_factorized_once(
        self, graph: ModelGraph, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        factorized: list[int] = []
        real = gptq_numerics.factorize_inverse

        def counted(hessian: Tensor, frac: float) -> gptq_numerics.InverseFactor:
            factorized.append(len(hessian))
            return real(hessian, frac)

        monkeypatch.setattr(gptq_numerics, "factorize_inverse", counted)
        method = plugins.load("mitigators", "gptq")
        linears = graph.linears_of(1)
        known = everything(graph, routed=False)
        for scheme in ("int4", "fp4-sym-g8-se4m3"):  # the second has a multiplier for each expert
            monkeypatch.setattr(solving, "MOST_ROWS", 13)
            factorized.clear()
            solve(solver(graph, plugins, method, method.Config(), scheme), linears, weights(linears, graph), known)
            assert sorted(factorized) == sorted([HIDDEN] * 3 + [INNER] * 4)

    @pytest.mark.parametrize("scheme", ["int4", "int4-asym-g4", "fp4-sym-g8-se4m3", "int4-sym-tensor"])
    @pytest.mark.parametrize("routed", [False, True])
    def test_each_linear_gets_what_it_would_get_alone(
        self, graph: ModelGraph, plugins: Plugins, scheme: str, routed: bool
    ) -> None:
        method = plugins.load("mitigators", "gptq")
        linears = graph.linears_of(1)
        state, known = weights(linears, graph), everything(graph, routed=routed)
        together = solver(graph, plugins, method, method.Config(), scheme)
        solved = solve(together, linears, state, known)
        for one in linears:
            site = one.observed if routed else one.spec.reads
            alone = method.quantize(
                LayerProblem(
                    one.name,
                    state[f"{one.spec.module}.weight"],
                    together.grid_of(one),
                    hessian=known[site].entries["hessian"],
                    global_scales=(solved[one.name].parameters[0].global_scale,),
                ),
                method.Config(),
            )
            assert torch.equal(solved[one.name].codes, alone.codes), one.name
            torch.testing.assert_close(solved[one.name].parameters[0].scale, alone.parameters[0].scale)


class TestHowMuchAtOnce:
    def test_memory_is_bounded_and_what_is_fused_stays_together(
        self, graph: ModelGraph, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(solving, "MOST_ROWS", 30)
        recorder, linears = Recorder(), graph.linears_of(1)
        solve(solver(graph, plugins, recorder), linears, weights(linears, graph), everything(graph, routed=False))
        experts = [call for call in recorder.calls if ".experts." in call[0].name and call[0].weight.shape[1] == HIDDEN]
        assert [sum(len(problem.weight) for problem in call) for call in experts] == [24, 24]
        for call in experts:
            assert [problem.name.rpartition(".")[2] for problem in call] == ["gate_proj", "up_proj"] * 2
            assert len({id(problem.memory) for problem in call}) == 1

    def test_all_at_once_where_there_is_room(self, graph: ModelGraph, plugins: Plugins) -> None:
        recorder, linears = Recorder(), graph.linears_of(1)
        solve(solver(graph, plugins, recorder), linears, weights(linears, graph), everything(graph, routed=False))
        assert sorted(len(call) for call in recorder.calls) == [1, 1, 1, 1, 1, 3, 8]
