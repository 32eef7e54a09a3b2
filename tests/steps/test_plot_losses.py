"""Losses of quantized artifacts in pictures and tables, and the counters that `--strict` refuses."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from qtool.artifacts.store import Artifact
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import ArtifactError, NumericalError, UsageError
from qtool.steps.inspect import inspect
from qtool.steps.inspect_quantized import COUNTERS, kinds_of
from qtool.steps.loss_picture import draw_losses, render_losses
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.plot import PlotRequest, plot
from qtool.steps.plot_losses import LossLine, loss_lines, plot_losses
from qtool.steps.schemes import read_scheme
from tests.steps.conftest import Desk


def asked(desk: Desk, method: str, **options: Any) -> MitigateRequest:  # noqa: ANN401 - of the request
    scheme = read_scheme("", {"weights": "int3-g8"}, desk.workspace.plugins)
    source = str(desk.model if method == "rtn" else desk.calibrate().path)
    return MitigateRequest(source, method, scheme, **options)


@pytest.fixture
def quantized(desk: Desk) -> Artifact:
    return mitigate(asked(desk, "gptq+lorc", settings={"rank": "2"}), desk.workspace)[0]


def losses_of(artifact: Artifact) -> Mapping[str, Mapping[str, float]]:
    reports: Mapping[str, Mapping[str, float]] = artifact.manifest.details["layers"]
    return reports


class TestKinds:
    def test_a_kind_is_called_by_its_last_name_where_that_is_enough(self) -> None:
        block = ("self_attn.q_proj", "mlp.down_proj")
        names = [f"model.layers.{layer}.{kind}" for layer in (0, 1, 10) for kind in block]
        assert kinds_of(names) == {name: name.rpartition(".")[2] for name in names}

    def test_experts_share_a_kind_that_is_not_that_of_a_dense_block(self) -> None:
        dense, shared = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.shared.up_proj"
        experts = [f"model.layers.1.mlp.experts.{e}.up_proj" for e in range(3)]
        found = kinds_of([dense, shared, *experts, "model.layers.1.self_attn.q_proj"])
        assert found[dense] == "mlp.up_proj"
        assert found[shared] == "mlp.shared.up_proj"
        assert {found[expert] for expert in experts} == {"mlp.experts.*.up_proj"}
        assert found["model.layers.1.self_attn.q_proj"] == "q_proj"

    def test_lines_are_means_over_experts_in_the_order_of_layers(self) -> None:
        reports = {f"layers.{layer}.mlp.experts.{e}.w1": {"loss": layer + e / 4} for layer in (10, 2) for e in (0, 1)}
        assert loss_lines(reports, "loss") == [LossLine("w1", (2, 10), (2.125, 10.125))]
        told = {name: {**report, "loss_rtn": 2 * report["loss"]} for name, report in reports.items()}
        assert loss_lines(told, "loss")[0].nearest == (4.25, 20.25)
        del told["layers.2.mlp.experts.0.w1"]["loss_rtn"]
        assert loss_lines(told, "loss")[0].nearest == ()


class TestDrawing:
    LINES = (LossLine("q_proj", (0, 1), (0.01, 0.02), (0.1, 0.2)), LossLine("v_proj", (1, 3), (0.0, 0.04), (0.3, 0.4)))

    def test_solid_lines_are_the_methods_and_dashed_ones_those_of_rounding_to_nearest(self) -> None:
        (axes,) = draw_losses(self.LINES, "a title", "gptq", "loss").axes
        drawn = [(line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]  # type: ignore[arg-type]
        assert drawn[:2] == [("-", [0, 1], [0.01, 0.02]), ("--", [0, 1], [0.1, 0.2])]
        assert drawn[3] == ("--", [1, 3], [0.3, 0.4])
        assert drawn[2][:2] == ("-", [1, 3])
        assert math.isnan(drawn[2][2][0])  # a loss of 0 has no place on the scale
        assert drawn[2][2][1] == 0.04
        colors = [line.get_color() for line in axes.lines]
        assert colors[0] == colors[1] != colors[2] == colors[3]
        assert axes.get_yscale() == "log"
        assert axes.get_title() == "a title"
        assert axes.get_xlabel() == "layer"

    def test_legends_name_the_kinds_and_the_styles(self) -> None:
        styles, kinds = draw_losses(self.LINES, "", "gptq", "loss").legends
        assert [text.get_text() for text in styles.get_texts()] == ["gptq", "rounding to nearest"]
        assert [text.get_text() for text in kinds.get_texts()] == ["q_proj", "v_proj"]

    def test_there_is_nothing_dashed_where_nothing_differs(self) -> None:
        alike = [replace(line, nearest=line.losses) for line in self.LINES]
        unknown = [replace(line, nearest=()) for line in self.LINES]
        for lines in (alike, unknown):
            figure = draw_losses(lines, "", "rtn", "loss")
            assert [line.get_linestyle() for line in figure.axes[0].lines] == ["-", "-"]
            assert [text.get_text() for text in figure.legends[0].get_texts()] == ["rtn"]

    def test_every_kind_has_a_look_of_its_own(self) -> None:
        for count in (7, 12, 20):
            lines = [LossLine(f"kind{n}", (0,), (1.0,)) for n in range(count)]
            drawn = draw_losses(lines, "", "gptq", "loss").axes[0].lines
            assert len({(line.get_color(), line.get_marker()) for line in drawn}) == count

    def test_no_loss_at_all_is_drawn_and_files_are_the_same_each_time(self) -> None:
        nothing = [LossLine("q_proj", (0,), (0.0,), (0.0,))]
        assert render_losses(nothing, "", "gptq", "loss", suffix="png")
        for suffix in ("png", "svg"):
            first, second = (render_losses(self.LINES, "t", "gptq", "loss", suffix=suffix) for _ in range(2))
            assert first == second
        assert "matplotlib.pyplot" not in sys.modules


class TestStep:
    def test_a_picture_and_its_numbers(
        self, desk: Desk, quantized: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[Figure] = []
        monkeypatch.setattr(
            "qtool.steps.loss_picture.draw_losses", lambda *given: drawn.append(draw_losses(*given)) or drawn[-1]
        )
        found = plot(PlotRequest(str(quantized.path), tmp_path / "a.png"), desk.workspace)
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert (found.facts["kind"], found.facts["quantized"]) == ("png", quantized.manifest.id)
        rows = json.loads(json.dumps(found.to_json()))["lines"]
        reports = losses_of(quantized)
        assert len(rows) == len(reports) == 14
        for row in rows:
            (report,) = (
                one for name, one in reports.items() if f"layers.{row['layer']}." in name and row["module"] in name
            )
            assert (row["loss"], row["loss_rtn"]) == (report["loss"], report["loss_rtn"])
            assert row["loss"] < row["loss_rtn"]
        lines = {str(one.get_label()): one for one in drawn[0].axes[0].lines if one.get_linestyle() == "-"}
        for kind, line in lines.items():
            assert list(line.get_ydata()) == [row["loss"] for row in rows if row["module"] == kind]  # type: ignore[arg-type]

    def test_a_loss_of_weights_says_so(self, desk: Desk, tmp_path: Path) -> None:
        rounded, _ = mitigate(asked(desk, "rtn"), desk.workspace)
        found = plot(PlotRequest(str(rounded.path), tmp_path / "a.svg"), desk.workspace)
        assert found.tables["lines"].columns == ("module", "layer", "weight_error_rtn", "weight_error")
        assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
        assert "‖W − Ŵ‖² / ‖W‖²" in (tmp_path / "a.svg").read_text(encoding="utf-8")

    @pytest.mark.parametrize("given", [{"plan": "PLAN"}, {"sites": ("layers.0.attn_in",)}])
    def test_plans_and_sites_belong_to_statistics(
        self, desk: Desk, quantized: Artifact, tmp_path: Path, given: dict[str, Any]
    ) -> None:
        with pytest.raises(UsageError, match="belongs to pictures of statistics") as caught:
            plot(PlotRequest(str(quantized.path), tmp_path / "a.png", **given), desk.workspace)
        assert caught.value.hint == f"qtool inspect {quantized.path} --plot {tmp_path / 'a.png'}"
        assert not (tmp_path / "a.png").exists()

    def test_a_method_that_reports_nothing(self, quantized: Artifact, tmp_path: Path) -> None:
        bare = {name: {"rank": 2.0} for name in losses_of(quantized)}
        manifest = replace(quantized.manifest, details={**quantized.manifest.details, "layers": bare})
        with pytest.raises(ArtifactError, match="tells no losses to draw"):
            plot_losses(Artifact(quantized.path, manifest), tmp_path / "a.png", "png")


class TestTable:
    def test_means_and_worst_beside_rounding_to_nearest(self, desk: Desk, quantized: Artifact) -> None:
        found = inspect(str(quantized.path), desk.workspace).to_json()
        reports = losses_of(quantized)
        assert [row["module"] for row in found["losses_by_module"]] == sorted(
            {name.rpartition(".")[2] for name in reports},
            key=lambda kind: next(name for name in sorted(reports) if name.endswith(kind)),
        )
        for row in found["losses_by_module"]:
            own = {name: report for name, report in reports.items() if name.endswith(row["module"])}
            assert row["linears"] == len(own) == 2
            for name in ("loss", "loss_rtn", "loss_before"):
                assert row[f"mean_{name}"] == pytest.approx(fmean(one[name] for one in own.values()), rel=1e-12)
            assert row["of_rtn"] == pytest.approx(row["mean_loss"] / row["mean_loss_rtn"], rel=1e-12)
            assert own[row["worst"]]["loss"] == row["worst_loss"] == max(one["loss"] for one in own.values())

    def test_what_is_not_reported_has_no_column(self, desk: Desk) -> None:
        plain, _ = mitigate(asked(desk, "gptq"), desk.workspace)
        columns = inspect(str(plain.path), desk.workspace).tables["losses_by_module"].columns
        assert columns == ("module", "linears", "mean_loss_rtn", "mean_loss", "of_rtn", "worst_loss", "worst")


class TestBlocks:
    def test_what_learned_from_blocks_says_so(self, desk: Desk) -> None:
        learned, _ = mitigate(replace(asked(desk, "autoround"), settings={"steps": "2"}), desk.workspace)
        table = inspect(str(learned.path), desk.workspace).tables["blocks"]
        told = learned.manifest.details["blocks"]
        assert table.columns == ("layer", "block_loss", "best_step", "block_loss_before")
        assert [row[0] for row in table.rows] == list(range(len(told))) == [0, 1]
        assert [row[1] for row in table.rows] == [told[str(layer)]["block_loss"] for layer in range(2)]

    def test_others_have_no_such_table(self, desk: Desk) -> None:
        plain, _ = mitigate(asked(desk, "gptq"), desk.workspace)
        assert "blocks" not in inspect(str(plain.path), desk.workspace).tables


class TestCounters:
    @pytest.mark.parametrize("counter", [*COUNTERS, "of_a_plugin"])
    def test_strict_refuses_all_of_them_and_inspect_shows_them(
        self, desk: Desk, counter: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        method = desk.workspace.plugins.load("mitigators", "rtn")
        quantize = method.quantize
        counts = 14

        def counted(problem: LayerProblem, config: Any) -> QuantizedLinear:  # noqa: ANN401 - as `Mitigator.quantize`
            return replace(quantize(problem, config), counters={counter: 1, "never": 0})

        if "expert" in counter:  # the engine's own: lists of experts, of each block
            notes = {"tokens": [4, 0, 1], "shrunk_experts": [2], "experts_rtn": [1]}
            monkeypatch.setattr("qtool.engine.block.expert_notes", lambda _: {k: notes[k] for k in ("tokens", counter)})
            counts = 2
        else:
            monkeypatch.setattr(method, "quantize", counted, raising=False)
        with pytest.raises(NumericalError, match="--strict was given") as refused:
            mitigate(asked(desk, "rtn", strict=True), desk.workspace)
        assert refused.value.facts == ((counter, counts),)
        monkeypatch.setattr("qtool.steps.inspect_quantized.solved_routing", lambda _: {})
        found, _ = mitigate(asked(desk, "rtn"), desk.workspace)
        described = inspect(str(found.path), desk.workspace).to_json()
        assert described["counters"] == [{"counter": counter, "value": counts, "meaning": COUNTERS.get(counter)}]
        assert described["strict"] == "refuses it, for its counters"

    def test_where_nothing_was_counted_strict_accepts(self, desk: Desk) -> None:
        found, _ = mitigate(asked(desk, "gptq", strict=True), desk.workspace)
        described = inspect(str(found.path), desk.workspace).to_json()
        assert (described["counters"], described["strict"]) == ([], "accepts it")
