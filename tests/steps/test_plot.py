"""Pictures of statistics: the drawn numbers are those of the samples, before a plan and after it."""

from __future__ import annotations

import builtins
import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from qtool.artifacts.store import Artifact
from qtool.engine.carry import CarriedStatistics
from qtool.errors import ArtifactError, PluginError, QtoolError, ResourceError, UsageError
from qtool.model.plan import Plan
from qtool.steps.calibrate import calibrate
from qtool.steps.magnitudes import GRID, SiteMagnitudes, Stage, kurtosis, largest_around, magnitudes, middles
from qtool.steps.picture import draw, render
from qtool.steps.plot import PlotRequest, plot
from qtool.steps.subjects import read_plan
from qtool.steps.transform import TransformRequest, transform
from tests.steps.conftest import Desk

SITE = "layers.1.attn_in"


@pytest.fixture
def statistics(desk: Desk) -> Artifact:
    return desk.calibrate()


@pytest.fixture
def plan(desk: Desk, statistics: Artifact) -> Artifact:
    return transform(TransformRequest(str(statistics.path), "smoothquant"), desk.workspace)[0]


def few(*stages: Stage, name: str = "mlp_in") -> SiteMagnitudes:
    rows, columns = stages[0].surface.shape
    return SiteMagnitudes(f"layers.2.{name}", 2, name, (0, 2), rows, columns, stages)


def corners(surface: Tensor) -> Tensor:
    """Return the mean height of each face of a surface."""
    return (surface[1:, 1:] + surface[:-1, 1:] + surface[1:, :-1] + surface[:-1, :-1]) / 4


