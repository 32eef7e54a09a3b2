"""What a dry run of mitigate says: that of the artifact itself, and nothing is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.artifacts.store import Artifact
from qtool.builtin.transforms.identity import Identity
from qtool.engine.gather import Gathering
from qtool.engine.stored import INPUT_GLOBAL_SCALE
from qtool.errors import NumericalError, UsageError
from qtool.model.graph import HEAD_IN
from qtool.model.plan import Proposal, Segment
from qtool.numerics.token_weights import TokenWeight
from qtool.steps.demand import StatisticSizes
from qtool.steps.foresee import foresee
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.rehearsal import Rehearsal, extrapolated, sites_of
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.transform import TransformRequest, transform
from tests.steps.conftest import Desk


def asked(desk: Desk, source: Artifact, method: str = "gptq", **options: Any) -> MitigateRequest:  # noqa: ANN401
    parts = {"weights": options.pop("weights", "int4-g8"), "activations": options.pop("activations", "")}
    return MitigateRequest(str(source.path), method, read_scheme("", parts, desk.workspace.plugins), **options)


def said(desk: Desk, request: MitigateRequest) -> dict[str, Any]:
    return json.loads(json.dumps(foresee(mitigate, request, desk.workspace).to_json(), allow_nan=False))


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def apart(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """A plan that sets 8 channels of a site apart in INT8."""
    proposal = Proposal(segments={"layers.0.attn_in": (Segment(8, "int8"),)})
    monkeypatch.setattr(Identity, "plan", lambda *_: proposal)
    return transform(TransformRequest(str(desk.calibrate().path), "identity"), desk.workspace)[0]


class TestBytes:
    @pytest.mark.parametrize(
        ("weights", "activations"),
        [
            ("int3-asym-g8", ""),
            ("int4-tensor", ""),
            ("int4-asym-channel-sfp32", ""),
            ("fp4-asym-g8-sfp16", ""),
            ("fp4-g8-se4m3", "fp4-g8-se4m3"),
            ("fp4-g8-se8m0", ""),
            ("fp8-tensor", "fp8-token"),
        ],
    )
    def test_they_are_those_of_the_artifact(self, desk: Desk, weights: str, activations: str) -> None:
        request = asked(desk, desk.calibrate(), weights=weights, activations=activations, propagate="none")
        found = said(desk, request)
        made, _ = mitigate(request, desk.workspace)
        assert any(INPUT_GLOBAL_SCALE in name for name in made.header.slots) == (activations == "fp4-g8-se4m3")
        assert found["disk_bytes_at_least"] == sum(slot.nbytes for slot in made.header.slots.values())

    @pytest.mark.parametrize(
        ("method", "settings"),
        [
            ("rtn+lorc", {}),
            ("gptq+qera", {"dtype": "fp16"}),
            ("rtn+l2qer", {"dtype": "int8"}),
            ("svdquant", {"iterations": "1"}),
            ("caldera", {"dtype": "int8", "iterations": "1"}),
            ("intrinsic", {"finish": "none"}),
        ],
    )
    def test_low_rank_corrections_count(self, desk: Desk, method: str, settings: dict[str, str]) -> None:
        request = asked(desk, desk.calibrate(), method, propagate="none", settings={"rank": "3", **settings})
        found = said(desk, request)
        made, _ = mitigate(request, desk.workspace)
        assert any(".adapter." in name for name in made.header.slots)
        assert found["disk_bytes_at_least"] == sum(slot.nbytes for slot in made.header.slots.values())
        stored = {row["module"]: row["stored_bytes"] for row in found["linears"]}
        for module, told in stored.items():
            own = [slot.nbytes for name, slot in made.header.slots.items() if f".{module}." in name]
            assert told == sum(own)

    def test_channels_that_are_set_apart_count(self, desk: Desk, apart: Artifact) -> None:
        request = asked(desk, apart, propagate="none")
        found = said(desk, request)
        made, _ = mitigate(request, desk.workspace)
        assert found["disk_bytes_at_least"] == sum(slot.nbytes for slot in made.header.slots.values())
        formats = {row["format"] for row in found["linears"] if row["module"] == "q_proj"}
        assert len(formats) == 2
        assert any(written.endswith(" + 8 int8") for written in formats)

    def test_each_kind_of_linear_has_its_own(self, desk: Desk) -> None:
        request = asked(desk, desk.calibrate(), propagate="none")
        found = said(desk, request)
        made, _ = mitigate(request, desk.workspace)
        assert [row["module"] for row in found["linears"]][:4] == ["q_proj", "k_proj", "v_proj", "o_proj"]
        for row in found["linears"]:
            own = [slot.nbytes for name, slot in made.header.slots.items() if f".{row['module']}." in name]
            assert row["stored_bytes"] == sum(own)
            assert row["linears"] == 2
            n = int(row["shape"].partition("x")[2])
            assert row["statistics_bytes_of_site"] == 4 * n * n
        assert {row["module"]: row["reads"] for row in found["linears"]}["down_proj"] == "up_down"


class TestPasses:
    @pytest.mark.parametrize(
        ("method", "options", "passes"),
        [
            ("gptq", {}, 2),
            ("gptq", {"true_sequential": True}, 5),
            ("gptq", {"propagate": "none"}, 0),
            ("gptaq", {}, 10),
            ("gptaq", {"true_sequential": False}, 4),
            ("autoround", {"settings": {"steps": "2"}}, 3),
            ("target+rtn+qwt", {"settings": {"rank": "4"}}, 10),
        ],
    )
    def test_they_are_as_many_as_there_will_be(
        self, desk: Desk, method: str, options: dict[str, Any], passes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        request = asked(desk, desk.calibrate(), method, **options)
        found = said(desk, request)
        runs: list[int] = []
        from qtool.engine.stream import Stream

        run = Stream.run

        def counted(stream: Stream, layer: int, *, keep: bool) -> None:
            runs.append(layer)
            run(stream, layer, keep=keep)

        pairs = Stream._run_pairs

        def counted_twice(stream: Stream, layer: int, *given: Any) -> None:  # noqa: ANN401 - handed on
            runs.extend((layer, layer))
            pairs(stream, layer, *given)

        monkeypatch.setattr(Stream, "run", counted)
        monkeypatch.setattr(Stream, "_run_pairs", counted_twice)
        mitigate(request, desk.workspace)
        assert found["passes_over_the_data"] == passes == runs.count(0)
        assert found["tokens_of_a_pass"] == (3 * 32 if passes else 0)
        parts = {row["part"] for row in found["estimate"]}
        assert ({"passes", "gathering", "embedding"} <= parts) == bool(passes)
        assert ("learning" in parts) == (method in ("autoround", "target+rtn+qwt"))
        assert ("learning" in found["estimates"]) == ("learning" in parts)
        assert found["estimated_seconds"] == pytest.approx(sum(row["seconds"] or 0 for row in found["estimate"]))
        assert found["estimated_peak_memory_bytes"] == sum(row["bytes"] or 0 for row in found["estimate"])


class TestStep:
    @pytest.mark.parametrize("method", ["rtn", "gptq+cd", "ldlq+lorc", "obq", "rtn+qera"])
    def test_nothing_is_written_and_every_method_is_timed(
        self, desk: Desk, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        statistics = desk.calibrate()
        monkeypatch.chdir(tmp_path)
        before = files(tmp_path)
        settings = {"rank": "2"} if "lorc" in method or "qera" in method else {}
        found = said(desk, asked(desk, statistics, method, settings=settings))
        assert files(tmp_path) == before
        assert found["state"] == "to do"
        assert found["estimated_seconds"] > 0
        assert "measurements" in found["estimates"]

    @pytest.mark.parametrize(
        ("method", "token_weight"),
        [("gptq", ""), ("target+gptq", "gradient,up_down=uniform"), ("guidedquant", ""), ("guidedquant", "uniform")],
    )
    def test_statistics_that_hold_saliency_are_enough(self, desk: Desk, method: str, token_weight: str) -> None:
        request = asked(desk, desk.calibrate(gather=("hessian", "saliency")), method, token_weight=token_weight)
        found = said(desk, request)
        guided = method == "guidedquant"
        assert ("saliency" in found["statistics"]) == guided
        rows = {row["module"]: row["statistics_bytes_of_site"] for row in found["linears"]}
        matrices = 1 + 3 * ("target" in method)  # H, C, and both once more on held-out windows
        # Of each linear that reads the site, a Hessian of each of four groups of rows beside the one of all.
        assert rows["o_proj"] == 4 * 24**2 * (1 + 4 if guided else matrices)
        assert rows["q_proj"] == 4 * 24**2 * (1 + 3 * 4 if guided else matrices)
        seconds = {row["part"]: row["seconds"] for row in found["estimate"]}
        assert seconds["solving"] > 0
        assert seconds["gathering"] > 0

    def test_a_method_that_cannot_come_first_is_refused(self, desk: Desk) -> None:
        with pytest.raises(UsageError, match="cannot come first"):
            said(desk, asked(desk, desk.calibrate(), "cd"))

    def test_a_rank_beyond_a_smaller_layer_is_no_reason_to_refuse(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("qtool.steps.rehearsal._SMALLEST", 8)
        request = asked(desk, desk.calibrate(), "rtn+lorc", settings={"rank": "16"})
        with pytest.raises(UsageError, match="rank"):
            said(desk, replace(request, settings={"rank": "9"}))
        assert said(desk, replace(request, settings={"rank": "8"}))["estimated_seconds"] > 0

    def test_what_cannot_be_solved_leaves_the_time_open(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object) -> None:
            raise NumericalError("made-up inputs are not enough")

        monkeypatch.setattr(
            desk.workspace.plugins.load("mitigators", "gptq"), "quantize_siblings", broken, raising=False
        )
        found = said(desk, asked(desk, desk.calibrate()))
        assert found["estimated_seconds"] is None
        assert {row["part"]: row["seconds"] for row in found["estimate"]}["solving"] is None

    def test_what_is_done_is_not_estimated(self, desk: Desk) -> None:
        request = asked(desk, desk.calibrate(), "rtn")
        mitigate(request, desk.workspace)
        found = said(desk, request)
        assert found["state"] == "there"
        assert "estimate" not in found


class TestRehearsal:
    def test_sites_of_all_layers_are_solved_once(self, desk: Desk) -> None:
        opened = open_subject(str(desk.model), desk.workspace)
        scheme = read_scheme("", {"weights": "int4-g8"}, desk.workspace.plugins)
        sites = sites_of(type(opened.subject)(opened.model, desk.workspace.plugins, scheme=scheme))
        assert [(len(site.linears), site.times) for site in sites] == [(3, 2), (1, 2), (2, 2), (1, 2)]
        assert sum(len(site.linears) * site.times for site in sites) == len(opened.model.graph.linears)

    def test_times_grow_by_what_is_linear_and_what_is_cubic(self) -> None:
        def taken(n: int) -> float:
            return 3.0 * n + 2.0 * n**3

        assert extrapolated([(8, taken(8))], 8) == taken(8)
        assert extrapolated([(4, taken(4)), (8, taken(8))], 64) == pytest.approx(taken(64))
        assert extrapolated([(8, 5.0)], 16) == 40
        assert extrapolated([(4, 2.0), (8, 2.0)], 16) == pytest.approx(4)  # not less than in proportion
        assert extrapolated([(4, 1.0), (8, 32.0)], 16) == pytest.approx(256)  # nor more than in cubes

    def test_a_large_layer_is_solved_in_small(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each halving of the width takes an eighth of the time; a budget of 0 allows the smallest size alone."""
        opened = open_subject(str(desk.model), desk.workspace)
        scheme = read_scheme("", {"weights": "int4-g8"}, desk.workspace.plugins)
        subject = type(opened.subject)(opened.model, desk.workspace.plugins, scheme=scheme)
        solved: list[int] = []

        def solve(rehearsal: Rehearsal, site: object, grid: object, entries: object, width: int) -> float:
            solved.append(width)
            return (width / 24) ** 3

        monkeypatch.setattr("qtool.steps.rehearsal._SMALLEST", 8)
        monkeypatch.setattr(Rehearsal, "_solve", solve)
        monkeypatch.setattr(Rehearsal, "_entries", lambda *_: ({}, 0.25))
        for budget, widths in ((0.0, [8]), (1e9, [8, 24])):
            solved.clear()
            monkeypatch.setattr("qtool.steps.rehearsal.SECONDS", budget)
            rehearsal = Rehearsal(subject, (), (), Gathering(0, TokenWeight()), torch.device("cpu"))
            (timed,) = rehearsal.time([sites_of(subject)[0]])
            assert solved == widths
            assert timed.solve == pytest.approx(1)
            assert timed.gather == pytest.approx(0.25 * (9 if budget == 0 else 1))


