"""Where a step looks for what it needs, where it puts what it makes, and what it says when something is gone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.artifacts.manifest import Manifest, Step
from qtool.artifacts.store import Artifact
from qtool.errors import ArtifactError, ModelError, ResourceError, UsageError
from qtool.steps.subjects import open_subject
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import measured, silent
from tests.steps.conftest import Desk


def plan_of(desk: Desk, statistics: Artifact) -> Artifact:
    return transform(TransformRequest(str(statistics.path), "quarot"), desk.workspace)[0]


class TestInputs:
    """An input is known by its id, wherever it lies and whatever it is called."""

    def test_where_it_was(self, desk: Desk) -> None:
        statistics = desk.calibrate()
        assert desk.workspace.input_of(plan_of(desk, statistics), "statistics").path == statistics.path

    def test_beside_the_artifact(self, desk: Desk, tmp_path: Path) -> None:
        statistics = desk.calibrate()
        plan = plan_of(desk, statistics)
        for name in (statistics.path.name, "any name.safetensors"):
            folder = tmp_path / f"there {name}"
            folder.mkdir()
            moved = replace(plan, path=Path(shutil.copy(plan.path, folder / "p.safetensors")))
            expected = Path(shutil.copy(statistics.path, folder / name))
            hidden = statistics.path.rename(statistics.path.with_suffix(".hidden"))
            assert desk.workspace.input_of(moved, "statistics").path == expected
            hidden.rename(statistics.path)

    def test_in_the_home_folder(self, desk: Desk, tmp_path: Path) -> None:
        statistics = desk.calibrate(output=tmp_path / "out.safetensors")
        plan = plan_of(desk, statistics)
        found = Path(shutil.move(statistics.path, desk.workspace.home / "moved.safetensors"))
        elsewhere = replace(plan, path=Path(shutil.copy(plan.path, tmp_path / "p.safetensors")))
        assert desk.workspace.input_of(elsewhere, "statistics").path == found

    def test_where_the_user_says_and_nowhere_else(self, desk: Desk, tmp_path: Path) -> None:
        statistics, other = desk.calibrate(), desk.calibrate(seed=1)
        plan = plan_of(desk, statistics)
        copy = Path(shutil.copy(statistics.path, tmp_path / "copy.safetensors"))
        told = replace(desk.workspace, inputs={"statistics": copy})
        assert told.input_of(plan, "statistics").path == copy
        wrong = replace(desk.workspace, inputs={"statistics": other.path})
        with pytest.raises(ArtifactError, match="cannot be found"):
            wrong.input_of(plan, "statistics")

    def test_another_file_in_its_place_is_passed_over(self, desk: Desk) -> None:
        statistics, other = desk.calibrate(), desk.calibrate(seed=1)
        plan = plan_of(desk, statistics)
        kept = statistics.path.rename(desk.workspace.home / "kept.safetensors")
        shutil.copy(other.path, statistics.path)
        (desk.workspace.home / "broken.safetensors").write_bytes(b"no artifact")
        assert desk.workspace.input_of(plan, "statistics").path == kept

    def test_one_that_is_gone_is_named(self, desk: Desk) -> None:
        statistics = desk.calibrate()
        plan = plan_of(desk, statistics)
        statistics.path.unlink()
        with pytest.raises(ArtifactError, match=f"the statistics behind `{plan.path.name}` cannot be found") as refused:
            desk.workspace.input_of(plan, "statistics")
        assert refused.value.facts == (("id", statistics.manifest.id[:12]), ("last seen", str(statistics.path)))
        assert refused.value.hint == "--input statistics=PATH"


class TestModels:
    def test_a_model_that_moved(self, desk: Desk, tmp_path: Path) -> None:
        first = desk.copied(tmp_path / "first")
        statistics = desk.calibrate(source=str(first))
        second = Path(shutil.move(first, tmp_path / "second"))
        with pytest.raises(ArtifactError, match=r"the model behind .* cannot be found") as refused:
            open_subject(str(statistics.path), desk.workspace)
        assert refused.value.hint == "--input model=PATH"
        assert ("last seen", str(first)) in refused.value.facts
        told = replace(desk.workspace, inputs={"model": second})
        assert open_subject(str(statistics.path), told).model.path == second

    def test_another_model_in_its_place(self, desk: Desk, tmp_path: Path) -> None:
        model = desk.copied(tmp_path / "model")
        statistics = desk.calibrate(source=str(model))

        def nudge(tensors: dict[str, Tensor]) -> None:
            tensors["lm_head.weight"][0, 0] += 1e-9

        shutil.rmtree(model)
        desk.copied(tmp_path / "model", nudge)
        with pytest.raises(ArtifactError, match="is about another model") as refused:
            open_subject(str(statistics.path), desk.workspace)
        assert refused.value.facts[0] == ("expected", statistics.manifest.subject[:12])

    def test_its_identity_is_its_content(self, desk: Desk, tmp_path: Path) -> None:
        model = desk.workspace.model(str(desk.model))
        copy = desk.copied(tmp_path / "copy")
        assert desk.workspace.model(str(copy)).id == model.id
        config = (copy / "config.json").read_text()
        (copy / "config.json").write_text(
            config.replace('"transformers_version"', '"_name_or_path": "x", "transformers_version"')
        )
        assert desk.workspace.model(str(copy)).id == model.id
        assert '"rms_norm_eps"' in config
        (copy / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
        assert desk.workspace.model(str(copy)).id != model.id

    def test_a_file_that_changed_is_read_again(self, desk: Desk, tmp_path: Path) -> None:
        copy = desk.copied(tmp_path / "copy")
        before = desk.workspace.model(str(copy)).id
        content = bytearray((copy / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (copy / "model.safetensors").write_bytes(content)
        assert desk.workspace.model(str(copy)).id != before

    @pytest.mark.parametrize("reference", ["tinyy", "./no/where", "/no/where", "a/b/c", "~nobody"])
    def test_a_name_that_is_none(self, desk: Desk, reference: str) -> None:
        with pytest.raises(ModelError, match=f"no such model `{reference}`") as refused:
            desk.workspace.model(reference)
        assert "tiny" in str(refused.value.facts)

    def test_a_hub_that_cannot_be_reached(self, desk: Desk) -> None:
        with pytest.raises((ResourceError, ModelError), match="`nobody/nothing`") as refused:
            desk.workspace.model("nobody/nothing")
        assert refused.value.hint

    def test_a_folder_that_is_no_model(self, desk: Desk, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="holds no model"):
            desk.workspace.model(str(tmp_path))

    def test_an_empty_path_blames_the_command_before(self, desk: Desk) -> None:
        with pytest.raises(UsageError, match="an empty path was given") as refused:
            open_subject("", desk.workspace)
        assert "the command before this one failed" in refused.value.hint

    def test_an_artifact_that_is_not_there(self, desk: Desk) -> None:
        with pytest.raises(ArtifactError, match="no such file"):
            open_subject("nowhere.safetensors", desk.workspace)


class TestOutputs:
    manifest = Manifest("plan", Step("transform", "a+b", 1, "test", {}), {}, "subject", "family")

    def test_a_name_that_follows_from_the_key(self, desk: Desk) -> None:
        path = desk.workspace.output(self.manifest, None)
        assert path == desk.workspace.home.resolve() / f"transform-a-b-{self.manifest.key[:12]}.safetensors"

    def test_a_name_that_was_chosen(self, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert desk.workspace.output(self.manifest, Path("x.safetensors")) == tmp_path.resolve() / "x.safetensors"

    @pytest.mark.parametrize(("name", "hint"), [("plan", "-o plan.safetensors"), ("plan.bin", "-o plan.safetensors")])
    def test_another_ending(self, desk: Desk, name: str, hint: str) -> None:
        with pytest.raises(UsageError, match=r"does not end in \.safetensors") as refused:
            desk.workspace.output(self.manifest, Path(name))
        assert refused.value.hint == hint

    def test_the_kind_that_is_expected(self, desk: Desk) -> None:
        statistics = desk.calibrate(gather=())
        assert desk.workspace.artifact(statistics.path, "statistics", "plan").manifest == statistics.manifest
        with pytest.raises(ArtifactError, match="is of the wrong kind") as refused:
            desk.workspace.artifact(statistics.path, "plan", "quantized")
        assert refused.value.facts == (("expected", "plan or quantized"), ("received", "statistics"))
        assert refused.value.hint == "qtool transform --help"


def test_what_a_step_took_is_written_down() -> None:
    about: dict[str, object] = {}
    with measured(about, torch.device("cpu")):
        assert "seconds" not in about
    assert set(about) == {"created", "argv", "versions", "device", "seconds", "process_peak_memory_bytes"}
    assert isinstance(about["process_peak_memory_bytes"], int)
    assert about["process_peak_memory_bytes"] > 1 << 20


def test_nothing_is_shown_by_default() -> None:
    assert list(silent([1, 2], total=2, label="x")) == [1, 2]