class TestNumbers:
    def test_kurtosis_is_of_the_channels_of_each_token(self) -> None:
        sample = torch.randn(400, 96, generator=torch.Generator().manual_seed(0))
        sample *= torch.logspace(-3, 3, 400)[:, None]  # tokens of any size count alike
        sample += 5
        assert kurtosis(sample) == pytest.approx(3, abs=0.2)
        # By hand, for a channel that holds everything; a token whose channels are all alike does not count.
        alone = torch.tensor([[0.0, 0, 0, 8], [3, 3, 3, 3]])
        centred = [-2.0, -2, -2, 6]
        by_hand = (sum(c**4 for c in centred) / 4) / (sum(c**2 for c in centred) / 4) ** 2
        assert kurtosis(alone) == pytest.approx(by_hand, rel=1e-12)
        assert kurtosis(torch.ones(2, 3)) == 0

    def test_a_surface_loses_no_outlier(self) -> None:
        sample = torch.zeros(10 * GRID[0] + 3, 2 * GRID[1])
        sample[17, 5] = -9
        surface = largest_around(sample)
        assert surface.shape == GRID
        rows, columns = middles(len(sample), GRID[0]), middles(sample.shape[1], GRID[1])
        (place,) = (surface == 9).nonzero().tolist()
        assert abs(rows[place[0]] - 17) < 6
        assert abs(columns[place[1]] - 5) < 1
        small = torch.randn(5, 7)
        assert torch.equal(largest_around(small), small.abs())
        assert middles(7, 7) == list(range(7))

    def test_what_is_after_a_plan_is_what_is_carried(self, desk: Desk, statistics: Artifact, plan: Artifact) -> None:
        model, operators = desk.workspace.model(str(desk.model)), read_plan(plan)
        found = magnitudes(statistics, model, {"before": Plan(), "after": operators}, SITE)
        whole = CarriedStatistics(statistics, model, operators)
        for stage, layers in zip(found.stages, (CarriedStatistics(statistics, model, Plan()), whole), strict=True):
            for layer in (0, 1):
                sample = layers[f"layers.{layer}.attn_in"].entries["sample"]
                assert stage.absmax[layer] == sample.abs().max()
                assert stage.kurtosis[layer] == kurtosis(sample)
            assert torch.equal(stage.surface, largest_around(layers[SITE].entries["sample"]))
        before, after = found.stages
        assert not torch.equal(before.surface, after.surface)
        assert (found.site, found.layer, found.layers, found.channels) == (SITE, 1, (0, 1), 24)

    def test_no_second_moment_is_read(
        self, desk: Desk, statistics: Artifact, plan: Artifact, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[str] = []
        original = Artifact.tensor

        def noted(artifact: Artifact, name: str) -> Tensor:
            read.append(name)
            return original(artifact, name)

        monkeypatch.setattr(Artifact, "tensor", noted)
        magnitudes(statistics, desk.workspace.model(str(desk.model)), {"after": read_plan(plan)}, SITE)
        gathered = [name for name in read if name.startswith("layers.")]
        assert sorted(gathered) == ["layers.0.attn_in.sample", "layers.1.attn_in.sample"]


class TestDrawing:
    def test_surfaces_and_bars_hold_the_numbers(self) -> None:
        before = Stage("before", torch.arange(12.0).reshape(3, 4), (11.0, 8.0), (70.0, 60.0))
        after = Stage("after quarot", torch.ones(3, 4), (1.0, 2.0), (3.0, 4.0))
        figure = draw([few(before, after)], "a title", "a note")
        left, right, upper, lower = figure.axes
        for axes, stage in ((left, before), (right, after)):
            (surface,) = axes.collections
            torch.testing.assert_close(
                torch.as_tensor(surface.get_array()).float(), corners(stage.surface).flatten(), rtol=1e-6, atol=1e-6
            )
            assert axes.get_zlim() == right.get_zlim()  # type: ignore[attr-defined] # of three dimensions
            # Four channels along x, three tokens along y.
            assert tuple(axes.xy_dataLim.intervalx) == (0, 3)  # type: ignore[attr-defined]
            assert tuple(axes.xy_dataLim.intervaly) == (0, 2)  # type: ignore[attr-defined]
            assert axes.get_xlabel() == "channel"
            assert axes.get_ylabel() == "token"
        assert right.get_zlim()[1] >= 11  # type: ignore[attr-defined]
        assert left.get_title() == "layers.2.mlp_in: before\nlargest 8, kurtosis 60"
        assert right.get_title() == "layers.2.mlp_in: after quarot\nlargest 2, kurtosis 4"
        assert [[bar.get_height() for bar in bars] for bars in upper.containers] == [[70, 60], [3, 4]]
        assert [[bar.get_height() for bar in bars] for bars in lower.containers] == [[11, 8], [1, 2]]
        for bars in lower.containers:
            assert [round(bar.get_x() + bar.get_width() / 2) for bar in bars] == [0, 2]
        assert figure.get_suptitle() == "a title"

    def test_only_bars_that_are_far_apart_are_logarithmic(self) -> None:
        before = Stage("before", torch.ones(2, 2), (400.0, 300.0), (9.0, 8.0))
        after = Stage("after", torch.ones(2, 2), (1.0, 2.0), (3.0, 4.0))
        _, _, upper, lower = draw([few(before, after)], "").axes
        assert (upper.get_yscale(), lower.get_yscale()) == ("linear", "log")
        assert lower.get_ylabel() == "largest |x|, log"

    def test_each_site_has_a_row_and_nothing_must_be_drawn_at_all(self) -> None:
        nothing = Stage("before", torch.zeros(2, 2), (0.0, 0.0), (0.0, 0.0))
        figure = draw([few(nothing), few(nothing, name="o_in")], "")
        assert len(figure.axes) == 6
        assert render([few(nothing)], "", "", suffix="png")

    def test_files_are_the_same_each_time_and_leave_no_settings(self) -> None:
        site = few(Stage("before", torch.rand(4, 6), (1.0, 0.5), (3.0, 4.0)))
        names = [name for name in mpl.rcParams if name != "backend"]  # which is chosen when it is looked at
        settings = [mpl.rcParams[name] for name in names]
        for suffix in ("png", "svg"):
            content = render([site], "title", "note", suffix=suffix)
            with mpl.rc_context({"font.size": 30, "svg.hashsalt": "other"}):
                assert render([site], "title", "note", suffix=suffix) == content
        assert b"<dc:date>" not in content
        assert [mpl.rcParams[name] for name in names] == settings
        assert "matplotlib.pyplot" not in sys.modules


class TestStep:
    def test_a_picture_and_its_numbers(
        self, desk: Desk, statistics: Artifact, plan: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[Figure] = []
        monkeypatch.setattr("qtool.steps.picture.draw", lambda *asked: drawn.append(draw(*asked)) or drawn[-1])
        request = PlotRequest(str(statistics.path), tmp_path / "a.png", str(plan.path), (SITE, "layers.0.up_down"))
        found = plot(request, desk.workspace)
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "desk"]
        assert found.facts["path"] == str((tmp_path / "a.png").resolve())
        rows = json.loads(json.dumps(found.to_json()))["sites"]
        assert [(row["site"], row["stage"]) for row in rows[:4]] == [
            ("layers.0.attn_in", "before"),
            ("layers.1.attn_in", "before"),
            ("layers.0.attn_in", "after smoothquant"),
            ("layers.1.attn_in", "after smoothquant"),
        ]
        assert len(rows) == 8
        (figure,) = drawn
        heights = [bar.get_height() for bars in figure.axes[2].containers for bar in bars]
        assert heights == [row["kurtosis"] for row in rows[:4]]
        assert f"{SITE}, layers.0.up_down" in figure.get_suptitle()

    def test_vectors_are_valid_and_say_the_model(self, desk: Desk, statistics: Artifact, tmp_path: Path) -> None:
        plot(PlotRequest(str(statistics.path), tmp_path / "b.svg", sites=(SITE,)), desk.workspace)
        root = ElementTree.parse(tmp_path / "b.svg").getroot()
        assert root.tag.endswith("svg")
        assert f"model: inputs of {SITE}" in (tmp_path / "b.svg").read_text()  # a comment beside each text's outline

    @pytest.mark.parametrize("gather", [("absmax", "sample"), ("sample",)])
    def test_by_default_the_site_of_the_largest_activation(
        self, desk: Desk, tmp_path: Path, gather: tuple[str, ...]
    ) -> None:
        source = desk.calibrate(gather=gather)
        found = plot(PlotRequest(str(source.path), tmp_path / "a.svg"), desk.workspace)
        largest = max(
            (name for name in source.names("layers.") if name.endswith(gather[0])),
            key=lambda name: float(source.tensor(name).abs().max()),
        )
        drawn = {str(row[0]).split(".", 2)[2] for row in found.tables["sites"].rows}
        assert drawn == {largest.split(".", 2)[2].rpartition(".")[0]}


class TestRefusals:
    def refused(self, desk: Desk, error: type[QtoolError], *asked: Any, **options: Any) -> QtoolError:  # noqa: ANN401
        request = PlotRequest(*asked, **options)
        with pytest.raises(error) as caught:
            plot(request, desk.workspace)
        assert not request.output.exists()
        return caught.value

    def test_a_plan_alone(self, desk: Desk, statistics: Artifact, plan: Artifact, tmp_path: Path) -> None:
        error = self.refused(desk, UsageError, str(plan.path), tmp_path / "a.png")
        assert "is of the kind `plan`" in error.message
        gathered = statistics.path.resolve()
        assert error.hint == f"qtool inspect {gathered} --plot {tmp_path / 'a.png'} --plan {plan.path}"

    def test_a_model(self, desk: Desk, tmp_path: Path) -> None:
        error = self.refused(desk, UsageError, str(desk.model), tmp_path / "a.png")
        assert error.hint.startswith(f"stats=$(qtool calibrate {desk.model}); ")

    def test_another_kind_of_picture(self, desk: Desk, statistics: Artifact, tmp_path: Path) -> None:
        error = self.refused(desk, UsageError, str(statistics.path), tmp_path / "a.pdf")
        assert error.facts == (("known", ".png, .svg"),)
        assert error.hint == f"--plot {tmp_path / 'a.png'}"

    def test_a_site_that_there_is_not(self, desk: Desk, statistics: Artifact, tmp_path: Path) -> None:
        error = self.refused(desk, UsageError, str(statistics.path), tmp_path / "a.png", sites=("layers.1.atn_in",))
        assert error.message == "the statistics know no site `layers.1.atn_in`"
        assert error.facts == (("sites of a block", "attn_in, o_in, mlp_in, up_down"), ("blocks", "0 to 1"))
        assert error.hint == "did you mean `layers.1.attn_in`?"
        self.refused(desk, UsageError, str(statistics.path), tmp_path / "a.png", sites=("layers.2.attn_in",))

    def test_statistics_without_a_sample(self, desk: Desk, tmp_path: Path) -> None:
        bare = desk.calibrate(gather=("absmax", "hessian"))
        for sites in ((), (SITE,)):
            error = self.refused(desk, ArtifactError, str(bare.path), tmp_path / "a.png", sites=sites)
            assert "have no `sample` of `layers." in error.message
            assert error.hint == "qtool calibrate MODEL --gather absmax,hessian,sample"

    def test_a_plan_of_another_model(self, desk: Desk, statistics: Artifact, tmp_path: Path) -> None:
        def nudge(tensors: dict[str, Tensor]) -> None:
            tensors["model.norm.weight"][0] += 1e-3

        other, _ = transform(TransformRequest(str(desk.copied(tmp_path / "other", nudge)), "quarot"), desk.workspace)
        error = self.refused(desk, ArtifactError, str(statistics.path), tmp_path / "a.png", str(other.path))
        assert error.message == "the plan and the statistics are of different models"

    def test_statistics_behind_a_plan(self, desk: Desk, plan: Artifact, tmp_path: Path) -> None:
        behind, _ = calibrate(replace(desk.request(), source=str(plan.path)), desk.workspace)
        self.refused(desk, UsageError, str(behind.path), tmp_path / "a.png", str(plan.path))
        assert plot(PlotRequest(str(behind.path), tmp_path / "a.png"), desk.workspace).facts["plan"] is None

    def test_something_else_in_place_of_the_plan(self, desk: Desk, statistics: Artifact, tmp_path: Path) -> None:
        error = self.refused(desk, ArtifactError, str(statistics.path), tmp_path / "a.png", str(statistics.path))
        assert error.facts == (("expected", "plan"), ("received", "statistics"))

    def test_a_folder_that_there_is_not(self, desk: Desk, statistics: Artifact, tmp_path: Path) -> None:
        error = self.refused(desk, ResourceError, str(statistics.path), tmp_path / "no" / "a.png")
        assert error.hint == f"mkdir -p {tmp_path / 'no'}"

    def test_a_full_disk_leaves_the_old_picture(
        self, desk: Desk, statistics: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        (tmp_path / "a.png").write_bytes(b"old")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="no space left"):
            plot(PlotRequest(str(statistics.path), tmp_path / "a.png"), desk.workspace)
        assert {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}["a.png"] == b"old"
        assert len(list(tmp_path.iterdir())) == 2

    def test_matplotlib_is_missing(
        self, desk: Desk, statistics: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = builtins.__import__

        def without(name: str, *rest: Any) -> Any:  # noqa: ANN401 - as __import__
            if name.startswith("matplotlib"):
                raise ModuleNotFoundError(f"No module named {name!r}")
            return found(name, *rest)

        monkeypatch.delitem(sys.modules, "qtool.steps.picture")
        monkeypatch.setattr(builtins, "__import__", without)
        error = self.refused(desk, PluginError, str(statistics.path), tmp_path / "a.png")
        assert error.message == "pictures need the package `matplotlib`"
        assert error.hint == "pip install 'qtool[plot]'"