class TestHead:
    HEAD = "int4-g8,lm_head=int8-sym-channel"

    def parts(self, desk: Desk, weights: str, **options: Any) -> dict[str, Any]:  # noqa: ANN401
        found = said(desk, asked(desk, desk.calibrate(), weights=weights, **options))
        return {row["part"]: row for row in found["estimate"]}

    def test_its_solve_is_timed_and_its_weight_is_held(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Rehearsal, "_solve", lambda *_: 1.0)
        plain, found = (self.parts(desk, weights) for weights in ("int4-g8", self.HEAD))
        sites = len({"attn_in", "o_in", "mlp_in", "up_down"})
        assert plain["solving"]["seconds"] == 2 * sites
        assert found["solving"]["seconds"] == 2 * sites + 1
        model = open_subject(str(desk.model), desk.workspace).subject.model
        size = model.graph.dims.vocab * model.graph.dims.hidden
        held = found["the weights of a head or embedding, before and after"]["bytes"]
        assert held == size * (4 + model.dtype.itemsize + 4)
        assert found["solving a site"]["bytes"] > plain["solving a site"]["bytes"]

    def test_a_head_alone_has_an_estimate(self, desk: Desk) -> None:
        found = self.parts(desk, "none,lm_head=int8-sym-channel")
        assert found["solving"]["seconds"] > 0
        assert found["statistics of a layer"]["bytes"] > 0

    def test_what_it_reads_counts_behind_the_blocks(self, desk: Desk) -> None:
        graph = open_subject(str(desk.model), desk.workspace).subject.model.graph
        sizes = StatisticSizes.of(graph, {"sample_size": 0}, ("hessian",), 10, desk.workspace.plugins)
        assert sizes.of_layers(head=graph.head) == [*sizes.of_layers(), sizes.at(HEAD_IN)]
        assert sizes.at(HEAD_IN) == 4 * graph.dims.hidden**2
